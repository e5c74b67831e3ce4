"""File discovery: the processes of one machine share a directory, without a server (`spec/20 §4.1`, `docs/discovery.md`).

The layout is the reference's, so that its processes can share the directory. All file I/O is done by one thread
(`stator.discovery.file_keeper`); what is here runs on the event loop and never touches the disk.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType, TracebackType
from typing import Self, TypeVar

import msgspec

from stator.clock import Clock
from stator.discovery.file_config import FileDiscoveryConfig
from stator.discovery.file_keeper import FileKeeper, News
from stator.discovery.file_store import FileStore
from stator.discovery.interface import DiscoveryStatus
from stator.discovery.view import View
from stator.discovery.watch import Watch
from stator.errors import Unavailable, UsageError
from stator.protocol.records import Query, Record, RecordKey

__all__ = ["FileDiscovery", "FileDiscoveryConfig", "open_file"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class FileDiscovery:
    """`stator.discovery.Discovery` over a shared directory. No wait for the disk is longer than `answer_timeout`."""

    def __init__(self, config: FileDiscoveryConfig, *, clock: Clock, random: Random) -> None:
        self._config = config
        self._clock = clock
        self._random = random
        self._instance_id = random.getrandbits(64)
        self._view = View()
        self._owned: dict[RecordKey, Record] = {}
        self._status = DiscoveryStatus(backend="file", location=config.root)
        self._keeper: FileKeeper | None = None
        self._stopped: asyncio.Future[None] | None = None

    @property
    def instance_id(self) -> int:
        return self._instance_id

    @property
    def status(self) -> DiscoveryStatus:
        return self._status

    async def register(self, record: Record) -> bool:
        abandoned = False  # nobody waits any more: what failed for the caller must not happen later

        def publish(store: FileStore) -> bool:
            created = not abandoned and store.publish(record)
            if created and abandoned:
                created = not store.withdraw(record.key)
            return created

        def registered(future: asyncio.Future[bool]) -> None:
            if future.cancelled() or future.exception() is not None or not future.result():
                return
            if not abandoned:
                self._owned[record.key] = record
            elif self._keeper is not None:
                self._submit(lambda store: store.withdraw(record.key))

        try:
            return await self._answer(self._submit(publish, registered))
        except TimeoutError as error:
            abandoned = True
            raise Unavailable(f"cannot register {record.key}: {self._status.reason}") from error

    async def unregister(self, key: RecordKey) -> bool:
        def withdrawn(future: asyncio.Future[bool]) -> None:
            if not future.cancelled() and future.exception() is None:
                self._owned.pop(key, None)

        try:
            return await self._answer(self._submit(lambda store: store.withdraw(key), withdrawn))
        except TimeoutError:
            logger.warning("record %s is removed when %s answers", key, self._status.location)
            return key in self._owned

    async def list(self, query: Query) -> list[Record]:
        await self._sync(query)
        return [*self._view.select(query).values()]

    def watch(self, query: Query) -> Watch:
        return self._view.watch(query, lambda: self._sync(query))

    async def last_seen(self, query: Query) -> dict[RecordKey, float]:
        try:
            return await self._answer(self._submit(lambda store: store.last_seen(query)))
        except TimeoutError as error:
            raise Unavailable(f"cannot tell when records were seen last: {self._status.reason}") from error

    def owned(self) -> Mapping[RecordKey, Record]:
        return MappingProxyType(self._owned)

    async def aclose(self) -> None:
        self._view.close()
        if self._keeper is not None:
            self._stopped = self._keeper.stop()
            self._keeper = None
            self._owned.clear()
        if self._stopped is not None:
            done, _ = await asyncio.wait({self._stopped}, timeout=self._config.answer_timeout)
            if not done:
                logger.warning("records in %s are removed when the disk answers, or expire", self._status.location)

    async def __aenter__(self) -> Self:
        if self._keeper is not None or self._stopped is not None:
            raise UsageError("a discovery is opened once")
        store = FileStore(self._config, clock=self._clock, random=self._random)
        self._keeper = FileKeeper(store, clock=self._clock, loop=asyncio.get_running_loop(), tell=self._tell)
        self._keeper.start()
        try:
            root = await self._answer(self._submit(FileStore.open))
        except TimeoutError as error:
            await self.aclose()
            raise Unavailable(f"cannot open discovery: {self._status.reason}") from error
        except BaseException:
            await self.aclose()
            raise
        self._status = msgspec.structs.replace(self._status, location=root)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _sync(self, query: Query) -> None:
        """Bring the view up to date, as far as the disk answers."""
        try:
            await self._answer(self._submit(lambda store: store.sync(query.bucket)))
        except TimeoutError:
            logger.warning("discovery answers what it knew: %s", self._status.reason)

    def _submit(
        self, work: Callable[[FileStore], T], finished: "Callable[[asyncio.Future[T]], None] | None" = None
    ) -> "asyncio.Future[T]":
        """Let the thread do `work`; `finished` is called with what came of it, whether or not somebody still waits."""
        if self._keeper is None:
            raise UsageError("the discovery is not open; enter it with `async with`")
        future = self._keeper.submit(work)
        future.add_done_callback(
            lambda future: future.cancelled() or future.exception()
        )  # heard, even if nobody waits any more
        if finished is not None:
            future.add_done_callback(finished)
        return future

    async def _answer(self, future: "asyncio.Future[T]") -> T:
        """What came of a job; TimeoutError when the disk answered nobody for too long. Cancelled: the job goes on."""
        answered = -1
        while not future.done() and self._answered() != answered:
            answered = self._answered()
            await asyncio.wait({future}, timeout=self._config.answer_timeout)
        if not future.done():
            self._mark_stale(f"{self._status.location} did not answer within {self._config.answer_timeout:g} s")
            raise TimeoutError
        return future.result()

    def _answered(self) -> int:
        return self._keeper.answered if self._keeper is not None else 0

    def _mark_stale(self, reason: str) -> None:
        if self._status.connected:
            self._status = msgspec.structs.replace(self._status, stale_since=self._clock.wall(), reason=reason)

    def _tell(self, news: News) -> None:
        self._status = msgspec.structs.replace(self._status, stale_since=news.stale_since, reason=news.reason)
        self._view.apply(news.changes)


def open_file(config: FileDiscoveryConfig, *, clock: Clock, random: Random) -> FileDiscovery:
    """A discovery to be entered with `async with`; `ConfigError` from there when the root cannot be used."""
    return FileDiscovery(config, clock=clock, random=random)
