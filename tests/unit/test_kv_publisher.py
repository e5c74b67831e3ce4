"""The KV publisher: what leaves it, when, and what it does when nobody takes it away."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import pytest

from stator.errors import UsageError
from stator.events.interface import Channel, OnGap, Overflow, PublisherStatistics, Subscription
from stator.kv.events import (
    BlockMedia,
    EventData,
    KvEvent,
    MediaObject,
    RouterEvent,
    StoredBlocks,
    decode_router_event,
)
from stator.kv.hashing import local_hashes
from stator.kv.publisher import KvPublisher, open_kv_publisher
from stator.kv.sources import KvEventSink
from stator.testing.manual_loop import ManualLoop
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(30)

BLOCK = 4


class ListPublisher:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.events: list[RouterEvent] = []
        self.closed = False

    @property
    def publisher_id(self) -> int:
        return 1

    def publish(self, payload: bytes) -> None:
        assert not self.closed
        self.events.append(decode_router_event(payload))

    def statistics(self) -> PublisherStatistics:
        return PublisherStatistics(published=len(self.events), dropped=0, queued=0)

    async def aclose(self) -> None:
        self.closed = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class ListPlane:
    def __init__(self) -> None:
        self.channels: list[Channel] = []
        self.out = ListPublisher()

    async def publisher(self, channel: Channel) -> ListPublisher:
        self.channels.append(channel)
        return self.out

    async def subscribe(
        self, channel: Channel, *, capacity: int | None = None, overflow: Overflow = "drop_oldest", on_gap: OnGap | None = None
    ) -> Subscription:
        raise NotImplementedError

    async def aclose(self) -> None:
        pass


async def opened(plane: ListPlane, **options: Any) -> KvPublisher:
    options = {"worker_id": 77, "block_size": BLOCK} | options
    return await open_kv_publisher(plane, namespace="ns", component="backend", **options)


def tokens(number: int, *, count: int = 1) -> list[int]:
    return [number * 1000 + place for place in range(count * BLOCK)]


def store(publisher: KvEventSink, *names: int, parent: int | None = None, **fields: Any) -> None:
    """Blocks `names`, each with tokens of its own."""
    token_ids = [token for name in names for token in tokens(abs(name))]
    publisher.stored(token_ids=token_ids, block_hashes=names, parent_hash=parent, **fields)


def shape(event: RouterEvent) -> tuple[int, Any]:
    """Id, and what happened in short."""
    return event.event.event_id, content(event.event)


def content(event: KvEvent) -> Any:
    if event.data == "cleared":
        return "cleared"
    assert isinstance(event.data, EventData)
    if event.data.stored:
        return event.data.stored.parent_hash, [block.block_hash for block in event.data.stored.blocks]
    assert event.data.removed
    return [-one for one in event.data.removed.block_hashes]


def stored_of(event: RouterEvent) -> StoredBlocks:
    assert isinstance(event.event.data, EventData)
    assert isinstance(event.event.data.stored, StoredBlocks)
    return event.event.data.stored


async def turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_events_are_numbered_and_carry_the_hashes_of_their_tokens() -> None:
    plane = ListPlane()
    publisher = await opened(plane, dp_rank=3)
    store(publisher, 1, -2)
    store(publisher, 3, parent=-2, tier="host_pinned", lora_name="lora")
    publisher.removed([3], tier="host_pinned")
    publisher.cleared()
    await turn()
    assert plane.channels == [Channel(namespace="ns", component="backend", topic="kv-events")]
    assert [shape(event) for event in plane.out.events] == [
        (1, (None, [1, 2**64 - 2])),
        (2, (2**64 - 2, [3])),
        (3, [-3]),
        (4, "cleared"),
    ]
    assert {event.worker_id for event in plane.out.events} == {77}
    assert {event.event.dp_rank for event in plane.out.events} == {3}
    assert [event.storage_tier for event in plane.out.events] == ["device", "host_pinned", "host_pinned", "device"]
    hashes = [[block.tokens_hash for block in stored_of(event).blocks] for event in plane.out.events[:2]]
    assert hashes == [
        local_hashes(tokens(1) + tokens(2), block_size=BLOCK),
        local_hashes(tokens(3), block_size=BLOCK, lora_name="lora"),
    ]
    await publisher.aclose()
    assert plane.out.closed


async def test_media_go_into_the_event_and_into_its_hash() -> None:
    plane = ListPlane()
    publisher = await opened(plane)
    image = BlockMedia(mm_objects=[MediaObject(mm_hash=99, offsets=[(0, 2)])])
    store(publisher, 1, 2, media=[None, image])
    await turn()
    blocks = stored_of(plane.out.events[0]).blocks
    assert [block.mm_extra_info for block in blocks] == [None, image]
    assert [block.tokens_hash for block in blocks] == local_hashes(
        tokens(1) + tokens(2), block_size=BLOCK, mm_hashes=[None, [99]]
    )
    await publisher.aclose()


async def test_another_rank_counts_by_itself() -> None:
    plane = ListPlane()
    publisher = await opened(plane)
    other = publisher.for_rank(1)
    for sink in (publisher, other, other, publisher):
        store(sink, 5)
    await turn()
    assert [(event.event.dp_rank, event.event.event_id) for event in plane.out.events] == [(0, 1), (1, 1), (1, 2), (0, 2)]
    await publisher.aclose()


async def test_blocks_without_all_their_tokens_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """The event is published all the same, so that its number is not missing."""
    plane = ListPlane()
    publisher = await opened(plane)
    publisher.stored(token_ids=[1, 2, 3], block_hashes=[1])
    publisher.stored(token_ids=[1, 2, 3, 4, 5], block_hashes=[1, 2])
    publisher.stored(token_ids=[1, 2, 3, 4, 5], block_hashes=[1])
    await turn()
    assert [shape(event) for event in plane.out.events] == [(1, (None, [])), (2, (None, [1])), (3, (None, [1]))]
    assert publisher.statistics().suspicious == 2
    assert len(caplog.records) == 1
    await publisher.aclose()


@pytest.mark.parametrize(
    "report",
    [
        lambda sink: sink.stored(token_ids=[1, 2, 3, -4], block_hashes=[1]),
        lambda sink: sink.stored(token_ids=[1, 2, 3, 4], block_hashes=[2**64]),
        lambda sink: sink.stored(token_ids=[1, 2, 3, 4], block_hashes=[b"hash"]),
        lambda sink: sink.stored(token_ids=None, block_hashes=None),
        lambda sink: sink.stored(token_ids=[1, 2, 3, 4], block_hashes=[1], tier="tape"),
        lambda sink: sink.removed([1.5]),
        lambda sink: sink.removed([1], tier="tape"),
    ],
)
async def test_what_cannot_be_published_is_counted_and_does_not_raise(
    report: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    plane = ListPlane()
    publisher = await opened(plane)
    report(publisher)
    report(publisher)
    publisher.cleared()
    await turn()
    assert [shape(event) for event in plane.out.events] == [(1, "cleared")]
    assert publisher.statistics().rejected == 2
    assert len(caplog.records) == 1
    await publisher.aclose()


async def test_no_blocks_are_no_removal() -> None:
    plane = ListPlane()
    publisher = await opened(plane)
    publisher.removed([])
    publisher.removed([1])
    await turn()
    assert [shape(event) for event in plane.out.events] == [(1, [-1])]
    await publisher.aclose()


async def test_any_thread_may_report_and_order_is_kept() -> None:
    plane = ListPlane()
    publisher = await opened(plane)

    def report(base: int) -> None:
        for step in range(200):
            store(publisher, base + step)

    threads = [threading.Thread(target=report, args=(base,)) for base in (1000, 2000, 3000)]
    for thread in threads:
        thread.start()
    await eventually(lambda: len(plane.out.events) == 600)
    for thread in threads:
        thread.join(10)
    assert [event.event.event_id for event in plane.out.events] == list(range(1, 601))
    names = [stored_of(event).blocks[0].block_hash for event in plane.out.events]
    for base in (1000, 2000, 3000):
        assert [name for name in names if base <= name < base + 1000] == list(range(base, base + 200))
    assert publisher.statistics().queued == 0
    await publisher.aclose()


async def test_a_full_queue_drops_what_was_stored() -> None:
    plane = ListPlane()
    publisher = await opened(plane, capacity=3)
    store(publisher, 1, 2)
    store(publisher, 3, 4)
    store(publisher, 5)
    store(publisher, 6)
    assert publisher.statistics().queued == 2
    await turn()
    store(publisher, 7)
    await turn()
    assert [shape(event) for event in plane.out.events] == [(1, (None, [1, 2])), (2, (None, [5])), (3, (None, [7]))]
    assert publisher.statistics().dropped == 2
    await publisher.aclose()


async def test_a_lost_removal_clears_what_readers_know() -> None:
    plane = ListPlane()
    publisher = await opened(plane, capacity=3)
    store(publisher, 1, 2)
    store(publisher, 3, parent=2)
    publisher.removed([9])
    store(publisher, 4)
    await turn()
    assert [shape(event) for event in plane.out.events] == [(1, "cleared"), (2, (None, [4]))]
    assert publisher.statistics().dropped == 3
    await publisher.aclose()


async def test_a_long_queue_does_not_hold_up_the_loop() -> None:
    """4096 blocks a turn."""
    plane = ListPlane()
    publisher = await opened(plane)
    for first in range(1, 20_001, 1000):
        store(publisher, *range(first, first + 1000))
    await asyncio.sleep(0)
    assert len(plane.out.events) < 20
    await eventually(lambda: len(plane.out.events) == 20)
    await publisher.aclose()


async def test_closing_publishes_what_waits_and_drops_what_comes_later() -> None:
    plane = ListPlane()
    publisher = await opened(plane, batching=60.0)
    store(publisher, 1)
    store(publisher, 2, parent=1)
    store(publisher, 3, parent=2)
    await publisher.aclose()
    store(publisher, 4)
    await publisher.aclose()
    await turn()
    assert [shape(event) for event in plane.out.events] == [(1, (None, [1])), (2, (1, [2, 3]))]
    assert publisher.statistics().dropped == 1


def test_a_loop_that_is_gone_is_no_error() -> None:
    loop = asyncio.new_event_loop()
    publisher = loop.run_until_complete(opened(ListPlane()))
    loop.close()
    store(publisher, 1)
    store(publisher, 2)
    assert publisher.statistics().dropped == 1


@pytest.mark.parametrize("options", [{"block_size": 0}, {"capacity": 0}, {"batching": 0.0}, {"batching": float("nan")}])
async def test_bad_sizes_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        await opened(ListPlane(), **options)


# -- batching, on a clock of the test's


@contextmanager
def batched(**options: Any) -> Iterator[tuple[ManualLoop, KvPublisher, ListPublisher]]:
    loop, plane = ManualLoop(), ListPlane()
    publisher = loop.finish(opened(plane, **({"batching": 0.2} | options)))
    try:
        yield loop, publisher, plane.out
    finally:
        loop.finish(publisher.aclose())
        loop.close()


def test_the_first_leaves_at_once_and_the_next_are_merged() -> None:
    with batched() as (loop, publisher, out):
        store(publisher, 1)
        loop.turn()
        assert [shape(event) for event in out.events] == [(1, (None, [1]))]
        store(publisher, 2, parent=1)
        store(publisher, 3, parent=2)
        loop.pass_time(0.1)
        store(publisher, 4, 5, parent=3)
        loop.turn()
        assert len(out.events) == 1
        loop.pass_time(0.11)
        assert [shape(event) for event in out.events[1:]] == [(2, (1, [2, 3, 4, 5]))]
        assert [block.tokens_hash for block in stored_of(out.events[1]).blocks] == [
            local_hashes(tokens(name), block_size=BLOCK)[0] for name in (2, 3, 4, 5)
        ]


def test_after_a_silence_the_first_leaves_at_once_again() -> None:
    with batched() as (loop, publisher, out):
        store(publisher, 1)
        loop.pass_time(0.3)
        store(publisher, 2, parent=1)
        loop.turn()
        assert len(out.events) == 2
        store(publisher, 3, parent=2)
        loop.turn()
        assert len(out.events) == 2
        loop.pass_time(0.25)
        assert len(out.events) == 3
        store(publisher, 4, parent=3)
        loop.turn()
        assert len(out.events) == 3, "the last batch began another period"
        loop.pass_time(0.25)
        assert len(out.events) == 4


def test_what_does_not_fit_together_completes_the_batch() -> None:
    with batched() as (loop, publisher, out):
        store(publisher, 1)
        store(publisher, 2, parent=1)
        store(publisher, 3, parent=1)
        publisher.removed([2])
        publisher.removed([3, 1])
        publisher.removed([8], tier="disk")
        publisher.for_rank(1).removed([7])
        store(publisher, 4)
        store(publisher, 5)
        loop.pass_time(0.3)
        assert [content(event.event) for event in out.events] == [
            (None, [1]),
            (1, [2]),
            (1, [3]),
            [-2, -3, -1],
            [-8],
            [-7],
            (None, [4]),
            (None, [5]),
        ]
        assert [event.event.event_id for event in out.events if event.event.dp_rank == 0] == [1, 2, 3, 4, 5, 6, 7]


def test_a_cleared_cache_does_not_wait() -> None:
    with batched() as (loop, publisher, out):
        store(publisher, 1)
        store(publisher, 2, parent=1)
        publisher.cleared()
        loop.turn()
        assert [shape(event) for event in out.events] == [(1, (None, [1])), (2, (1, [2])), (3, "cleared")]


def test_a_batch_does_not_grow_for_ever() -> None:
    with batched() as (loop, publisher, out):
        store(publisher, 1)
        for name in range(2, 6002, 100):
            store(publisher, *range(name, name + 100), parent=name - 1)
        loop.pass_time(0.3)
        sizes = [len(stored_of(event).blocks) for event in out.events]
        assert sum(sizes) == 6001
        assert max(sizes) == 4000
