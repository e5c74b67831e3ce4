"""Load events over real sockets: how soon they take workers out of routing, and what clients of the HTTP API hear when all are out."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import openai
import pytest

from stator.errors import Overloaded
from stator.events import Channel, EventPublisher
from stator.llm.card import RuntimeConfig, byte_card, card_to_json
from stator.llm.directory import ModelDirectory
from stator.llm.load_event import LOAD_TOPIC, ActiveLoad, encode_load
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.llm.thresholds import LoadConfig
from stator.protocol.ids import EndpointId
from stator.protocol.records import ModelRecord
from stator.runtime import Runtime
from stator.runtime.context import Context
from stator.tasks import SystemClock
from stator.testing.frontend_kit import RawClient, chat_body, frontend
from stator.testing.plane_suite import eventually
from stator.worker.load_publisher import WorkerMetricsPublisher

pytestmark = pytest.mark.timeout(60)

ENDPOINT = EndpointId("dynamo", "backend", "generate")
HALF = LoadConfig(active_decode_blocks_threshold=0.5, stale_after=120.0)
SOON = 0.5
"""seconds: five times what is promised, which is 100 ms"""


class Worker:
    """A worker of its own runtime; what it says of its load is the test's business."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.id = runtime.instance_id
        self.answered = 0
        self._stack = AsyncExitStack()
        self._events: EventPublisher

    async def start(self) -> None:
        await self.speak()
        await self._stack.enter_async_context(self.runtime.endpoint(str(ENDPOINT)).serving(self.generate))
        card = await asyncio.to_thread(byte_card, "echo", runtime_config=RuntimeConfig(total_kv_blocks=1000, max_num_seqs=8))
        record = ModelRecord(
            namespace=ENDPOINT.namespace,
            component=ENDPOINT.component,
            endpoint=ENDPOINT.name,
            instance_id=self.id,
            card_json=card_to_json(card),
        )
        await self.runtime.publish(record)
        self._stack.push_async_callback(self.runtime.withdraw, record)

    async def generate(self, body: Any, context: Context) -> AsyncIterator[Any]:
        self.answered += 1
        yield EngineOutput(token_ids=[111, 107], finish_reason="stop")

    async def speak(self) -> None:
        """Open a publisher."""
        self._events = await self.runtime.events.publisher(Channel(namespace=ENDPOINT.namespace, topic=LOAD_TOPIC))

    async def fall_silent(self) -> None:
        """Close it: its address is gone."""
        await self._events.aclose()

    def say(self, used: int, *, rank: int = 0) -> None:
        self._events.publish(encode_load(ActiveLoad(worker_id=self.id, dp_rank=rank, kv_used_blocks=used)))

    async def leave(self) -> None:
        await self._stack.aclose()
        await self.fall_silent()


class Cluster:
    """Workers and a directory over sockets and files."""

    def __init__(self, stack: AsyncExitStack, root: Path, plane: str, directory: ModelDirectory) -> None:
        self._stack = stack
        self._root = root
        self._plane = plane
        self.directory = directory

    async def add(self) -> Worker:
        runtime = await self._stack.enter_async_context(connect(self._root, self._plane))
        worker = Worker(runtime)
        await worker.start()
        await eventually(lambda: worker.id in self.instances(), within=10)
        await self.heard(worker)
        return worker

    async def heard(self, worker: Worker) -> None:
        """Speak until it is understood: who connects late misses what was before."""
        async with asyncio.timeout(10):
            while worker.id not in {row.worker_id for row in self.directory.monitor.snapshot()}:
                worker.say(0)
                await asyncio.sleep(0.02)

    def instances(self) -> list[int]:
        return [instance for served in self.directory.models() for instance in served.instances()]

    async def ask(self) -> int:
        served = self.directory.get("echo")
        assert served is not None
        async with served.engine.generate(
            PreprocessedRequest(token_ids=[1]), request_id="r", metadata={}, headers={}
        ) as stream:
            async for _ in stream.batches():
                pass
        return getattr(stream, "instance_id")  # noqa: B009  # streams of the runtime have it

    def used(self) -> dict[tuple[int, int], int | None]:
        return {(row.worker_id, row.dp_rank): row.kv_used_blocks for row in self.directory.monitor.snapshot()}


def connect(root: Path, plane: str) -> Any:
    return Runtime.connect(discovery="file", file__root=str(root), event_plane=plane, shutdown_timeout=0.0)


@pytest.fixture(params=["zmq"])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Cluster]:
    async with over(request.param, tmp_path) as it:
        yield it


@asynccontextmanager
async def over(plane: str, root: Path) -> AsyncGenerator[Cluster]:
    async with AsyncExitStack() as stack:
        runtime = await stack.enter_async_context(connect(root, plane))
        directory = await stack.enter_async_context(ModelDirectory.follow(runtime, clock=SystemClock(), load=HALF))
        yield Cluster(stack, root, plane, directory)


async def test_the_monitor_knows_the_last_value_soon_after_it_was_said(cluster: Cluster) -> None:
    workers = [await cluster.add() for _ in range(2)]
    random, last = Random(4), dict[tuple[int, int], int]()
    for step in range(500):
        for worker in workers:
            for rank in (0, 1):
                last[worker.id, rank] = used = random.randrange(1000)
                worker.say(used, rank=rank)
        await asyncio.sleep(0.001 if step % 10 else 0.005)
    await eventually(lambda: cluster.used() == last, within=SOON)
    monitor = cluster.directory.monitor
    expected = {worker.id for worker in workers if all(last[worker.id, rank] > 500 for rank in (0, 1))}
    assert monitor.statistics().busy == len(expected)
    assert monitor.statistics().malformed == monitor.statistics().dropped == 0


async def test_it_keeps_up_with_engines_that_publish_from_their_own_threads(cluster: Cluster) -> None:
    """Two workers with two ranks each, a thousand values a second from each rank."""
    workers = [await cluster.add() for _ in range(2)]
    last: dict[tuple[int, int], int] = {}

    def run(publisher: WorkerMetricsPublisher, worker: int, rank: int) -> None:
        random = Random(rank)
        for _ in range(1000):
            last[worker, rank] = used = random.randrange(1000)
            publisher.publish(rank, kv_used_blocks=used)
            time.sleep(0.001)

    async with AsyncExitStack() as stack:
        running: list[Any] = []
        for worker in workers:
            made = WorkerMetricsPublisher(worker.runtime.events, namespace=ENDPOINT.namespace, worker_id=worker.id)
            publisher = await stack.enter_async_context(made)
            running += [asyncio.to_thread(run, publisher, worker.id, rank) for rank in (0, 1)]
        await asyncio.gather(*running)
        await eventually(lambda: cluster.used() == last, within=SOON)
    assert cluster.directory.monitor.statistics().malformed == 0


async def test_a_busy_worker_gets_no_request_soon_after_it_said_so(cluster: Cluster) -> None:
    first, second = await cluster.add(), await cluster.add()
    for busy, free in ((first, second), (second, first), (first, second)):
        free.say(500)
        busy.say(501)
        expected = {(busy.id, 0): 501, (free.id, 0): 500}
        await eventually(lambda expected=expected: cluster.used() == expected, within=SOON)
        assert {await cluster.ask() for _ in range(6)} == {free.id}
    second.say(700)
    await eventually(lambda: cluster.used()[second.id, 0] == 700, within=SOON)
    with pytest.raises(Overloaded, match=rf"2 of 2 workers .* nearest instance {first.id:x}: kv_used_blocks 501 is over 500 "):
        await cluster.ask()


async def test_a_worker_that_leaves_takes_its_state_along(cluster: Cluster) -> None:
    first, second = await cluster.add(), await cluster.add()
    first.say(900)
    second.say(100)
    await eventually(lambda: cluster.used() == {(first.id, 0): 900, (second.id, 0): 100}, within=SOON)
    await first.leave()
    await eventually(lambda: cluster.used() == {(second.id, 0): 100}, within=10)
    third = await cluster.add()
    assert cluster.used() == {(second.id, 0): 100, (third.id, 0): 0}


async def test_while_a_worker_cannot_be_heard_its_last_word_stands(cluster: Cluster) -> None:
    first, second = await cluster.add(), await cluster.add()
    first.say(900)
    await eventually(lambda: cluster.used()[first.id, 0] == 900, within=SOON)
    await first.fall_silent()
    assert {await cluster.ask() for _ in range(4)} == {second.id}
    await first.speak()
    async with asyncio.timeout(10):
        while cluster.used()[first.id, 0] != 7:
            first.say(7)
            await asyncio.sleep(0.02)
    assert {await cluster.ask() for _ in range(4)} == {first.id, second.id}


@pytest.mark.parametrize("admission", [{"queue": 0}, {"queue_timeout": 0.1}], ids=["at-once", "after-a-wait"])
async def test_when_all_are_busy_clients_hear_which_limit_it_was(cluster: Cluster, admission: dict[str, Any]) -> None:
    first, second = await cluster.add(), await cluster.add()
    async with frontend(cluster.directory, **admission) as served, RawClient(served.port) as client:
        await client.request("POST", "/v1/chat/completions", chat_body("hi"))
        assert (await client.answer()).status == 200
        first.say(600)
        second.say(800)
        await eventually(lambda: cluster.used() == {(first.id, 0): 600, (second.id, 0): 800}, within=SOON)
        answered = first.answered + second.answered
        await client.request("POST", "/v1/chat/completions", chat_body("hi"))
        answer = await client.answer()
        assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
        assert "2 of 2 workers" in answer.json()["error"]["message"]
        assert "kv_used_blocks 600 is over 500 (0.5 of 1000 blocks)" in answer.json()["error"]["message"]
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as official:
            with pytest.raises(openai.InternalServerError, match="kv_used_blocks 600 is over 500") as caught:
                await official.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}])
            assert caught.value.status_code == 503
            assert first.answered + second.answered == answered, "no worker was asked"
            first.say(10)
            await eventually(lambda: cluster.used()[first.id, 0] == 10, within=SOON)
            done = await official.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}])
            assert done.choices[0].message.content == "ok"
