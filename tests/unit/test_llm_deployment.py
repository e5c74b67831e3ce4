"""How requests spread over a model's workers: nobody gets more than it runs, nor anything while it is busy. Room, and who hears of it."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest

from stator.discovery.memory import MemoryStore
from stator.errors import Overloaded, Unavailable
from stator.events import Channel, EventPublisher
from stator.llm.card import ModelCard, RuntimeConfig, byte_card, card_to_json
from stator.llm.deployment import DeployedWorker
from stator.llm.directory import ModelDirectory
from stator.llm.load_event import LOAD_TOPIC, ActiveLoad, encode_load
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.llm.served import ServedModel, TokenStream
from stator.llm.thresholds import LoadConfig
from stator.protocol.ids import EndpointId
from stator.protocol.records import ModelRecord
from stator.runtime import Runtime
from stator.runtime.context import Context
from stator.tasks import SystemClock
from stator.testing.plane_suite import eventually
from stator.transports.memory import MemoryNetwork

pytestmark = pytest.mark.timeout(30)

PATH = "dynamo.backend.generate"


class Worker:
    """Answers with its id when it is let."""

    def __init__(self, runtime: Runtime, path: str, events: EventPublisher) -> None:
        self.runtime = runtime
        self.id = runtime.instance_id
        self.go = asyncio.Event()
        self._endpoint = EndpointId.parse(path)
        self._events = events
        self._served: Any = None
        self._record: Any = None

    async def start(self, name: str, runtime_config: RuntimeConfig, **changes: Any) -> None:
        self._served = await self.runtime.serve(self._endpoint, self.generate)
        plain = await asyncio.to_thread(byte_card, name, runtime_config=runtime_config)
        self._record = ModelRecord(
            namespace=self._endpoint.namespace,
            component=self._endpoint.component,
            endpoint=self._endpoint.name,
            instance_id=self.id,
            card_json=card_to_json(msgspec.structs.replace(plain, **changes)),
        )
        await self.runtime.publish(self._record)

    async def generate(self, body: Any, context: Context) -> AsyncIterator[EngineOutput]:
        yield EngineOutput(token_ids=[1])
        await self.go.wait()
        yield EngineOutput(token_ids=[2], finish_reason="stop")

    def report(self, **load: int) -> None:
        self._events.publish(encode_load(ActiveLoad(worker_id=self.id, **load)))

    async def leave(self) -> None:
        await self._served.unregister()
        await self.runtime.withdraw(self._record)


class Cluster:
    """A directory and its workers, in one process."""

    def __init__(self, stack: AsyncExitStack, store: MemoryStore, network: MemoryNetwork, directory: ModelDirectory) -> None:
        self._stack = stack
        self._store = store
        self._network = network
        self.directory = directory
        self.workers = 0

    async def add(
        self, *, slots: int | None = None, blocks: int | None = None, path: str = PATH, name: str = "m", **changes: Any
    ) -> Worker:
        """A worker that appears at the directory before this returns."""
        runtime = await self._stack.enter_async_context(
            Runtime.connect(discovery=self._store, plane=self._network, shutdown_timeout=0.0)
        )
        namespace = EndpointId.parse(path).namespace
        events = await runtime.events.publisher(Channel(namespace=namespace, topic=LOAD_TOPIC))
        worker = Worker(runtime, path, events)
        await worker.start(name, RuntimeConfig(max_num_seqs=slots, total_kv_blocks=blocks), **changes)
        await eventually(lambda: worker.id in self.instances(name))
        return worker

    def served(self, name: str = "m") -> ServedModel:
        found = self.directory.get(name)
        assert found is not None
        return found

    def instances(self, name: str = "m") -> list[int]:
        """Of all cards."""
        return [instance for served in self.directory.models() if served.name == name for instance in served.instances()]

    def ask(self) -> TokenStream:
        request = PreprocessedRequest(token_ids=[1])
        return self.served().engine.generate(request, request_id="r", metadata={}, headers={})

    async def begin(self, count: int = 1) -> list[Any]:
        """So many requests that run until their worker lets them go."""
        streams: list[Any] = []
        for _ in range(count):
            streams.append(await self._stack.enter_async_context(self.ask()))
        return streams

    def rows(self) -> Mapping[int, tuple[str, str]]:
        engine: Any = self.served().engine
        return {row.instance_id: (row.state, row.reason) for each in engine._deployments for row in each.client.explain()}


@asynccontextmanager
async def cluster(load: LoadConfig | None = None, **settings: Any) -> AsyncGenerator[Cluster]:
    store, network = MemoryStore(), MemoryNetwork()
    async with AsyncExitStack() as stack:
        connecting = Runtime.connect(discovery=store, plane=network, instance_timeout=0.1, **settings)
        runtime = await stack.enter_async_context(connecting)
        following = ModelDirectory.follow(runtime, clock=SystemClock(), load=load or LoadConfig())
        yield Cluster(stack, store, network, await stack.enter_async_context(following))


async def test_nobody_gets_more_requests_than_it_runs_while_others_have_room() -> None:
    async with cluster() as it:
        small, large = await it.add(slots=1), await it.add(slots=4)
        assert it.served().engine.room() == 5
        streams = await it.begin(5)
        assert Counter(stream.instance_id for stream in streams) == {small.id: 1, large.id: 4}
        engine = it.served().engine
        assert engine.room() == 0
        with pytest.raises(Overloaded) as caught:
            await it.begin()
        text = "2 of 2 workers of endpoint dynamo/backend/generate are busy: 2 with all requests they run at once, "
        assert caught.value.message.startswith(text) and engine.pressure() == caught.value.message
        assert set(it.rows().values()) == {("full", "1 requests of 1"), ("full", "4 requests of 4")}
        streams[-1].kill()
        assert engine.room() == 1 and engine.pressure() == ""
        await it.begin()


def test_a_card_says_what_a_worker_runs_at_once_on_each_rank() -> None:
    def slots(**said: Any) -> int | None:
        return DeployedWorker.of(ModelCard(display_name="m", runtime_config=RuntimeConfig(**said)), repeats=False).slots

    assert slots() is None and slots(data_parallel_size=4) is None
    assert slots(max_num_seqs=8) == slots(max_num_seqs=8, data_parallel_size=0) == 8
    assert slots(max_num_seqs=8, data_parallel_size=4) == 32


async def test_how_much_a_worker_gets_can_be_scaled_and_switched_off() -> None:
    async with cluster(routing__slots_factor=1.5) as it:
        await it.add(slots=3)
        assert it.served().engine.room() == 4
    async with cluster(routing__slots_factor=0) as it:
        await it.add(slots=1)
        assert it.served().engine.room() is None
        await it.begin(5)


async def test_a_worker_that_names_no_number_takes_any() -> None:
    async with cluster() as it:
        await it.add(slots=2)
        assert it.served().engine.room() == 2
        free = await it.add()
        assert it.served().engine.room() is None and it.served().engine.pressure() == ""
        streams = await it.begin(20)
        assert sum(stream.instance_id == free.id for stream in streams) == 18


async def test_a_named_instance_decides_itself_whether_it_is_full() -> None:
    async with cluster() as it:
        worker = await it.add(slots=1)
        await it.begin()
        engine: Any = it.served().engine
        client = engine._deployments[0].client
        async with client.direct({}, worker.id) as stream:
            assert stream.instance_id == worker.id


async def test_busy_workers_get_nothing_until_they_report_less() -> None:
    async with cluster(LoadConfig(active_decode_blocks_threshold=0.5)) as it:
        first, second = await it.add(blocks=1000, slots=8), await it.add(blocks=1000, slots=8)
        first.report(kv_used_blocks=501)
        await eventually(lambda: it.rows()[first.id][0] == "busy")
        assert it.served().engine.room() == 8
        assert {stream.instance_id for stream in await it.begin(4)} == {second.id}
        second.report(kv_used_blocks=900)
        first.report(kv_used_blocks=600)
        await eventually(lambda: it.served().engine.room() == 0 and "600" in it.rows()[first.id][1])
        with pytest.raises(Overloaded) as caught:
            await it.begin()
        assert caught.value.message == it.served().engine.pressure()
        text = f"2 over a limit, nearest instance {first.id:x}: kv_used_blocks 600 is over 500 (0.5 of 1000 blocks)"
        assert text in caught.value.message
        it.directory.monitor.set_thresholds("m", active_decode_blocks_threshold=0.7)
        assert it.served().engine.room() == 8, "a threshold acts at once"
        assert {stream.instance_id for stream in await it.begin(2)} == {first.id}
        it.directory.monitor.set_thresholds("m", active_decode_blocks_threshold=0.1)
        first.report(kv_used_blocks=0)
        await eventually(lambda: it.served().engine.room() == 6)


async def test_who_waits_for_room_is_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stator.llm.directory._REMINDER", 3600.0)
    async with cluster(LoadConfig(active_decode_blocks_threshold=0.5)) as it:
        worker = await it.add(slots=1, blocks=10)
        (stream,) = await it.begin()
        rooms: list[int | None] = []
        engine = it.served().engine
        end = engine.on_room(lambda: rooms.append(engine.room()))

        def broken() -> None:
            raise ValueError("somebody else's mistake")

        end_broken = engine.on_room(broken)
        stream.kill()
        assert rooms[-1:] == [1], "a request ended"
        worker.report(kv_used_blocks=10)
        await eventually(lambda: engine.room() == 0)
        rooms.clear()
        worker.report(kv_used_blocks=1)
        await eventually(lambda: rooms[-1:] == [1])
        rooms.clear()
        await it.add(slots=3)
        await eventually(lambda: rooms[-1:] == [4])
        other = await it.add(slots=5, path="blue.backend.generate")
        await eventually(lambda: rooms[-1:] == [9])
        rooms.clear()
        await other.leave()
        await eventually(lambda: rooms[-1:] == [4])
        end()
        end_broken()
        end()
        rooms.clear()
        for begun in await it.begin(2):
            begun.kill()
        assert rooms == []
        deployments: Any = engine
        assert not any(each.client.view.occupancy.on_room for each in deployments._deployments)


async def test_an_answer_that_ends_makes_room_where_others_were_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stator.llm.directory._REMINDER", 3600.0)
    async with cluster(routing__overloaded_for=3600.0) as it:
        await it.add(slots=1)
        await it.add(slots=1)
        first, _ = await it.begin(2)
        await anext(first.batches())
        engine: Any = it.served().engine
        engine._deployments[0].client.view.availability.mark_overloaded(first.instance_id, 0.0, seconds=1e9)
        rooms: list[int | None] = []
        engine.on_room(lambda: rooms.append(engine.room()))
        first.kill()
        assert rooms == [1], "it was full when it refused, and is not now"


async def test_who_waits_is_reminded_once_a_second_because_time_alone_makes_room() -> None:
    async with cluster() as it:
        await it.add(slots=1)
        told = asyncio.Event()
        end = it.served().engine.on_room(told.set)
        async with asyncio.timeout(5):
            await told.wait()
        end()


async def test_endpoints_without_room_are_passed_over() -> None:
    async with cluster() as it:
        first, second = await it.add(slots=1), await it.add(slots=3, path="blue.backend.generate")
        streams = await it.begin(4)
        assert Counter(stream.instance_id for stream in streams) == {first.id: 1, second.id: 3}
        with pytest.raises(Overloaded):
            await it.begin()
        engine = it.served().engine
        assert engine.room() == 0
        assert "dynamo/backend/generate" in engine.pressure() and "blue/backend/generate" in engine.pressure()


async def test_cards_without_room_are_passed_over() -> None:
    async with cluster() as it:
        first = await it.add(slots=1)
        second = await it.add(slots=3, path="blue.backend.generate", kv_cache_block_size=64)
        streams = await it.begin(4)
        assert Counter(stream.instance_id for stream in streams) == {first.id: 1, second.id: 3}
        with pytest.raises(Overloaded):
            await it.begin()


async def test_models_on_one_endpoint_have_their_own_workers_and_thresholds() -> None:
    async with cluster(LoadConfig(active_decode_blocks_threshold=0.5)) as it:
        both = await it.add(blocks=100)
        base: ModelRecord = both._record  # pyright: ignore[reportPrivateUsage]
        adapter = {**base.card_json, "display_name": "lora", "slug": "lora", "lora": {"name": "lora"}}
        record = msgspec.structs.replace(base, model_suffix="lora", card_json=adapter)
        plain = await it.add(blocks=100)
        await both.runtime.publish(record)
        await eventually(lambda: it.directory.get("lora") is not None)
        assert it.served("lora").instances() == [both.id] and len(it.served().instances()) == 2
        both.report(kv_used_blocks=60)
        await eventually(lambda: it.served("lora").engine.room() == 0)
        assert {stream.instance_id for stream in await it.begin(3)} == {plain.id}
        it.directory.monitor.set_thresholds("lora", active_decode_blocks_threshold=0.9)
        assert it.served("lora").engine.room() is None
        assert {stream.instance_id for stream in await it.begin(3)} == {plain.id}, "the other model's threshold stands"


async def test_instances_without_a_card_get_no_requests() -> None:
    async with cluster() as it:
        worker = await it.add()
        async with Runtime.connect(discovery=it._store, plane=it._network) as runtime:  # pyright: ignore[reportPrivateUsage]

            async def generate(body: Any) -> AsyncIterator[Any]:
                yield {"token_ids": [9]}

            async with runtime.endpoint(PATH).serving(generate):
                await eventually(lambda: len(it.rows()) == 2)
                assert it.rows()[runtime.instance_id] == ("barred", "it serves another card, or none")
                assert {stream.instance_id for stream in await it.begin(4)} == {worker.id}


async def test_requests_prepared_for_a_card_that_is_gone_go_nowhere() -> None:
    async with cluster() as it:
        old = await it.add()
        held = it.served()
        stream = it.ask()
        await old.leave()
        await eventually(lambda: it.directory.get("m") is None)
        await it.add(kv_cache_block_size=64)
        with pytest.raises(Unavailable, match="the card that requests were prepared for is no longer served"):
            async with stream:
                pass
        with pytest.raises(Unavailable, match="no workers available for model 'm'"):
            held.engine.generate(PreprocessedRequest(token_ids=[1]), request_id="r", metadata={}, headers={})
        assert held.engine.room() == 0 and held.engine.pressure() == "no workers available for model 'm'"
