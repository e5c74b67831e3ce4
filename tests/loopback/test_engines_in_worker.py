"""The adapters behind a whole worker: tokens, load and cache events over a runtime, and the death of the engine."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loopback import fake_sglang, fake_vllm
from stator.discovery.memory import MemoryStore
from stator.engines.sglang import SglangEngine, SglangOptions
from stator.engines.vllm import VllmEngine, VllmOptions
from stator.events.interface import Channel, Subscription
from stator.kv.events import KV_EVENTS_TOPIC, EventData, decode_router_event
from stator.kv.hashing import local_hashes
from stator.llm.load_event import LOAD_TOPIC, decode_load
from stator.llm.output import read_output
from stator.llm.request import PreprocessedRequest, StopConditions
from stator.routing.round_robin import RoundRobin
from stator.runtime import Client, Runtime
from stator.testing.tiny_tokenizers import build_model_directory
from stator.transports.memory import MemoryNetwork
from stator.worker import EXIT_FAILED, LLMEngine, Worker, WorkerConfig

pytestmark = pytest.mark.timeout(60)

BLOCK = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_directory(tmp_path_factory.mktemp("model"))


def vllm(model: Path) -> LLMEngine:
    return VllmEngine(VllmOptions(model=str(model)))


def sglang(model: Path) -> LLMEngine:
    return SglangEngine(SglangOptions(model=str(model), block_size=BLOCK, load_interval=0.01))


MAKERS = pytest.mark.parametrize("make", [vllm, sglang])


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)
    fake_sglang.install(monkeypatch)


@asynccontextmanager
async def served(engine: LLMEngine) -> AsyncGenerator[tuple[Runtime, Client, "asyncio.Task[int]"]]:
    store, network = MemoryStore(), MemoryNetwork()
    async with (
        Runtime.connect(discovery=store, plane=network, event_plane="memory") as there,
        Runtime.connect(discovery=store, plane=network, event_plane="memory") as here,
    ):
        worker = Worker(engine, there, config=WorkerConfig(namespace="ns", grace_period=0.0))
        task = asyncio.ensure_future(worker.run())
        async with asyncio.timeout(20):
            await worker.ready()
        client = await here.endpoint("ns.backend.generate").client(RoundRobin())
        await client.wait_for_instances()
        try:
            yield here, client, task
        finally:
            worker.shutdown()
            await asyncio.wait_for(task, 20)


async def answer(client: Client, prompt: list[int], count: int) -> list[int]:
    request = PreprocessedRequest(token_ids=prompt, stop_conditions=StopConditions(max_tokens=count))
    async with client.generate(request) as stream:
        return [token async for item in stream for token in read_output(item).token_ids]


async def until(subscription: Subscription, read: Callable[[bytes], Any], wanted: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(10):
        async for event in subscription:
            found = read(event.payload)
            if wanted(found):
                return found
    raise AssertionError("the subscription ended")


@MAKERS
async def test_tokens_load_and_cache_events(model: Path, make: Callable[[Path], LLMEngine]) -> None:
    async with served(make(model)) as (runtime, client, _):
        kv = await runtime.events.subscribe(Channel(namespace="ns", component="backend", topic=KV_EVENTS_TOPIC))
        load = await runtime.events.subscribe(Channel(namespace="ns", topic=LOAD_TOPIC))
        prompt, stored = [9] * BLOCK, False
        async with asyncio.timeout(20):
            while not stored:  # the engine's socket has no memory: what it says before we are connected is lost
                prompt = [prompt[0] + 1] * BLOCK
                assert await answer(client, prompt, 4) == [(sum(prompt) + number) % 500 + 5 for number in range(4)]
                stored = kv.statistics().received > 0
        event = await until(kv, decode_router_event, lambda _: True)
        assert isinstance(event.event.data, EventData)
        assert event.event.data.stored
        (block,) = event.event.data.stored.blocks
        assert (event.worker_id, event.event.event_id) == (client.instance_ids()[0], 1)
        assert block.tokens_hash in {local_hashes([token] * BLOCK, block_size=BLOCK)[0] for token in range(prompt[0] + 1)}
        running = asyncio.ensure_future(answer(client, [9] * 100, 200))
        busy = await until(load, decode_load, lambda report: (report.kv_used_blocks or 0) >= 7)
        assert busy.worker_id == client.instance_ids()[0]
        assert len(await running) == 200
        await until(load, decode_load, lambda report: report.kv_used_blocks == 0)


async def test_a_dead_engine_ends_its_worker(model: Path) -> None:
    async with served(vllm(model)) as (_, client, task):
        assert len(await answer(client, [9], 2)) == 2
        fake_vllm.AsyncLLM.last.die()
        async with asyncio.timeout(10):
            await asyncio.wait([task])
        assert task.result() == EXIT_FAILED
        assert client.instance_ids() == []
