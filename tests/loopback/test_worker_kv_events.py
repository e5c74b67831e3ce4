"""From an engine's cache through its worker to whoever listens: calls from a thread, and an engine with a socket of its own."""

import asyncio
import itertools
import struct
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq

from stator.discovery.memory import MemoryStore
from stator.engines.echo import EchoEngine
from stator.events import Channel, Subscription
from stator.kv.events import KV_EVENTS_TOPIC, RouterEvent, decode_router_event
from stator.kv.sources import KvEventSink, KvEventSource, PushSource, ZmqSource
from stator.runtime import Runtime
from stator.transports.memory import MemoryNetwork
from stator.worker import EngineConfig, Worker, WorkerConfig

pytestmark = pytest.mark.timeout(30)


class Caching(EchoEngine):
    """An engine with KV event sources."""

    def __init__(self, *sources: KvEventSource) -> None:
        super().__init__()
        self.sources = sources

    async def start(self, instance_id: int) -> EngineConfig:
        return msgspec.structs.replace(await super().start(instance_id), kv_cache_block_size=4)

    def kv_event_sources(self) -> Sequence[KvEventSource]:
        return self.sources


class Heard:
    """What a listener is told."""

    def __init__(self, subscription: Subscription, runtime: Runtime) -> None:
        self._subscription = subscription
        self.runtime = runtime
        """the worker's"""

    async def next(self) -> RouterEvent:
        async with asyncio.timeout(10):
            return decode_router_event((await anext(self._subscription)).payload)

    def counted(self, name: str, label: str = "") -> int:
        """The value of the worker's metric."""
        lines = self.runtime.metrics.exposition().decode().splitlines()
        [line] = [line for line in lines if line.startswith(f"{name}{{") and label in line]
        return int(line.rpartition(" ")[2])


@asynccontextmanager
async def listening(engine: Caching) -> AsyncGenerator[Heard]:
    store, network = MemoryStore(), MemoryNetwork()
    async with (
        Runtime.connect(discovery=store, plane=network) as there,
        Runtime.connect(discovery=store, plane=network) as here,
        await here.events.subscribe(Channel(namespace="dynamo", component="backend", topic=KV_EVENTS_TOPIC)) as heard,
    ):
        worker = Worker(engine, there, config=WorkerConfig(grace_period=0.0))
        task = asyncio.ensure_future(worker.run())
        async with asyncio.timeout(10):
            await worker.ready()
        try:
            yield Heard(heard, there)
        finally:
            worker.shutdown()
            async with asyncio.timeout(10):
                assert await task == 0
    assert store.records == {}


async def test_calls_of_an_engines_thread_are_heard() -> None:
    sinks: dict[int, KvEventSink] = {}

    def source(rank: int) -> PushSource:
        return PushSource(on_ready=lambda sink: sinks.update({rank: sink}), dp_rank=rank)

    async with listening(Caching(source(0), source(3))) as heard:
        assert sorted(sinks) == [0, 3]
        for rank, sink in sinks.items():
            await asyncio.to_thread(sink.stored, token_ids=[1, 2, 3, 4, 5, 6, 7, 8], block_hashes=[10, 11])
            event = await heard.next()
            assert (event.worker_id, event.event.dp_rank) == (heard.runtime.instance_id, rank)
            assert not isinstance(event.event.data, str)
            assert event.event.data.stored is not None
            assert [block.block_hash for block in event.event.data.stored.blocks] == [10, 11]
        assert heard.counted("stator_kv_events_total", 'outcome="published"') == 2


async def test_an_engines_own_socket_is_followed_and_gaps_are_counted() -> None:
    context = zmq.Context()
    try:
        socket: zmq.Socket[bytes] = context.socket(zmq.PUB)
        socket.bind("tcp://127.0.0.1:0")
        endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)

        def publish(sequence: int, *events: Any) -> None:
            batch = msgspec.msgpack.encode([1.0, list(events), None])
            socket.send_multipart([b"", struct.pack(">q", sequence), batch])

        async with listening(Caching(ZmqSource(endpoint=endpoint, dp_rank=2))) as heard:
            first = asyncio.ensure_future(heard.next())
            for sequence in itertools.count():  # a PUB socket has no memory: until the worker is connected
                publish(sequence, ["BlockRemoved", [sequence + 1]])
                await asyncio.sleep(0.02)
                if first.done():
                    break
            assert (first.result().worker_id, first.result().event.dp_rank) == (heard.runtime.instance_id, 2)
            publish(sequence + 8, ["BlockStored", [99], None, [1, 2, 3, 4], 4, None])
            while (event := await heard.next()).event.data != "cleared":
                assert not isinstance(event.event.data, str)
                if event.event.data.stored is not None:
                    break
            assert heard.counted("dynamo_component_kv_publisher_engines_dropped_events_total") == 7
    finally:
        context.destroy(linger=0)
