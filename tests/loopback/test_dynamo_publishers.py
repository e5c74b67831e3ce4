"""The reference's publishers: what a worker says with them arrives on the event plane as the reference's would."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stator.dynamo.errors import CallFailed
from stator.dynamo.llm import KvEventPublisher, WorkerMetricsPublisher, compute_block_hash_for_seq
from stator.dynamo.runtime import DistributedRuntime
from stator.events import Channel, Subscription
from stator.kv.events import KV_EVENTS_TOPIC, RouterEvent, decode_router_event
from stator.llm.load_event import LOAD_TOPIC, ActiveLoad, decode_load
from stator.runtime import Runtime

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
async def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[DistributedRuntime, None]:
    monkeypatch.setenv("STATOR_FILE_ROOT", str(tmp_path))
    monkeypatch.setenv("STATOR_EVENT_PLANE", "zmq")
    monkeypatch.setenv("STATOR_HEALTH_PORT", "-1")
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    yield runtime
    await runtime.aclose()


@asynccontextmanager
async def listening(tmp_path: Path, component: str, topic: str) -> AsyncGenerator[Subscription, None]:
    async with Runtime.connect(discovery="file", event_plane="zmq", file__root=str(tmp_path), health__port=-1) as runtime:
        yield await runtime.events.subscribe(Channel(namespace="demo", component=component, topic=topic))


async def connected(subscription: Subscription) -> None:
    """Until the publisher is heard of; ZMQ then needs a moment of its own."""
    async with asyncio.timeout(10):
        while not subscription.statistics().publishers:
            await asyncio.sleep(0.01)


PROBE = 999


def is_probe(event: RouterEvent) -> bool:
    data = event.event.data
    return not isinstance(data, str) and bool(data.removed) and data.removed.block_hashes == [PROBE]


async def heard_of(publisher: KvEventPublisher, heard: Subscription) -> int:
    """Publish until it arrives, for ZMQ tells nobody when it has shaken hands; the id of the last event of those that arrived."""
    async with asyncio.timeout(10):
        while not heard.statistics().received:
            publisher.publish_removed([PROBE])
            await asyncio.sleep(0.01)
    return decode_router_event((await anext(heard)).payload).event.event_id


async def test_load_is_said_as_the_reference_says_it(program: DistributedRuntime, tmp_path: Path) -> None:
    publisher = WorkerMetricsPublisher()
    publisher.publish(0, 1)  # nobody hears it: there is no endpoint yet
    endpoint = program.endpoint("demo.backend.generate")
    async with listening(tmp_path, "", LOAD_TOPIC) as heard:
        await publisher.create_endpoint(endpoint)
        await publisher.create_endpoint(endpoint)
        await connected(heard)
        publisher.publish(None, 7)
        publisher.publish(1, kv_used_blocks=9)
        found: set[ActiveLoad] = set()
        async with asyncio.timeout(10):
            while len(found) < 2:
                found.add(decode_load((await anext(heard)).payload))
    worker = endpoint.connection_id()
    assert found == {
        ActiveLoad(worker_id=worker, active_decode_blocks=7),
        ActiveLoad(worker_id=worker, dp_rank=1, kv_used_blocks=9),
    }


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((), CallFailed), ((0,), CallFailed), ((-1, 1), OverflowError), ((0, "x"), TypeError), ((0, -1), OverflowError)],
)
def test_what_is_no_load_is_refused(arguments: tuple[object, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        WorkerMetricsPublisher().publish(*arguments)  # pyright: ignore[reportArgumentType]


async def test_blocks_are_published_in_order_also_those_from_before_the_connection(
    program: DistributedRuntime, tmp_path: Path
) -> None:
    async with listening(tmp_path, "backend", KV_EVENTS_TOPIC) as heard:
        publisher = KvEventPublisher(program.endpoint("demo.backend.generate"), worker_id=5, kv_block_size=4, dp_rank=2)
        await program.connected()
        last = await heard_of(publisher, heard)
        publisher.publish_stored(list(range(1, 10)), [4, 4, 1], [10, -222, 30])
        publisher.publish_removed([10])
        publisher.shutdown()
        publisher.publish_removed([-222])
        events: list[RouterEvent] = []
        async with asyncio.timeout(10):
            while len(events) < 2:
                event = decode_router_event((await anext(heard)).payload)
                last = event.event.event_id if is_probe(event) else last
                events += [] if is_probe(event) else [event]
    stored, removed = (event.event.data for event in events)
    assert not isinstance(stored, str) and not isinstance(removed, str) and stored.stored and removed.removed
    hashes = compute_block_hash_for_seq(list(range(1, 10)), 4)
    assert [(block.block_hash, block.tokens_hash) for block in stored.stored.blocks] == [
        (10, hashes[0]),
        (2**64 - 222, hashes[1]),
    ]
    assert removed.removed.block_hashes == [10]
    assert [(event.worker_id, event.event.dp_rank, event.event.event_id - last) for event in events] == [(5, 2, 1), (5, 2, 2)]


def test_the_hashes_are_those_of_the_reference() -> None:
    assert compute_block_hash_for_seq([1, 2, 3, 4, 5, 6, 7, 8], 4) == [14643705804678351452, 16777012769546811212]


def test_blocks_have_a_size(program: DistributedRuntime) -> None:
    with pytest.raises(ValueError, match="kv_block_size"):
        KvEventPublisher(program.endpoint("demo.backend.generate"))
