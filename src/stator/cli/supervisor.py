"""Child processes that are kept alive: started, watched, restarted with backoff, and ended in order."""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from random import Random
from typing import BinaryIO

from stator.cli.supervision import News, NewsKind, read_news
from stator.tasks import Backoff, Scope

__all__ = ["Child", "Supervisor"]

logger = logging.getLogger(__name__)

_GIVE_UP_AFTER = 3
"""starts in a row that end without a word before the child was ever ready"""
_STABLE_AFTER = 10.0
"""seconds of readiness after which the backoff starts over"""
_LAST_WORDS = 1.0
"""seconds that what a dead child has written may take to arrive"""


class Child:
    """One supervised process, leader of a session of its own. `told` gets what there is to show."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        told: Callable[[str, News], None],
    ) -> None:
        self.name = name
        self._command = tuple(command)
        self._environment = environment
        self._told = told
        self._process: asyncio.subprocess.Process | None = None
        self._was_ready = False
        self._ready_since: float | None = None
        self._failure = ""

    @property
    def pid(self) -> int | None:
        """The process id; None while it is not running."""
        return None if self._process is None else self._process.pid

    async def keep_alive(self, backoff: Backoff, random: Random, ending: asyncio.Event) -> str:
        """Run it again and again until `ending` ("" is returned), or until it is clear that it never starts (the reason).

        Cancelled: it was killed.
        """
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            self._ready_since = None
            status = await self._run_once()
            if ending.is_set():
                return ""
            if self._ready_since is not None and loop.time() - self._ready_since > _STABLE_AFTER:
                failures = 0
            failures += 1
            if not self._was_ready:
                if self._failure:
                    return f"{self.name} cannot start: {self._failure}"
                if failures >= _GIVE_UP_AFTER:
                    return f"{self.name} ended {failures} times before it was ready, the last time with {_words(status)}"
            delay = backoff.delay(failures - 1, random)
            reason = self._failure or _words(status)
            self._say(f"died ({reason}); starting again in {delay:.2f} s")
            with suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await ending.wait()
                    return ""

    async def _run_once(self) -> int:
        """Start it and wait for its end. Nothing of it is left afterwards, nor of what it started itself."""
        self._failure = ""
        async with Scope(self.name, close_timeout=_LAST_WORDS) as scope:
            with closing(_Pipes()) as pipes:
                process = self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=pipes.life_of_child,
                    stdout=pipes.news_of_child,
                    env=self._environment,
                    start_new_session=True,
                )
                try:
                    pipes.started()
                    listening = scope.spawn(self._listen(pipes.news), name="news")
                    status = await process.wait()
                    _kill_group(process.pid)
                    await asyncio.wait((listening,), timeout=_LAST_WORDS)
                    return status
                finally:
                    _kill_group(process.pid)
                    await process.wait()
                    self._process = None

    async def _listen(self, news: BinaryIO) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), news)
        try:
            await self._hear(reader)
        finally:
            transport.close()

    async def _hear(self, stream: asyncio.StreamReader) -> None:
        async for news in read_news(stream):
            if news.kind is NewsKind.FAILED:
                self._failure = news.text  # shown when the process has ended, with what happens next
                continue
            if news.kind is NewsKind.READY:
                self._was_ready = True
                self._ready_since = asyncio.get_running_loop().time()
            self._told(self.name, news)

    def _say(self, text: str) -> None:
        self._told(self.name, News(kind=NewsKind.PROGRESS, text=text))

    def terminate(self) -> None:
        """Ask it to end, if it is running."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """End it, and what it started itself."""
        if self._process is not None:
            _kill_group(self._process.pid)


class _Pipes:
    """A child's standard input, by which it sees that we live, and its standard output, by which it tells news.

    Not asyncio's own: with those, waiting for a child also waits for all that inherited them.
    """

    def __init__(self) -> None:
        self.life_of_child, self._life = os.pipe()
        read, self.news_of_child = os.pipe()
        self.news = os.fdopen(read, "rb", 0)
        self._of_child = [self.life_of_child, self.news_of_child]

    def started(self) -> None:
        """The child has its ends; ours of them are closed."""
        while self._of_child:
            os.close(self._of_child.pop())

    def close(self) -> None:
        """The child, if it still runs, sees the end of its input."""
        self.started()
        os.close(self._life)
        self.news.close()


class Supervisor:
    """A group of children, ended group by group."""

    def __init__(self, random: Random, *, backoff: Backoff | None = None) -> None:
        self._random = random
        self._backoff = backoff or Backoff(first=0.5, most=15.0)
        self._ending = asyncio.Event()
        self._running: dict[Child, asyncio.Task[None]] = {}
        self._given_up: asyncio.Queue[str] = asyncio.Queue(maxsize=1)

    def start(self, children: Sequence[Child], scope: Scope) -> None:
        """Keep all alive from now on, in `scope`."""
        for child in children:
            self._running[child] = scope.spawn(self._keep_alive(child), name=child.name)

    async def _keep_alive(self, child: Child) -> None:
        reason = await child.keep_alive(self._backoff, self._random, self._ending)
        if reason and not self._given_up.full():
            self._given_up.put_nowait(reason)

    async def gave_up(self) -> str:
        """Wait until one of them cannot be started; why."""
        return await self._given_up.get()

    async def end(self, children: Sequence[Child], *, timeout: float) -> None:
        """SIGTERM, then SIGKILL after `timeout` seconds. Nothing is started again from now on."""
        self._ending.set()
        tasks = {self._running[child] for child in children if child in self._running}
        for child in children:
            child.terminate()
        if not tasks:
            return
        _, left = await asyncio.wait(tasks, timeout=timeout)
        if left:
            for child in children:
                if child.pid is not None:
                    logger.warning("%s did not end within %s s; killing it", child.name, timeout)
                    child.kill()
            await asyncio.wait(left)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _words(status: int) -> str:
    return f"signal {-status}, {signal.strsignal(-status)}" if status < 0 else f"exit status {status}"
