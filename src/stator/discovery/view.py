"""What this process knows of the cluster: the records, and who watches them. Every backend feeds one; it lives on the loop."""

from collections.abc import Awaitable, Callable, Mapping

from stator.discovery.watch import Watch
from stator.protocol.records import Query, Record, RecordKey

__all__ = ["View"]


class View:
    """Records by key, and the watches that are told when they change. Not thread-safe: all calls come from one event loop."""

    def __init__(self) -> None:
        self.records: dict[RecordKey, Record] = {}
        self._watches: set[Watch] = set()
        self._closed = False

    @property
    def watches(self) -> int:
        """How many watches are open."""
        return len(self._watches)

    def apply(self, changes: Mapping[RecordKey, Record | None]) -> None:
        """Make `changes` true (None: the key is gone) and tell the watches."""
        for key, record in changes.items():
            if record is None:
                self.records.pop(key, None)
            else:
                self.records[key] = record
            for watch in self._watches:
                if watch.query.matches(key):
                    watch.offer(key, record)

    def select(self, query: Query) -> dict[RecordKey, Record]:
        """The records that match, ordered by key."""
        return {key: self.records[key] for key in sorted(filter(query.matches, self.records))}

    def watch(self, query: Query, prepare: Callable[[], Awaitable[None]]) -> Watch:
        """A watch whose first batch is what is known once `prepare()` has returned."""

        async def attach(watch: Watch) -> Mapping[RecordKey, Record]:
            await prepare()
            if self._closed:
                watch.end()
                return {}
            self._watches.add(watch)
            return self.select(query)

        return Watch(query, attach=attach, detach=self._watches.discard)

    def close(self) -> None:
        """End every watch. Idempotent."""
        self._closed = True
        for watch in tuple(self._watches):
            watch.end()
        self._watches.clear()
