"""Child processes that are kept alive: started, watched, restarted with backoff, and ended in order."""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from random import Random

from stator.errors import StatorError
from stator.tasks import Backoff, Scope

__all__ = ["Child", "GaveUp", "Supervisor"]

logger = logging.getLogger(__name__)

_GIVE_UP_AFTER = 3
"""starts in a row that end before the child was ready, when it never was"""
_STABLE_AFTER = 10.0
"""seconds of life after which the backoff starts over"""


class GaveUp(StatorError):
    """A child cannot be started."""


class Child:
    """One supervised process: `python -m stator …`. `told` gets its progress lines."""

    def __init__(
        self, name: str, arguments: Sequence[str], environment: dict[str, str], told: Callable[[str, str], None]
    ) -> None:
        self.name = name
        self._arguments = tuple(arguments)
        self._environment = environment
        self._told = told
        self._process: asyncio.subprocess.Process | None = None
        self._was_ready = False
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """The process id; None while it is not running."""
        return None if self._process is None else self._process.pid

    async def keep_alive(self, backoff: Backoff, random: Random, ending: asyncio.Event) -> None:
        """Run it again and again until `ending`. Raises `GaveUp` if it never became ready."""
        failures = 0
        while not ending.is_set():
            began = asyncio.get_running_loop().time()
            status = await self._run_once()
            if ending.is_set():
                return
            if asyncio.get_running_loop().time() - began > _STABLE_AFTER:
                failures = 0
            failures += 1
            if not self._was_ready and failures >= _GIVE_UP_AFTER:
                raise GaveUp(f"{self.name} ended {failures} times before it was ready (last {_reason(status)})")
            delay = backoff.delay(failures - 1, random)
            self.restarts += 1
            self._told(self.name, f"died ({_reason(status)}); starting again in {delay:.1f} s")
            try:
                async with asyncio.timeout(delay):
                    await ending.wait()
            except TimeoutError:
                continue

    async def _run_once(self) -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "stator",
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._environment,
            start_new_session=True,
        )
        self._process = process
        try:
            assert process.stdout is not None
            async for line in process.stdout:
                text = line.decode(errors="replace").strip()
                self._was_ready = self._was_ready or text == "ready" or text.startswith("listening")
                self._told(self.name, text)
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal if it is running."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)


class Supervisor:
    """A group of children, ended group by group."""

    def __init__(self, random: Random, *, backoff: Backoff | None = None) -> None:
        self._random = random
        self._backoff = backoff or Backoff(first=0.5, most=15.0)
        self._ending = asyncio.Event()
        self._running: dict[Child, asyncio.Task[None]] = {}

    async def watch(self, children: Sequence[Child], scope: Scope) -> None:
        """Keep all alive; raises `GaveUp` as soon as one cannot be started. Returns after `end`."""
        for child in children:
            work = child.keep_alive(self._backoff, self._random, self._ending)
            self._running[child] = scope.spawn(work, name=child.name)
        done, _ = await asyncio.wait(self._running.values(), return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            if not task.cancelled() and isinstance(error := task.exception(), StatorError):
                raise error

    async def end(self, children: Sequence[Child], timeout: float) -> None:
        """SIGTERM, then SIGKILL after `timeout` seconds. Nothing is started again from now on."""
        self._ending.set()
        tasks = {self._running[child] for child in children if child in self._running}
        for child in children:
            child.signal(signal.SIGTERM)
        if not tasks:
            return
        _, left = await asyncio.wait(tasks, timeout=timeout)
        if left:
            for child in children:
                if child.pid is not None:
                    logger.warning("%s did not end within %s s; killing it", child.name, timeout)
                    child.signal(signal.SIGKILL)
            await asyncio.wait(left)


def _reason(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
