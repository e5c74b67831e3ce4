"""A worker on a real runtime: what a client sees from its start to its end."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

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
from stator.worker import LLMEngine, Worker, WorkerConfig

pytestmark = pytest.mark.timeout(30)

PATH = "dynamo.backend.generate"


class Cluster:
    """A worker process and a client process, in one."""

    def __init__(self, worker: Worker, task: "asyncio.Task[int]", client: Client, runtime: Runtime) -> None:
        self.worker = worker
        self.task = task
        self.client = client
        self.runtime = runtime

    async def models(self) -> list[str]:
        found = await self.runtime.discovery.list(Query(ModelRecord.bucket))
        return [record.card_json["display_name"] for record in found if isinstance(record, ModelRecord)]


@asynccontextmanager
async def cluster(engine: LLMEngine) -> AsyncGenerator[Cluster]:
    store, network = MemoryStore(), MemoryNetwork()
    async with (
        Runtime.connect(discovery=store, plane=network) as there,
        Runtime.connect(discovery=store, plane=network) as here,
    ):
        worker = Worker(engine, there, config=WorkerConfig(grace_period=0.0))
        task = asyncio.ensure_future(worker.run())
        async with asyncio.timeout(10):
            await worker.ready()
        client = await here.endpoint(PATH).client(RoundRobin())
        await client.wait_for_instances()
        try:
            yield Cluster(worker, task, client, here)
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
