"""Worker processes (`stator.testing.numbered_worker`) that must stay the same ones, whatever happens around them.

async with WorkerFleet.open({"discovery": url}, directory=tmp_path) as fleet:
    await fleet.grow(3)
    ...
    fleet.check()      # nobody has ended
"""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from stator.settings import child_environment

__all__ = ["FleetWorker", "WorkerFleet"]

_START = 60.0
_STOP = 20.0
"""seconds"""


class FleetWorker:
    """One process."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.id = 0
        """its instance id"""
        self.leaving = False
        """it was told to end"""
        self._process = process
        self._log = log

    async def listed(self) -> None:
        """Wait until it says its id. AssertionError with its log when it ends instead."""
        assert self._process.stdout is not None
        async with asyncio.timeout(_START):
            line = await self._process.stdout.readline()
        assert line, f"the worker ended: {self.log()}"
        self.id = json.loads(line)["id"]

    @property
    def running(self) -> bool:
        """Whether it is the process it was."""
        return self._process.returncode is None

    def log(self) -> str:
        """The end of what it wrote. Reads the disk."""
        return self._log.read_text("utf-8", errors="replace")[-3000:]

    def kill(self) -> None:
        """SIGKILL."""
        self.leaving = True
        self._process.kill()

    async def leave(self) -> int:
        """SIGTERM; its exit status."""
        self.leaving = True
        self._process.terminate()
        async with asyncio.timeout(_STOP):
            return await self._process.wait()

    async def end(self) -> None:
        """Gone, whatever state it is in."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
        await self._process.wait()


class WorkerFleet:
    """Made by `WorkerFleet.open`."""

    def __init__(self, settings: Mapping[str, Any], directory: Path, stack: AsyncExitStack) -> None:
        self.workers: list[FleetWorker] = []
        self._settings = dict(settings)
        self._directory = directory
        self._stack = stack

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Mapping[str, Any], *, directory: Path) -> "AsyncGenerator[WorkerFleet, None]":
        """Nobody yet. `settings` are arguments of `Runtime.connect`; `directory` gets logs. All processes are killed in the end."""
        async with AsyncExitStack() as stack:
            yield cls(settings, directory, stack)

    async def grow(self, count: int) -> list[FleetWorker]:
        """Start `count` more at once and wait until each says that it is listed."""
        new = [await self._start(len(self.workers) + number) for number in range(count)]
        self.workers += new
        await asyncio.gather(*(worker.listed() for worker in new))
        return new

    async def _start(self, number: int) -> FleetWorker:
        path = self._directory / f"worker-{number}.log"
        with path.open("wb") as log:  # a test's directory, not the cluster's
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "stator.testing.numbered_worker", json.dumps(self._settings)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=child_environment({"XDG_RUNTIME_DIR": str(self._directory)}),
            )
        worker = FleetWorker(process, path)
        self._stack.push_async_callback(worker.end)
        return worker

    @property
    def ids(self) -> set[int]:
        """Those of the workers that nobody told to end."""
        return {worker.id for worker in self.workers if not worker.leaving}

    def check(self) -> None:
        """AssertionError with its log when a worker has ended by itself. Reads the disk."""
        for worker in self.workers:
            assert worker.leaving or worker.running, f"worker {worker.id:x} has ended: {worker.log()}"
