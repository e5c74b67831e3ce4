"""Discovery inside one process: several runtimes that share a `MemoryStore`. For tests and single-process set-ups."""

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar, Self, TypeVar

from stator.clock import Clock
from stator.config import Config
from stator.discovery.interface import DiscoveryStatus
from stator.discovery.model_conflict import check_model, models_beside
from stator.discovery.view import View
from stator.discovery.watch import Watch
from stator.errors import UsageError
from stator.protocol.records import ModelRecord, Query, Record, RecordKey

__all__ = ["MemoryDiscovery", "MemoryDiscoveryConfig", "MemoryStore", "open_memory"]


T = TypeVar("T")


class MemoryDiscoveryConfig(Config, frozen=True, kw_only=True):
    """The memory backend has no settings."""

    section: ClassVar[str] = "memory"


class MemoryStore:
    """The cluster of one process: what its memory discoveries have registered. All of them live on one event loop."""

    def __init__(self) -> None:
        self.records: dict[RecordKey, Record] = {}
        self._views: set[View] = set()
        self._shared: dict[Callable[[], Any], Any] = {}

    def shared(self, make: Callable[[], T]) -> T:
        """The cluster's one `make()`, made at the first call: what other rooms' in-memory parts meet at (`stator.events.memory`)."""
        if make not in self._shared:
            self._shared[make] = make()
        return self._shared[make]

    def attach(self, view: View) -> None:
        """Keep `view` up to date from now on."""
        view.apply(self.records)
        self._views.add(view)

    def detach(self, view: View) -> None:
        """Forget `view`."""
        self._views.discard(view)

    def apply(self, changes: Mapping[RecordKey, Record | None]) -> None:
        """Make `changes` true for everybody (None: the key is gone)."""
        for key, record in changes.items():
            if record is None:
                self.records.pop(key, None)
            else:
                self.records[key] = record
        for view in self._views:
            view.apply(changes)


class MemoryDiscovery:
    """`stator.discovery.Discovery` over a shared `MemoryStore`. Every call takes effect in one synchronous step."""

    def __init__(self, store: MemoryStore, *, clock: Clock, random: Random) -> None:
        self._store = store
        self._clock = clock
        self._instance_id = random.getrandbits(64)
        self._view = View()
        self._owned: dict[RecordKey, Record] = {}
        self._state = "new"

    @property
    def instance_id(self) -> int:
        return self._instance_id

    @property
    def store(self) -> MemoryStore:
        """The cluster it belongs to."""
        return self._store

    @property
    def status(self) -> DiscoveryStatus:
        return DiscoveryStatus(backend="memory")

    async def register(self, record: Record) -> bool:
        self._check_open()
        key = record.key
        if isinstance(record, ModelRecord):
            check_model(record, self._view.select(models_beside(record)).values())
        if key in self._owned:
            return False
        if key in self._store.records:
            raise UsageError(f"discovery key {key} is registered by another owner")
        self._owned[key] = record
        self._store.apply({key: record})
        return True

    async def unregister(self, key: RecordKey) -> bool:
        self._check_open()
        if self._owned.pop(key, None) is None:
            return False
        self._store.apply({key: None})
        return True

    async def list(self, query: Query) -> list[Record]:
        self._check_open()
        return [*self._view.select(query).values()]

    def watch(self, query: Query) -> Watch:
        return self._view.watch(query, self._prepare)

    async def last_seen(self, query: Query) -> dict[RecordKey, float]:
        self._check_open()
        return dict.fromkeys(self._view.select(query), self._clock.wall())

    def owned(self) -> Mapping[RecordKey, Record]:
        return MappingProxyType(self._owned)

    async def aclose(self) -> None:
        if self._state == "open":
            self._store.detach(self._view)
            self._store.apply(dict.fromkeys(self._owned))
            self._owned.clear()
        self._state = "closed"
        self._view.close()

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise UsageError("a discovery is opened once")
        self._state = "open"
        self._store.attach(self._view)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _prepare(self) -> None:
        self._check_open()

    def _check_open(self) -> None:
        if self._state != "open":
            raise UsageError("the discovery is not open; enter it with `async with`")


def open_memory(config: MemoryDiscoveryConfig, *, clock: Clock, random: Random) -> MemoryDiscovery:
    """A discovery of its own, to be entered with `async with`. To share one, make several `MemoryDiscovery` on one `MemoryStore`."""
    return MemoryDiscovery(MemoryStore(), clock=clock, random=random)
