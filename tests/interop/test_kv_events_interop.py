"""KV events between us and the reference 1.3.1: its router learns from our publisher, its publisher and its engine socket tell us."""

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import zmq
import zmq.asyncio

from interop.peers import Peer, discovery_root, needs_reference, peer
from stator import Runtime
from stator.engines.echo import EchoEngine
from stator.events.interface import Channel, EventPublisher, Subscription
from stator.kv.engine_socket import follow_engine_socket
from stator.kv.events import EventData, RemovedBlocks, RouterEvent, decode_router_event, encode_router_event
from stator.kv.hashing import local_hashes, sequence_hashes
from stator.kv.publisher import KvPublisher
from stator.kv.sources import KvEventSink, KvEventSource, PushSource, ZmqSource
from stator.protocol import response_stream
from stator.protocol.two_part import encode_frame
from stator.runtime import Context
from stator.tasks import Scope
from stator.testing.plane_suite import eventually
from stator.worker import Worker, WorkerConfig
from stator.worker.engine import EngineConfig

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120), needs_reference]

BLOCK = 4
TOKENS = list(range(1, 17))
NAMES = sequence_hashes(local_hashes(TOKENS, block_size=BLOCK))
"""of the four blocks; the same on every worker, as their router wants it"""


class CachingEngine(EchoEngine):
    """An echo whose two ranks hold the blocks that the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks: list[KvEventSink] = []

    async def start(self, instance_id: int) -> EngineConfig:
        config = await super().start(instance_id)
        return msgspec.structs.replace(config, total_kv_blocks=100, kv_cache_block_size=BLOCK, data_parallel_size=2)

    def kv_event_sources(self) -> Sequence[KvEventSource]:
        return [PushSource(on_ready=self.ranks.append, dp_rank=rank) for rank in (0, 1)]


class Restored(msgspec.Struct):
    """The answer about a cache's past. It stands in the frame as it is, without the item's wrapper of other endpoints."""

    TreeDump: dict[str, Any]


async def nothing_to_restore(request: Any, context: Context) -> AsyncIterator[Any]:
    """What a router asks for when it begins, and after a gap: an empty cache. It applies no events before it has had an answer."""
    yield Restored({"events": [], "last_event_id": 0})


@pytest.fixture(autouse=True)
def plain_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our workers do not serve the past of a cache yet; the test does it for them."""
    write_item = response_stream.write_item

    def write(out: list[bytes], value: Any, codec: Any) -> bool:
        if type(value) is not Restored:
            return write_item(out, value, codec)
        assert codec == "json"
        out.append(encode_frame(data=b'{"data":' + msgspec.json.encode(value) + b',"complete_final":false}'))
        return False

    monkeypatch.setattr(response_stream, "write_item", write)


@asynccontextmanager
async def our_worker(root: Path) -> AsyncGenerator[tuple[CachingEngine, int]]:
    """On the compatible plane; with its instance id."""
    engine = CachingEngine()
    async with (
        Runtime.connect(discovery="file", plane="compatible", event_plane="zmq", file__root=str(root)) as runtime,
        Scope("worker") as scope,
    ):
        for rank in (0, 1):
            scope.spawn(runtime.endpoint(f"kv.backend.worker_kv_indexer_query_dp{rank}").serve(nothing_to_restore))
        worker = Worker(engine, runtime, config=WorkerConfig(namespace="kv", grace_period=0.0))
        running, ready = scope.spawn(worker.run()), scope.spawn(worker.ready())
        await asyncio.wait((running, ready), timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert ready.done(), "the worker did not start"
        try:
            yield engine, runtime.instance_id
        finally:
            worker.shutdown()
            worker.shutdown()
            await asyncio.wait_for(running, 20)


async def overlaps(router: Peer, worker: int, tokens: list[int] = TOKENS, **command: Any) -> dict[int, tuple[int, int, int]]:
    """Blocks that the router believes to be on the device, on the host and on disk, the faster ones included; by rank."""
    answer = await router.ask(do="overlap", tokens=tokens, **command)
    return {
        row["dp_rank"]: (row["device_blocks"], row["host_pinned_blocks"], row["disk_blocks"])
        for row in answer.get("scores", {}).get("workers", ())
        if row["worker_id"] == worker
    }


async def until_overlaps(router: Peer, worker: int, expected: dict[int, tuple[int, int, int]], **command: Any) -> None:
    found: Any = None
    async with asyncio.timeout(20):
        while found != expected:
            found = await overlaps(router, worker, **command)
            await asyncio.sleep(0.05)


def store(sink: KvEventSink, first: int, last: int, **fields: Any) -> None:
    """Blocks `first` … `last - 1` of the sequence."""
    sink.stored(
        token_ids=TOKENS[first * BLOCK : last * BLOCK],
        block_hashes=NAMES[first:last],
        parent_hash=NAMES[first - 1] if first else None,
        **fields,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discovery_root(tmp_path_factory)


async def test_their_router_knows_what_our_ranks_hold(root: Path) -> None:
    async with our_worker(root) as (engine, worker):
        with peer("peer_kv.py", root, KV_ROLE="router") as router:
            zero, one = engine.ranks
            await until_connected(router, worker, engine)
            store(zero, 0, 4)
            store(one, 0, 1)
            await until_overlaps(router, worker, {0: (4, 4, 4), 1: (1, 1, 1)})
            assert (await router.ask(do="best", tokens=TOKENS))["best"] == [worker, 0, 4]

            zero.removed([NAMES[2]])
            await until_overlaps(router, worker, {0: (2, 2, 2), 1: (1, 1, 1)})
            store(one, 1, 3, tier="host_pinned")
            store(one, 3, 4, tier="disk")
            await until_overlaps(router, worker, {0: (2, 2, 2), 1: (1, 3, 4)})

            events = (await router.ask(do="dump"))["events"]
            dumped = [msgspec.convert(event, RouterEvent) for event in events]
            names = {
                (event.event.dp_rank, event.storage_tier): [block.block_hash for block in event.event.data.stored.blocks]
                for event in dumped
                if isinstance(event.event.data, EventData) and event.event.data.stored
            }
            assert names[0, "device"] == NAMES[:2]
            assert names[1, "device"] == NAMES[:1]

            one.cleared()
            await until_overlaps(router, worker, {0: (0, 0, 0), 1: (0, 0, 0)})
            zero.stored(token_ids=TOKENS[:4], block_hashes=[-222], lora_name="lora1")
            await until_overlaps(router, worker, {0: (1, 1, 1), 1: (0, 0, 0)}, lora="lora1")
            assert await overlaps(router, worker) == {0: (0, 0, 0), 1: (0, 0, 0)}


async def until_connected(router: Peer, worker: int, engine: CachingEngine) -> None:
    """Until events of both ranks reach the router; then its view is empty again."""
    async with asyncio.timeout(30):
        found: Any = {}
        while len(found) < 2 or not all(row[0] for row in found.values()):
            for sink in engine.ranks:
                store(sink, 0, 1)
            await asyncio.sleep(0.1)
            found = await overlaps(router, worker)
    engine.ranks[0].cleared()
    await until_overlaps(router, worker, {0: (0, 0, 0), 1: (0, 0, 0)})


# -- their publisher


@asynccontextmanager
async def their_publisher(root: Path, **options: Any) -> AsyncGenerator[tuple[Peer, Subscription]]:
    """And our subscription to what it says, connected."""
    with peer("peer_kv.py", root, KV_ROLE="publisher", KV_OPTIONS=json.dumps(options)) as publisher:
        async with Runtime.connect(discovery="file", plane="compatible", event_plane="zmq", file__root=str(root)) as runtime:
            channel = Channel(namespace="kv", component="backend", topic="kv-events")
            async with await runtime.events.subscribe(channel) as subscription:
                yield publisher, subscription


async def next_event(subscription: Subscription) -> RouterEvent:
    async with asyncio.timeout(10):
        event = await anext(subscription)
    read = decode_router_event(event.payload)
    assert encode_router_event(read) == event.payload
    return read


async def first_event(publisher: Peer, subscription: Subscription) -> RouterEvent:
    """The first that reaches us: repeat until we are connected."""
    async with asyncio.timeout(20):
        while True:
            await publisher.ask(do="remove", hashes=[1])
            try:
                async with asyncio.timeout(0.2):
                    event = await anext(subscription)
            except TimeoutError:
                continue
            return decode_router_event(event.payload)


async def test_their_events_are_read_and_would_be_written_alike(root: Path) -> None:
    async with their_publisher(root) as (publisher, subscription):
        before = await first_event(publisher, subscription)
        assert (before.worker_id, before.storage_tier, before.event.dp_rank) == (77, "device", 3)
        await publisher.ask(do="store", tokens=TOKENS[:8], hashes=[11, -12])
        await publisher.ask(do="store", tokens=TOKENS[8:12], hashes=[13], parent=-12, lora="lora1")
        await publisher.ask(do="remove", hashes=[13, -12])
        events = [await next_event(subscription)]
        while len(events) < 3 or (isinstance(events[-1].event.data, EventData) and events[-1].event.data.stored):
            events.append(await next_event(subscription))
        *_, first, second, third = events
        assert [event.event.event_id for event in (first, second, third)] == list(
            range(first.event.event_id, first.event.event_id + 3)
        )
        for event, count, lora, parent in ((first, 2, None, None), (second, 1, "lora1", 2**64 - 12)):
            assert isinstance(event.event.data, EventData)
            stored = event.event.data.stored
            assert stored
            start = 0 if count == 2 else 8
            tokens = TOKENS[start : start + count * BLOCK]
            assert [block.tokens_hash for block in stored.blocks] == local_hashes(tokens, block_size=BLOCK, lora_name=lora)
            assert stored.parent_hash == parent
        assert isinstance(third.event.data, EventData)
        assert third.event.data.removed
        assert third.event.data.removed.block_hashes == [13, 2**64 - 12]


# -- an engine's socket, followed by both

SEVEN = [1, 2, 3, 4, 5, 6, 7, 8]
BATCHES: list[list[Any]] = [
    [["BlockStored", [111, -222], None, SEVEN, BLOCK, None]],
    [["BlockStored", [333], -222, [9, 10, 11, 12], BLOCK, None, "GPU"], ["BlockRemoved", [333]]],
    [["BlockStored", [444], None, [9, 10, 11, 13], BLOCK, 1, "CPU_PINNED", "lora1"]],
    [
        {
            "type": "BlockStored",
            "block_hashes": [2**64 - 5],
            "parent_block_hash": 111,
            "token_ids": [9, 9, 9, 9],
            "block_size": BLOCK,
        }
    ],
    [
        {
            "type": "BlockStored",
            "block_hashes": [6],
            "parent_block_hash": None,
            "token_ids": [1],
            "block_size": BLOCK,
            "lora_id": None,
        }
    ],
    [{"type": "BlockRemoved", "block_hashes": [6, -7], "medium": "DISK"}, ["AllBlocksCleared"]],
    [{"type": "AllBlocksCleared"}],
    [["BlockRemoved", [8], medium] for medium in ("GPU", "CPU", "CPU_TIER1", "CPU_TIER2", "NVME", "EXTERNAL", "SHARED")],
]


async def test_an_engines_socket_tells_them_and_us_the_same(root: Path) -> None:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    endpoint, sequence = f"tcp://127.0.0.1:{port}", itertools.count()

    async def publish(events: list[Any], rank: int | None) -> None:
        batch = msgspec.msgpack.encode([1.0, events, rank])
        await socket.send_multipart([b"", next(sequence).to_bytes(8, "big"), batch])

    async with their_publisher(root, zmq_endpoint=endpoint, zmq_topic="") as (_, theirs), Scope("us") as scope:
        ours = Written()
        publisher = KvPublisher(
            cast(EventPublisher, ours), worker_id=77, dp_rank=3, block_size=BLOCK, batching=None, capacity=1000
        )
        scope.spawn(follow_engine_socket(ZmqSource(endpoint=endpoint, dp_rank=3), publisher))
        async with asyncio.timeout(20):
            heard = 0
            while not heard or not ours.events:
                await publish([["BlockRemoved", [1]]], 3)
                await asyncio.sleep(0.1)
                heard = theirs.statistics().received
        for batch in BATCHES:
            await publish(batch, 3)
        await publish([["BlockRemoved", [7]]], 5)
        await publish([["BlockRemoved", [99]]], 3)
        told = [event async for event in until_last(theirs)]
        await eventually(lambda: content(ours.events[-1])[-1] == LAST)
        assert [content(event) for event in after_first(told)] == [content(event) for event in after_first(ours.events)]
        ids = [[event.event.event_id for event in ours.events if event.event.dp_rank == rank] for rank in (3, 5)]
        assert ids == [list(range(1, len(ours.events))), [1]], "each rank counts by itself; theirs go through all ranks"
        await publisher.aclose()
    context.destroy(linger=0)


LAST = EventData(removed=RemovedBlocks(block_hashes=[99]))


class Written:
    """Keeps what is published."""

    publisher_id = 1

    def __init__(self) -> None:
        self.events: list[RouterEvent] = []

    def publish(self, payload: bytes) -> None:
        self.events.append(decode_router_event(payload))

    async def aclose(self) -> None:
        pass


async def until_last(subscription: Subscription) -> AsyncIterator[RouterEvent]:
    while True:
        event = await next_event(subscription)
        yield event
        if content(event)[-1] == LAST:
            return


def after_first(events: list[RouterEvent]) -> list[RouterEvent]:
    """Without those that only showed that both were connected."""
    first = EventData(removed=RemovedBlocks(block_hashes=[1]))
    start = max(place for place, event in enumerate(events) if event.event.data == first) + 1
    return events[start:]


def content(event: RouterEvent) -> tuple[Any, ...]:
    return event.worker_id, event.storage_tier, event.event.dp_rank, event.event.data
