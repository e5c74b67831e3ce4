"""Worker processes of one cluster in a directory, and what is seen of them from outside."""

import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from stator.errors import StatorError
from stator.runtime import Client, Runtime
from stator.testing.cluster import ENDPOINT, PLANES, held_by, open_files, tasks_now
from stator.testing.plane_suite import eventually


class WorkerProcess:
    """One of them."""

    def __init__(self, process: asyncio.subprocess.Process, log: IO[bytes], said: dict[str, Any]) -> None:
        self.process = process
        self.id: int = said["id"]
        self.status: str = said.get("status") or ""
        """address of its status server"""
        self.quiet: dict[str, int] = {}
        """what it holds when it has nothing to do, if its site looks at that"""
        self._log = log

    @property
    def log(self) -> str:
        """What it has written so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def gone(self, *, within: float) -> int:
        """Its exit status."""
        try:
            return await asyncio.wait_for(self.process.wait(), within)
        except TimeoutError:
            raise AssertionError(f"it is still there after {within} s:\n{self.log}") from None


class Site:
    """A caller with a client, and the processes it calls."""

    script = Path(__file__).with_name("served_worker.py")

    def __init__(self, plane: str, root: Path, sockets: str, runtime: Runtime, client: Client, stack: AsyncExitStack) -> None:
        self.plane = plane
        self.root = root
        self.runtime = runtime
        self.client = client
        self._settings = {"discovery": "file", "file__root": str(root), **PLANES[plane]}
        self._sockets = sockets
        self._stack = stack

    async def worker(self, **settings: Any) -> WorkerProcess:
        """Start one and wait until the client sees it."""
        process = _process(self.script, {**self._settings, **settings}, self._sockets)
        worker = await self._stack.enter_async_context(process)
        await eventually(lambda: worker.id in self.client.instance_ids(), within=20, what="the worker is seen")
        return worker

    async def settled(self) -> None:
        """Nothing is held here."""
        await eventually(lambda: not held_by(self.runtime), within=10, what="the caller holds nothing")

    def recorded(self, worker: WorkerProcess) -> bool:
        """Whether its record is in the directory right now: not what somebody has heard of it. Reads the disk."""
        return any(f"{worker.id:x}" in path.name for path in (self.root / "v1" / "instances").iterdir())


@asynccontextmanager
async def _process(script: Path, settings: dict[str, Any], sockets: str) -> AsyncIterator[WorkerProcess]:
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(script), json.dumps(settings)),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={"XDG_RUNTIME_DIR": sockets, "PATH": "", "HOME": sockets},
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(30):
                line = await process.stdout.readline()
            log.seek(0)
            assert line, log.read().decode(errors="replace")
            yield WorkerProcess(process, log, json.loads(line))
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            await process.wait()


SiteT = TypeVar("SiteT", bound=Site)


@asynccontextmanager
async def site_of(kind: type[SiteT], plane: str, root: Path, **settings: Any) -> AsyncIterator[SiteT]:
    """A caller; in the end it holds nothing, and nothing is left of it."""
    tasks, files = tasks_now(), len(open_files())
    with tempfile.TemporaryDirectory() as sockets:  # short enough for Unix sockets, and gone with what killed workers leave
        async with AsyncExitStack() as stack:
            runtime = await stack.enter_async_context(
                Runtime.connect(discovery="file", file__root=str(root), **{**PLANES[plane], **settings})
            )
            client = await runtime.endpoint(ENDPOINT).client()
            here = kind(plane, root, sockets, runtime, client, stack)
            yield here
            await here.settled()
    await eventually(lambda: tasks_now() == tasks, what="no task is left")
    await eventually(lambda: len(open_files()) <= files, what="no file is left open")


def site(plane: str, root: Path, **settings: Any) -> AbstractAsyncContextManager[Site]:
    """A site whose workers can be drained and asked about themselves."""
    return site_of(Site, plane, root, **settings)


class Load:
    """Callers that ask without end, each request after the other, and what became of it."""

    def __init__(self, client: Client, request: Any, expected: Any) -> None:
        self.done = 0
        self.failures: list[str] = []
        self.slowest = 0.0
        self._client = client
        self._request = request
        self._expected = expected
        self._asking = True
        self._next = 0

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        while self._asking:
            tag, began = self._next, loop.time()
            self._next += 1
            try:
                items = await self._client.generate({**self._request, "tag": tag}).collect()
                if self._expected is not None and items != self._expected:
                    self.failures.append(f"request {tag}: {items}")
            except StatorError as error:
                self.failures.append(f"request {tag}: {error!r}")
            self.slowest = max(self.slowest, loop.time() - began)
            self.done += 1

    @contextmanager
    def by(self, callers: int, group: asyncio.TaskGroup) -> Iterator["Load"]:
        """Inside the block they ask; each finishes its last request after it."""
        for _ in range(callers):
            group.create_task(self._ask())
        try:
            yield self
        finally:
            self._asking = False
