"""The thread of a file discovery: it alone touches the disk, and it keeps giving signs of life while the event loop is blocked.

Work goes in as jobs; what changed and the answers come out on the event loop: one hand-over at a time, changes before the
answers that rest on them. What is not handed over yet is coalesced by key, so that a blocked loop costs no memory.
"""

import asyncio
import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from stator.clock import Clock
from stator.discovery.file_store import FileStore
from stator.protocol.records import Record, RecordKey

__all__ = ["FileKeeper", "News"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE = 1.0
"""seconds until the next step after one that failed unexpectedly"""
_JOBS_AT_ONCE = 32
"""jobs done before their answers are handed over and signs of life may be due"""


class News(msgspec.Struct):
    """What the thread has to tell: changes by key (None: gone), and whether it can read the disk."""

    changes: Mapping[RecordKey, Record | None]
    stale_since: float | None
    reason: str


class _Job(msgspec.Struct):
    """Work for the thread and, when done, what came of it."""

    work: Callable[[FileStore], Any]
    future: "asyncio.Future[Any]"
    result: Any = None
    error: Exception | None = None


class FileKeeper:
    """Runs a `FileStore` in a daemon thread. Jobs are bounded by their callers, who wait for them."""

    def __init__(
        self, store: FileStore, *, clock: Clock, loop: asyncio.AbstractEventLoop, tell: Callable[[News], None]
    ) -> None:
        self._store = store
        self._clock = clock
        self._loop = loop
        self._tell = tell
        self._jobs: deque[_Job] = deque()
        self._stopping = False
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._changes: dict[RecordKey, Record | None] = {}
        self._done: list[_Job] = []
        self._told: tuple[float | None, str] = (None, "")
        self._on_its_way = False
        self._more = False
        self.answered = 0
        """jobs whose answers have arrived: grows as long as the disk answers at all"""

    # On the event loop

    def start(self) -> None:
        """Start the thread; `stop` ends it."""
        threading.Thread(target=self._run, name="stator-file-discovery", daemon=True).start()

    def submit(self, work: Callable[[FileStore], T]) -> "asyncio.Future[T]":
        """Run `work` in the thread. Cancelling the future does not stop the work. Not after `stop`."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._jobs.append(_Job(work=work, future=future))
        self._wake()
        return future

    def stop(self) -> "asyncio.Future[None]":
        """End the thread after the jobs submitted so far; our records are removed. Once only."""

        def stop(store: FileStore) -> None:
            store.close()
            self._stopping = True

        return self.submit(stop)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._writer, b"\0")

    def _close_pipe(self) -> None:
        os.close(self._reader)
        os.close(self._writer)

    def _arrive(self, news: News, done: list[_Job], last: bool) -> None:
        self._tell(news)
        for job in done:
            if job.future.cancelled():
                continue
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)
        self.answered += len(done)
        self._on_its_way = False
        if last:  # only here, because a wake-up after an earlier hand-over may still have needed the pipe
            self._close_pipe()
        elif self._more:
            self._wake()

    # In the thread

    def _run(self) -> None:
        waker = select.poll()
        waker.register(self._reader, select.POLLIN)
        listening: int | None = None
        while not self._stopping:
            if listening is None and (listening := self._store.fileno()) is not None:
                waker.register(listening, select.POLLIN)
            self._wait(waker)
            self._step()
            self._work()
            if not self._hand_over():
                self._abandon()

    def _wait(self, waker: select.poll) -> None:
        seconds = 0.0 if self._jobs else self._store.due() - self._clock.monotonic()
        waker.poll(None if seconds == float("inf") else max(0.0, seconds) * 1000)
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reader, 4096):
                pass

    def _step(self) -> None:
        try:
            self._store.step()
        except Exception:
            logger.exception("file discovery failed unexpectedly; it goes on")
            time.sleep(_PAUSE)

    def _work(self) -> None:
        for _ in range(min(len(self._jobs), _JOBS_AT_ONCE)):
            job = self._jobs.popleft()
            try:
                job.result = job.work(self._store)
            except Exception as error:
                job.error = error
            self._done.append(job)
        self._changes.update(self._store.take_changes())

    def _hand_over(self) -> bool:
        """Send the loop what it does not know yet; if a hand-over is on its way, `_arrive` wakes us after it.

        False: the loop is closed.
        """
        if self._loop.is_closed():
            return False
        status = (self._store.stale_since, self._store.reason)
        if not self._changes and not self._done and status == self._told:
            return True
        if self._on_its_way and not self._stopping:
            self._more = True  # first said, then looked again: the loop does it the other way round, so that one of us sees it
            if self._on_its_way:
                return True
        self._more = False
        self._on_its_way = True
        self._told = status
        news = News(changes=self._changes, stale_since=status[0], reason=status[1])
        done = self._done
        self._changes, self._done = {}, []
        try:
            self._loop.call_soon_threadsafe(self._arrive, news, done, self._stopping)
        except RuntimeError:
            return False
        return True

    def _abandon(self) -> None:
        """The loop was closed before the discovery: nobody serves what the records promise."""
        if not self._stopping:
            logger.warning("a file discovery was not closed before its event loop; its records are removed")
            self._store.close()
            self._stopping = True
        self._close_pipe()
