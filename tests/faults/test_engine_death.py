"""An engine dies and its worker process lives: it is noticed, told, routed around, and started again."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import ClientError, ClientSession, ClientTimeout

from stator.errors import EngineError, StatorError
from stator.runtime import Client, Runtime
from stator.runtime.response import ResponseStream
from stator.testing.plane_suite import eventually
from stator.testing.serve_process import StatorProcess

pytestmark = pytest.mark.timeout(90)

HERE = Path(__file__).parent
ENDPOINT = "dynamo.backend.generate"
REQUEST = {"token_ids": list(range(20))}
"""a tenth of a second"""
REASON = "the engine has failed: the model's process ended with status -9"


@contextmanager
def stator(root: Path, *arguments: str, **settings: str) -> Iterator[StatorProcess]:
    """A command with the dying engine, in a cluster in `root`. Its workers have a status server on a port of their own."""
    environment = {
        "STATOR_FILE_ROOT": str(root),
        "STATOR_HTTP_PORT": "0",
        "STATOR_HEALTH_PORT": "0",
        "STATOR_LOG": "info",
        "STATOR_WORKER_GRACE_PERIOD": "0",
        **settings,
    }
    command = (arguments[0], "--engine", "dying_engine:Dying", *arguments[1:])
    with StatorProcess(*command, directory=HERE, environment=environment) as process:
        yield process


@asynccontextmanager
async def caller(root: Path) -> AsyncIterator[Client]:
    async with Runtime.connect(discovery="file", file__root=str(root)) as runtime:
        yield await runtime.endpoint(ENDPOINT).client()


async def until_listed(client: Client, count: int, *, within: float = 30) -> list[int]:
    await eventually(lambda: len(client.instance_ids()) == count, within=within, what=f"{count} instances are listed")
    return client.instance_ids()


async def status_url(process: StatorProcess, worker: int) -> str:
    """Of the worker with that process id: the one among those that were printed whose port it listens on."""

    def find() -> str:
        ports = {each.laddr.port for each in psutil.Process(worker).net_connections("tcp") if each.status == psutil.CONN_LISTEN}
        for line in process.lines:
            url = line.rpartition("status server bound to ")[2].strip()
            if url != line.strip() and int(url.rpartition(":")[2]) in ports:
                return url
        raise AssertionError(f"no status server of {worker}: {process.output}")

    return await asyncio.to_thread(find)


async def health(session: ClientSession, url: str) -> tuple[int, dict[str, Any]]:
    async with session.get(f"{url}/health") as answer:
        return answer.status, json.loads(await answer.read())


class Asking:
    """Callers that ask without end; a request that fails before its first item is one too many."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.whole = 0
        self.cut: list[StatorError] = []
        self.lost: list[StatorError] = []
        self._on = True

    async def ask(self) -> None:
        while self._on:
            items = 0
            try:
                async with self.client.generate(REQUEST) as stream:
                    async for _ in stream:
                        items += 1
                self.whole += 1
            except StatorError as error:
                (self.cut if items else self.lost).append(error)

    @asynccontextmanager
    async def by(self, callers: int) -> AsyncIterator["Asking"]:
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(self.ask())
            try:
                await self.more()
                yield self
            finally:
                self._on = False

    async def more(self, count: int = 20) -> None:
        """Until that many more answers are whole."""
        wanted = self.whole + count
        await eventually(lambda: self.whole >= wanted, within=20, what=f"{count} more answers are whole")


@asynccontextmanager
async def begun(client: Client) -> AsyncIterator[list[ResponseStream]]:
    """Answers of 201 items, on both workers, whose first item has come."""
    async with AsyncExitStack() as stack:
        streams: list[ResponseStream] = []
        while len({stream.instance_id for stream in streams}) < 2:
            assert len(streams) < 40, "all requests go to one worker"
            stream = await stack.enter_async_context(client.generate({"token_ids": list(range(200))}))
            await anext(stream)
            streams.append(stream)
        yield streams


async def kill_child(worker: int) -> None:
    """Kill the engine of a worker process, and nothing else of it."""
    [child] = await asyncio.to_thread(lambda: psutil.Process(worker).children())
    os.kill(child.pid, signal.SIGKILL)


async def test_a_killed_engine_is_noticed_routed_around_and_started_again(tmp_path: Path) -> None:
    """With `stator serve` and two workers under load."""
    with stator(tmp_path, "serve", "--workers", "2", "--option", "cleanup=1.0") as process:
        await asyncio.to_thread(process.wait_until_ready, workers=2)
        async with caller(tmp_path) as client, ClientSession(timeout=ClientTimeout(total=10)) as session:
            before = await until_listed(client, 2)
            [victim, _] = await asyncio.to_thread(process.children, "worker")
            url = await status_url(process, victim)
            status, page = await health(session, url)
            assert (status, page["endpoints"]) == (200, {"generate": "ready"})
            async with Asking(client).by(8) as asking, begun(client) as streams:
                await kill_child(victim)
                [left] = await until_listed(client, 1, within=5)
                assert left in before
                status, page = await health(session, url)
                assert (status, page["status"], page["endpoints"]) == (503, "notready", {"generate": "notready"})
                assert page["reason"] == REASON
                for stream in streams:
                    if stream.instance_id == left:
                        assert len(await stream.collect()) == 200
                        continue
                    with pytest.raises(EngineError, match=REASON) as caught:
                        await stream.collect()
                    assert caught.value.kind == "EngineShutdown"
                await asking.more()
                after = await until_listed(client, 2)
                assert left in after
                assert after != before, "the process is a new one"
                await asking.more()
            assert asking.lost == []
            assert len(asking.cut) <= 8, "what had begun there, and no more"
            assert {getattr(error, "kind", error.code) for error in asking.cut} <= {"EngineShutdown"}
            await asyncio.to_thread(process.wait_for, rf"worker \d: died \({REASON}\); starting again in")
            with pytest.raises(ClientError):
                await health(session, url)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "the engine has failed: the generation thread crashed"),
        (("--option", "says=no"), "the engine has failed: the model does not answer"),
    ],
)
async def test_a_crashed_thread_ends_a_worker_that_nobody_supervises(
    tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    """Whether the engine says so itself or the next request finds out."""
    with stator(tmp_path, "worker", "--option", "cleanup=1.0", *options) as process:
        url = (await asyncio.to_thread(process.wait_for, r"status server bound to (http://\S+)")).group(1)
        async with caller(tmp_path) as client, ClientSession(timeout=ClientTimeout(total=10)) as session:
            await until_listed(client, 1)
            assert len(await client.generate(REQUEST).collect()) == 21
            async with session.post(f"{url}/engine/control/crash") as answer:
                assert await answer.json(content_type=None) == {"status": "ok"}
            with pytest.raises(StatorError):
                await client.generate(REQUEST).collect()
            await until_listed(client, 0, within=5)
            status, page = await health(session, url)
            assert (status, page["reason"]) == (503, reason)
            assert await asyncio.to_thread(process.wait, 15) == 1
    assert f"error: {reason}" in process.output


async def test_a_start_that_fails_says_so_on_the_health_page(tmp_path: Path) -> None:
    """As long as there is a page: the engine's clean-up takes a while."""
    with stator(tmp_path, "worker", "--option", "cleanup=2.0", "--option", "starts=no") as process:
        url = (await asyncio.to_thread(process.wait_for, r"status server bound to (http://\S+)")).group(1)
        async with ClientSession(timeout=ClientTimeout(total=10)) as session:
            async with asyncio.timeout(10):
                while (found := await health(session, url))[1].get("reason") != "the worker cannot start: no weights":
                    assert found[0] == 503
                    await asyncio.sleep(0.02)
        assert await asyncio.to_thread(process.wait, 15) == 1
    assert "error: no weights" in process.output
