"""A worker on a real runtime: what a client sees from its start to its end."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from stator.discovery.memory import MemoryStore
from stator.engines.echo import EchoEngine, EchoOptions
from stator.errors import EngineError, Overloaded
from stator.llm.output import EngineOutput, read_output
from stator.llm.request import PreprocessedRequest
from stator.protocol.records import ModelRecord, Query
from stator.routing.round_robin import RoundRobin
from stator.runtime import Client, Runtime
from stator.runtime.context import Context
from stator.testing.plane_suite import eventually
from stator.transports.memory import MemoryNetwork
from stator.worker import EXIT_FAILED, EngineCommand, EngineConfig, LLMEngine, Worker, WorkerConfig

pytestmark = pytest.mark.timeout(30)

PATH = "dynamo.backend.generate"


class Cluster:
    """A worker process and a client process, in one."""

    def __init__(self, worker: Worker, task: "asyncio.Task[int]", client: Client, runtime: Runtime, there: Runtime) -> None:
        self.worker = worker
        self.task = task
        self.client = client
        self.runtime = runtime
        """the client's"""
        self.there = there
        """the worker's"""

    async def models(self) -> list[str]:
        found = await self.runtime.discovery.list(Query(ModelRecord.bucket))
        return [record.card_json["display_name"] for record in found if isinstance(record, ModelRecord)]


@asynccontextmanager
async def cluster(engine: LLMEngine, **settings: Any) -> AsyncGenerator[Cluster]:
    store, network = MemoryStore(), MemoryNetwork()
    async with (
        Runtime.connect(discovery=store, plane=network, **settings) as there,
        Runtime.connect(discovery=store, plane=network) as here,
    ):
        worker = Worker(engine, there, config=WorkerConfig(grace_period=0.0))
        task = asyncio.ensure_future(worker.run())
        async with asyncio.timeout(10):
            await worker.ready()
        client = await here.endpoint(PATH).client(RoundRobin())
        await client.wait_for_instances()
        try:
            yield Cluster(worker, task, client, here, there)
        finally:
            worker.shutdown()
            async with asyncio.timeout(10):
                assert await task == 0


async def test_a_request_travels_to_the_engine_and_back() -> None:
    async with cluster(EchoEngine()) as it:
        assert await it.models() == ["echo"]
        request = PreprocessedRequest(token_ids=[7, 8, 9])
        async with it.client.generate(request) as stream:
            items = [read_output(item) async for item in stream]
        assert [token for item in items for token in item.token_ids] == [7, 8, 9]
        assert items[-1].finish_reason == "stop"
    assert await asyncio.wait_for(it.task, 1) == 0


async def test_several_choices_come_with_their_index() -> None:
    async with cluster(EchoEngine()) as it:
        body = {"token_ids": [7, 8], "sampling_options": {"n": 3}}
        async with it.client.generate(body) as stream:
            items = [read_output(item) async for item in stream]
    for index in range(3):
        assert [token for item in items if item.index == index for token in item.token_ids] == [7, 8]


async def test_the_worker_leaves_nothing_in_discovery() -> None:
    async with cluster(EchoEngine()) as it:
        it.worker.shutdown()
        await asyncio.wait_for(it.task, 5)
        assert await it.models() == []
        await eventually(lambda: not it.client.instance_ids())


async def test_a_running_answer_is_finished_before_the_worker_ends() -> None:
    async with cluster(EchoEngine(EchoOptions(delay=0.01))) as it:
        async with it.client.generate(PreprocessedRequest(token_ids=list(range(20)))) as stream:
            items = [read_output(await anext(stream))]
            it.worker.shutdown()
            items += [read_output(item) async for item in stream]
        assert len(items) == 20
        assert items[-1].finish_reason == "stop"


async def test_a_request_that_cannot_be_read_is_the_callers_fault() -> None:
    async with cluster(EchoEngine()) as it:
        with pytest.raises(EngineError, match="token_ids") as caught:
            async with it.client.generate({"token_ids": "text"}) as stream:
                await anext(stream)
        assert caught.value.kind == "InvalidArgument"


async def test_an_engine_at_capacity_refuses() -> None:
    class Full(EchoEngine):
        def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
            raise Overloaded("no slot")

    async with cluster(Full()) as it:
        with pytest.raises(Overloaded):
            async with it.client.generate(PreprocessedRequest(token_ids=[1])) as stream:
                await anext(stream)


async def test_leaving_a_stream_ends_the_engines_work() -> None:
    aborted = asyncio.Event()

    class Noting(EchoEngine):
        async def abort(self, context: Context) -> None:
            await super().abort(context)
            aborted.set()

    async with cluster(Noting(EchoOptions(delay=0.01))) as it:
        async with it.client.generate(PreprocessedRequest(token_ids=list(range(10_000)))) as stream:
            await anext(stream)
        async with asyncio.timeout(5):
            await aborted.wait()


class Holding(EchoEngine):
    """Holds its answers until it is let go; says how many it holds at once."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.held = 0

    async def start(self, instance_id: int) -> EngineConfig:
        return msgspec.structs.replace(await super().start(instance_id), max_num_seqs=2)

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        self.held += 1
        await self.go.wait()
        self.held -= 1
        async for item in super().generate(request, context):
            yield item


@pytest.mark.parametrize(("settings", "held", "waiting"), [({"admission__queue": 1}, 2, 1), ({"admission__slots": 4}, 4, 0)])
async def test_a_worker_runs_as_many_requests_as_its_engine_declares(settings: dict[str, int], held: int, waiting: int) -> None:
    """A few wait, and the rest is refused; what the operator has set stands."""
    engine = Holding()
    async with cluster(engine, **settings) as it, asyncio.TaskGroup() as group:
        request = PreprocessedRequest(token_ids=[1])
        answers = [group.create_task(it.client.generate(request).collect()) for _ in range(held + waiting)]
        await eventually(lambda: engine.held == held, what="the slots are taken")
        if waiting:
            await eventually(lambda: it.there._services.meter.admission.queued == waiting)
            with pytest.raises(Overloaded, match=r"2 requests run \(the engine's max_num_seqs = 2\) and 1 wait"):
                await it.client.generate(request).collect()
        engine.go.set()
        assert len(await asyncio.gather(*answers)) == held + waiting


async def test_requests_are_counted_with_the_models_name() -> None:
    async with cluster(EchoEngine(EchoOptions(name="parrot"))) as it:
        await it.client.generate(PreprocessedRequest(token_ids=[1])).collect()
        page = it.there.metrics.exposition().decode()
    [line] = [line for line in page.splitlines() if line.startswith("dynamo_component_requests_total{")]
    assert 'model="parrot",model_name="parrot"' in line
    assert line.endswith(" 1")


async def test_the_canary_is_answered_by_the_engine() -> None:
    probed: list[PreprocessedRequest] = []

    class Probed(EchoEngine):
        def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
            probed.append(request)
            return super().generate(request, context)

    async with cluster(Probed(), health__canary=True, health__canary_wait=0.2) as it:
        assert not it.there.health.ready
        await eventually(lambda: it.there.health.ready, what="the canary was answered")
    assert probed[0].health_check is True
    assert probed[0].stop_conditions.max_tokens == 1


async def test_an_engine_that_sleeps_is_not_listed() -> None:
    class Sleepy(EchoEngine):
        def controls(self) -> Mapping[str, EngineCommand]:
            return {"sleep": self.obey, "wake_up": self.obey}

        async def obey(self, body: Any) -> Any:
            return {"status": "ok"}

    async with cluster(Sleepy()) as it:
        routes = it.there.engine_routes
        assert (await routes.handle("control/sleep", b""))[0] == 200
        await eventually(lambda: not it.client.instance_ids(), what="it is gone")
        assert it.there.health.ready, "it is well, and asleep"
        assert (await routes.handle("control/wake_up", b""))[0] == 200
        await eventually(lambda: len(it.client.instance_ids()) == 1, what="it is back")
        assert await it.client.generate(PreprocessedRequest(token_ids=[1])).collect()


async def test_an_engine_that_fails_leaves_the_cluster_to_the_others() -> None:
    class Mortal(EchoEngine):
        def __init__(self) -> None:
            super().__init__(EchoOptions(delay=0.01))
            self.dead = asyncio.Event()

        async def failed(self) -> str:
            await self.dead.wait()
            return "gone"

    engine = Mortal()
    store, network = MemoryStore(), MemoryNetwork()
    async with (
        Runtime.connect(discovery=store, plane=network) as there,
        Runtime.connect(discovery=store, plane=network) as here,
    ):
        worker = Worker(engine, there)
        task = asyncio.ensure_future(worker.run())
        async with asyncio.timeout(10):
            await worker.ready()
        client = await here.endpoint(PATH).client(RoundRobin())
        await client.wait_for_instances()
        async with client.generate(PreprocessedRequest(token_ids=list(range(1000)))) as stream:
            await anext(stream)
            engine.dead.set()
            with pytest.raises(EngineError, match="the engine has failed: gone") as caught:
                async for _ in stream:
                    pass
        assert caught.value.kind == "EngineShutdown"
        assert await asyncio.wait_for(task, 5) == EXIT_FAILED
        await eventually(lambda: not client.instance_ids())
        assert not there.health.ready
        assert store.records == {}
