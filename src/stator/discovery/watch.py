"""A watch: the records that match a query, as state that changes, read at the reader's own pace."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Self

import msgspec

from stator.errors import UsageError
from stator.protocol.records import Query, Record, RecordKey

__all__ = ["Added", "Change", "Removed", "Watch"]


class Added(msgspec.Struct, frozen=True):
    """The record is there: new, or changed under the same key (an upsert)."""

    record: Record


class Removed(msgspec.Struct, frozen=True):
    """The record under this key is gone."""

    key: RecordKey


Change = Added | Removed


class Watch:
    """`async with discovery.watch(query) as watch: async for changes in watch: …`

    The first batch is what is there now (it may be empty); each later one has at least one change. Within a batch `Removed`
    come before `Added`. A slow reader gets the difference between what it saw last and what is true now, never a history:
    several changes of one key become one or none, so that nothing queues up. Iteration ends when the discovery is closed.

    One reader at a time. Cancelling a pending `anext` loses nothing.
    """

    def __init__(
        self,
        query: Query,
        *,
        attach: "Callable[[Watch], Awaitable[Mapping[RecordKey, Record]]]",
        detach: "Callable[[Watch], None]",
    ) -> None:
        self.query = query
        self.current: dict[RecordKey, Record] = {}
        """what was true at the batch read last"""
        self._attach = attach
        self._detach = detach
        self._pending: dict[RecordKey, Record | None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._entered = False
        self._greeted = False
        self._ended = False

    @property
    def pending(self) -> int:
        """Changes that wait for the reader: at most the records it knows plus those that are there."""
        return len(self._pending)

    async def __aenter__(self) -> Self:
        if self._entered:
            raise UsageError("a watch is used once; ask the discovery for another one")
        self._entered = True
        try:
            for key, record in (await self._attach(self)).items():
                self.offer(key, record)
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self.end()
        self._detach(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Change]:
        if not self._entered:
            raise UsageError("a watch is read inside `async with`")
        if self._waiter is not None:
            raise UsageError("a watch has one reader at a time")
        while not self._ended and self._greeted and not self._pending:
            await self._wait()
        if self._ended:
            raise StopAsyncIteration
        self._greeted = True
        return self._take()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _take(self) -> list[Change]:
        pending, self._pending = self._pending, {}
        removed: list[Change] = []
        added: list[Change] = []
        for key, record in pending.items():
            if record is None:
                del self.current[key]
                removed.append(Removed(key))
            else:
                self.current[key] = record
                added.append(Added(record))
        return removed + added

    def offer(self, key: RecordKey, record: Record | None) -> None:
        """What is true of `key` from now on; None: it is gone. For the backends; same loop as the reader."""
        if record == self.current.get(key):
            self._pending.pop(key, None)
        else:
            self._pending[key] = record
            self._wake()

    def end(self) -> None:
        """No more batches. For the backends."""
        self._ended = True
        self._pending.clear()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
