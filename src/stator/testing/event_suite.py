"""What every event plane must do: subclass `EventSuite`, say how processes join a cluster, and pytest collects the cases.

    class TestMemoryEvents(EventSuite):
        kind = "Memory"

        @asynccontextmanager
        async def cluster(self):
            store = MemoryStore()
            yield lambda config: member(store, lambda host: MemoryEvents(MemoryEventsConfig(), host=host), config)

Planes with something between publisher and subscriber that can go away subclass `EventOutageSuite` as well.
"""

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random, SystemRandom
from typing import ClassVar

import msgspec
import pytest

from stator.discovery.interface import Discovery
from stator.discovery.memory import MemoryDiscovery, MemoryStore
from stator.errors import UsageError
from stator.events import (
    Channel,
    Event,
    EventHost,
    EventPlane,
    EventPublisher,
    EventsConfig,
    Gap,
    Subscription,
)
from stator.protocol.records import EventChannelRecord, Query
from stator.tasks import SystemClock

__all__ = ["EventOutageSuite", "EventSuite", "Join", "Member", "Outage", "drain", "link", "member", "take"]

LOAD = Channel(namespace="demo", topic="kv_metrics")
BLOCKS = Channel(namespace="demo", component="backend", topic="kv-events")
RECORDS = Query(EventChannelRecord.bucket)
PROBE = b"probe"
WITHIN = 20.0
"""seconds for anything to happen"""


class Member(msgspec.Struct, kw_only=True):
    """One process of the cluster."""

    plane: EventPlane
    discovery: Discovery


Join = Callable[[EventsConfig | None], AbstractAsyncContextManager[Member]]
"""One more process of the cluster, with these settings."""


@asynccontextmanager
async def member(
    store: MemoryStore, open_plane: Callable[[EventHost], EventPlane], config: EventsConfig | None = None
) -> AsyncGenerator[Member, None]:
    """A process that finds the others through `store`; its plane is closed at the end, then its discovery."""
    clock, random = SystemClock(), Random(SystemRandom().getrandbits(64))
    async with MemoryDiscovery(store, clock=clock, random=random) as discovery:
        plane = open_plane(EventHost(discovery=discovery, clock=clock, random=random, config=config or EventsConfig()))
        try:
            yield Member(plane=plane, discovery=discovery)
        finally:
            await plane.aclose()


async def take(subscription: Subscription, count: int) -> list[Event]:
    """The next messages, probes left out; AssertionError when they do not come."""
    events: list[Event] = []
    try:
        async with asyncio.timeout(WITHIN):
            while len(events) < count:
                event = await anext(subscription)
                if not event.payload.startswith(PROBE):
                    events.append(event)
    except TimeoutError:
        raise AssertionError(f"{len(events)} of {count} messages within {WITHIN} s: {subscription.statistics()}") from None
    return events


async def drain(subscription: Subscription) -> list[Event]:
    """What waits there now."""
    return [await anext(subscription) for _ in range(subscription.statistics().queued)]


async def link(publisher: EventPublisher, *subscriptions: Subscription) -> None:
    """Publish probes until all subscriptions hear this publisher and nothing of it is on its way."""
    for subscription in subscriptions:
        last = b""
        async with asyncio.timeout(WITHIN):
            while True:
                last = PROBE + str(publisher.statistics().published).encode()
                publisher.publish(last)
                if await _heard(subscription, publisher, last):
                    break
    for subscription in subscriptions:
        await drain(subscription)


async def _heard(subscription: Subscription, publisher: EventPublisher, payload: bytes) -> bool:
    try:
        async with asyncio.timeout(0.05):
            async for event in subscription:
                if event.publisher_id == publisher.publisher_id and event.payload == payload:
                    return True
    except TimeoutError:
        pass
    return False


async def silence(*subscriptions: Subscription, seconds: float = 0.2) -> None:
    """AssertionError if one of them hears anything but probes."""
    await asyncio.sleep(seconds)
    for subscription in subscriptions:
        heard = [event for event in await drain(subscription) if not event.payload.startswith(PROBE)]
        assert not heard, f"unexpected {heard}"


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition()` holds."""
    deadline = asyncio.get_running_loop().time() + WITHIN
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"{what}: not within {WITHIN} s"
        await asyncio.sleep(0.005)


def payloads(events: list[Event]) -> list[bytes]:
    """What they carry."""
    return [event.payload for event in events]


def numbered(count: int, prefix: str = "") -> list[bytes]:
    """Payloads that tell their place."""
    return [f"{prefix}{number}".encode() for number in range(count)]


def open_files() -> int:
    """Descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


class EventSuite(ABC):
    """The cases for every plane."""

    kind: ClassVar[str] = ""
    """transport kind of the records that publishers write; "" if they write none"""
    scoped: ClassVar[bool] = True
    """whether the same topic of another scope is told apart"""
    counts_publishers: ClassVar[bool] = False
    """whether `publishers` follows those that come and go before they say anything"""

    @abstractmethod
    def cluster(self) -> AbstractAsyncContextManager[Join]:
        """A fresh cluster."""

    # -- what arrives

    async def test_a_message_arrives_as_it_was_published(self) -> None:
        async with (
            self.cluster() as join,
            join(None) as worker,
            join(None) as router,
            await router.plane.subscribe(BLOCKS) as heard,
            await worker.plane.publisher(BLOCKS) as publisher,
        ):
            await link(publisher, heard)
            sent = publisher.statistics().published
            before = SystemClock().wall() * 1000
            publisher.publish(b"\x00\xff payload")
            event = (await take(heard, 1))[0]
            assert event.payload == b"\x00\xff payload"
            assert (event.publisher_id, event.sequence) == (publisher.publisher_id, sent)
            assert event.topic == BLOCKS.topic
            assert before - 5 <= event.published_at <= SystemClock().wall() * 1000 + 5

    async def test_messages_of_a_publisher_are_in_order_whoever_else_speaks(self) -> None:
        async with self.cluster() as join, join(None) as one, join(None) as other, join(None) as router:
            heard = await router.plane.subscribe(LOAD)
            publishers = [await one.plane.publisher(LOAD), await one.plane.publisher(LOAD), await other.plane.publisher(LOAD)]
            for publisher in publishers:
                await link(publisher, heard)
            first = {publisher.publisher_id: publisher.statistics().published for publisher in publishers}
            assert len(first) == 3
            for number in range(300):
                for publisher in publishers:
                    publisher.publish(str(number).encode())
                if number % 50 == 0:
                    await asyncio.sleep(0)
            by_publisher: dict[int, list[Event]] = {}
            for event in await take(heard, 900):
                by_publisher.setdefault(event.publisher_id, []).append(event)
            for id, events in by_publisher.items():
                assert payloads(events) == numbered(300)
                assert [event.sequence for event in events] == list(range(first[id], first[id] + 300))
            assert heard.statistics().gaps == 0

    async def test_everybody_who_listens_hears_everything(self) -> None:
        async with self.cluster() as join, join(None) as worker, join(None) as router, join(None) as frontend:
            ears = [
                await router.plane.subscribe(LOAD),
                await router.plane.subscribe(LOAD),
                await frontend.plane.subscribe(LOAD),
            ]
            publisher = await worker.plane.publisher(LOAD)
            await link(publisher, *ears)
            for payload in numbered(50):
                publisher.publish(payload)
            for heard in ears:
                assert payloads(await take(heard, 50)) == numbered(50)

    async def test_a_process_hears_itself(self) -> None:
        async with self.cluster() as join, join(None) as alone:
            heard, publisher = await alone.plane.subscribe(LOAD), await alone.plane.publisher(LOAD)
            await link(publisher, heard)
            publisher.publish(b"echo")
            assert payloads(await take(heard, 1)) == [b"echo"]

    async def test_a_late_subscriber_hears_what_comes_and_misses_nothing_it_was_promised(self) -> None:
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            publisher = await worker.plane.publisher(LOAD)
            early = await router.plane.subscribe(LOAD)
            await link(publisher, early)
            for payload in numbered(20):
                publisher.publish(payload)
            await take(early, 20)
            late = await router.plane.subscribe(LOAD)
            await link(publisher, late)
            publisher.publish(b"new")
            assert payloads(await take(late, 1)) == [b"new"]
            assert late.statistics().gaps == 0

    async def test_publishers_come_and_go(self) -> None:
        async with self.cluster() as join, join(None) as router:
            heard = await router.plane.subscribe(LOAD)
            ids: set[int] = set()
            for name in ("first", "second", "third"):
                async with join(None) as worker, await worker.plane.publisher(LOAD) as publisher:
                    await link(publisher, heard)
                    for payload in numbered(10, name):
                        publisher.publish(payload)
                    assert payloads(await take(heard, 10)) == numbered(10, name)
                    ids.add(publisher.publisher_id)
                    if self.counts_publishers:
                        assert heard.statistics().publishers == 1
                if self.counts_publishers:
                    await eventually(lambda: heard.statistics().publishers == 0, "the publisher is gone")
            assert len(ids) == 3  # each is new, and its numbers begin anew
            assert heard.statistics().gaps == 0

    async def test_publishers_that_were_there_before_are_heard(self) -> None:
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            publishers = [await worker.plane.publisher(LOAD) for _ in range(5)]
            heard = await router.plane.subscribe(LOAD)
            for publisher in publishers:
                await link(publisher, heard)
            if self.counts_publishers:
                assert heard.statistics().publishers == 5

    async def test_subscribers_come_and_go(self) -> None:
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            publisher, staying = await worker.plane.publisher(LOAD), await router.plane.subscribe(LOAD)
            for name in ("a", "b"):
                async with join(None) as other, await other.plane.subscribe(LOAD) as passing:
                    await link(publisher, staying, passing)
                    publisher.publish(name.encode())
                    assert payloads(await take(passing, 1)) == payloads(await take(staying, 1)) == [name.encode()]
            publisher.publish(b"still here")
            assert payloads(await take(staying, 1)) == [b"still here"]
            assert staying.statistics().gaps == 0

    async def test_channels_do_not_mix(self) -> None:
        channels = [
            LOAD,
            Channel(namespace="demo", topic="kv_metrics_2"),
            Channel(namespace="demo", topic="kv"),
            *(
                [
                    Channel(namespace="demo", component="backend", topic="kv_metrics"),
                    Channel(namespace="demo", component="kv_metrics", topic="kv_metrics"),
                    Channel(namespace="demo.nested", topic="kv_metrics"),
                    Channel(namespace="other", topic="kv_metrics"),
                ]
                if self.scoped
                else []
            ),
        ]
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            publishers = [await worker.plane.publisher(channel) for channel in channels]
            ears = [await router.plane.subscribe(channel) for channel in channels]
            for publisher, heard in zip(publishers, ears, strict=True):
                await link(publisher, heard)
            for channel, publisher in zip(channels, publishers, strict=True):
                publisher.publish(str(channel).encode())
            for channel, heard in zip(channels, ears, strict=True):
                assert payloads(await take(heard, 1)) == [str(channel).encode()]
            await silence(*ears)
            assert [heard.statistics().malformed for heard in ears] == [0] * len(ears)

    async def test_a_large_message(self) -> None:
        payload = bytes(range(256)) * 4096  # 1 MiB
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            heard, publisher = await router.plane.subscribe(BLOCKS), await worker.plane.publisher(BLOCKS)
            await link(publisher, heard)
            for _ in range(3):
                publisher.publish(payload)
            publisher.publish(b"")
            assert payloads(await take(heard, 4)) == [payload, payload, payload, b""]

    async def test_a_burst(self) -> None:
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            heard, publisher = await router.plane.subscribe(BLOCKS), await worker.plane.publisher(BLOCKS)
            await link(publisher, heard)
            received = heard.statistics().received
            for payload in numbered(10_000):
                publisher.publish(payload)
            assert payloads(await take(heard, 10_000)) == numbered(10_000)
            assert publisher.statistics().dropped == publisher.statistics().queued == 0
            after = heard.statistics()
            assert (after.received - received, after.dropped, after.gaps, after.queued) == (10_000, 0, 0, 0)

    # -- what is refused

    async def test_a_message_above_the_limit_is_the_callers_mistake(self) -> None:
        config = EventsConfig(max_payload=2000)
        async with self.cluster() as join, join(config) as worker, join(config) as router:
            heard, publisher = await router.plane.subscribe(LOAD), await worker.plane.publisher(LOAD)
            await link(publisher, heard)
            with pytest.raises(UsageError, match=r"2001 bytes.*more than the 2000"):
                publisher.publish(bytes(2001))
            publisher.publish(bytes(2000))
            assert payloads(await take(heard, 1)) == [bytes(2000)]
            assert heard.statistics().gaps == 0  # what was never taken has no number

    @pytest.mark.parametrize("capacity", [0, -1])
    async def test_a_queue_holds_something(self, capacity: int) -> None:
        async with self.cluster() as join, join(None) as router:
            with pytest.raises(UsageError, match="capacity"):
                await router.plane.subscribe(LOAD, capacity=capacity)

    # -- full queues and gaps

    async def test_a_full_queue_drops_the_oldest(self) -> None:
        gaps: list[Gap] = []
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            heard = await router.plane.subscribe(LOAD, capacity=10, on_gap=gaps.append)
            publisher = await worker.plane.publisher(LOAD)
            await link(publisher, heard)
            before, expected = heard.statistics(), publisher.statistics().published
            gaps.clear()
            for payload in numbered(30):
                publisher.publish(payload)
            await eventually(lambda: heard.statistics().received == before.received + 30, "all have arrived")
            after = heard.statistics()
            assert (after.dropped - before.dropped, after.queued) == (20, 10)
            assert gaps == []  # said when the reader comes to it
            assert payloads(await take(heard, 10)) == numbered(30)[20:]
            assert gaps == [Gap(publisher_id=publisher.publisher_id, expected=expected, found=expected + 20)]
            assert heard.statistics().gaps == before.gaps + 1

    async def test_a_full_queue_drops_the_newest(self) -> None:
        gaps: list[Gap] = []
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            heard = await router.plane.subscribe(LOAD, capacity=10, overflow="drop_newest", on_gap=gaps.append)
            publisher = await worker.plane.publisher(LOAD)
            await link(publisher, heard)
            before, expected = heard.statistics(), publisher.statistics().published
            gaps.clear()
            for payload in numbered(30):
                publisher.publish(payload)
            await eventually(lambda: heard.statistics().received == before.received + 30, "all have arrived")
            assert heard.statistics().dropped - before.dropped == 20
            assert payloads(await take(heard, 10)) == numbered(10)
            assert gaps == []
            publisher.publish(b"next")
            assert payloads(await take(heard, 1)) == [b"next"]
            assert gaps == [Gap(publisher_id=publisher.publisher_id, expected=expected + 10, found=expected + 30)]

    async def test_a_queue_is_bounded_in_bytes(self) -> None:
        config = EventsConfig(queue_bytes=10_000)
        async with self.cluster() as join, join(None) as worker, join(config) as router:
            heard, publisher = await router.plane.subscribe(LOAD), await worker.plane.publisher(LOAD)
            await link(publisher, heard)
            before = heard.statistics()
            for size in (4000, 4001, 4002, 20_000):
                publisher.publish(bytes(size))
            await eventually(lambda: heard.statistics().received == before.received + 4, "all have arrived")
            assert heard.statistics().queued == 1  # one may always wait, however large
            assert [len(payload) for payload in payloads(await take(heard, 1))] == [20_000]
            publisher.publish(bytes(4003))
            publisher.publish(bytes(4004))
            assert [len(payload) for payload in payloads(await take(heard, 2))] == [4003, 4004]

    async def test_what_a_gap_calls_may_fail(self, caplog: pytest.LogCaptureFixture) -> None:
        def fail(gap: Gap) -> None:
            raise ValueError("not today")

        async with self.cluster() as join, join(None) as worker, join(None) as router:
            heard = await router.plane.subscribe(LOAD, capacity=1, on_gap=fail)
            publisher = await worker.plane.publisher(LOAD)
            await link(publisher, heard)
            received = heard.statistics().received
            for payload in numbered(5):
                publisher.publish(payload)
            await eventually(lambda: heard.statistics().received == received + 5, "all have arrived")
            assert payloads(await take(heard, 1)) == [b"4"]
            assert "not today" in caplog.text

    # -- nobody there

    async def test_a_publisher_that_nobody_hears(self) -> None:
        async with self.cluster() as join, join(None) as worker:
            publisher = await worker.plane.publisher(LOAD)
            for payload in numbered(2000):
                publisher.publish(payload)
            await eventually(lambda: publisher.statistics().queued == 0, "nothing waits")
            assert publisher.statistics().published == 2000
            assert publisher.statistics().dropped == 0

    async def test_a_subscription_that_nobody_speaks_to(self) -> None:
        async with self.cluster() as join, join(None) as router:
            heard = await router.plane.subscribe(LOAD)
            await silence(heard)
            statistics = heard.statistics()
            assert (statistics.received, statistics.publishers, statistics.queued) == (0, 0, 0)

    # -- waiting

    async def test_a_cancelled_wait_loses_nothing(self) -> None:
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            heard, publisher = await router.plane.subscribe(LOAD), await worker.plane.publisher(LOAD)
            await link(publisher, heard)
            found: list[bytes] = []
            for payload in numbered(40):
                publisher.publish(payload)
                waiting = asyncio.ensure_future(anext(heard))  # noqa: TID251 - the kit cancels it by hand
                for _ in range(int(payload) % 4):
                    await asyncio.sleep(0)
                waiting.cancel()
                try:
                    found.append((await waiting).payload)
                except asyncio.CancelledError:
                    pass
            found += payloads(await take(heard, 40 - len(found)))
            assert found == numbered(40)

    async def test_one_reader_at_a_time(self) -> None:
        async with self.cluster() as join, join(None) as router:
            heard = await router.plane.subscribe(LOAD)
            first = asyncio.ensure_future(anext(heard))  # noqa: TID251 - the kit ends it by hand
            await asyncio.sleep(0)
            with pytest.raises(UsageError, match="one task at a time"):
                await anext(heard)
            await heard.aclose()
            with pytest.raises(StopAsyncIteration):
                await first

    # -- the end

    async def test_closing_ends_the_iteration(self) -> None:
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            heard, publisher = await router.plane.subscribe(LOAD), await worker.plane.publisher(LOAD)
            await link(publisher, heard)
            reader = asyncio.ensure_future(anext(heard))  # noqa: TID251 - the kit awaits it by hand
            await asyncio.sleep(0)
            await heard.aclose()
            await heard.aclose()
            with pytest.raises(StopAsyncIteration):
                await reader
            assert [event async for event in heard] == []
            publisher.publish(b"into the void")

    async def test_a_closed_publisher_drops(self) -> None:
        async with self.cluster() as join, join(None) as worker:
            publisher = await worker.plane.publisher(LOAD)
            await publisher.aclose()
            await publisher.aclose()
            publisher.publish(b"late")
            assert publisher.statistics().dropped == publisher.statistics().published == 1

    async def test_a_closed_plane_has_closed_its_parts_and_opens_no_more(self) -> None:
        async with self.cluster() as join, join(None) as worker:
            heard, publisher = await worker.plane.subscribe(LOAD), await worker.plane.publisher(LOAD)
            await link(publisher, heard)
            await worker.plane.aclose()
            await worker.plane.aclose()
            assert [event async for event in heard] == []
            publisher.publish(b"late")
            assert publisher.statistics().dropped == 1
            assert await worker.discovery.list(RECORDS) == []
            with pytest.raises(UsageError, match="closed"):
                await worker.plane.publisher(LOAD)
            with pytest.raises(UsageError, match="closed"):
                await worker.plane.subscribe(LOAD)

    async def test_publishers_are_in_discovery_as_long_as_they_live(self) -> None:
        async with self.cluster() as join, join(None) as worker, join(None) as router:
            one, two = await worker.plane.publisher(LOAD), await worker.plane.publisher(BLOCKS)
            listed = await router.discovery.list(RECORDS)
            if not self.kind:
                assert listed == []
                return
            expected = {(LOAD, one.publisher_id), (BLOCKS, two.publisher_id)}
            assert {_identity(record) for record in listed if isinstance(record, EventChannelRecord)} == expected
            assert {record.transport.kind for record in listed if isinstance(record, EventChannelRecord)} == {self.kind}
            await one.aclose()
            assert [record.key.id for record in await router.discovery.list(RECORDS)] == [two.publisher_id]
            await worker.plane.aclose()
            assert await router.discovery.list(RECORDS) == []

    async def test_nothing_is_left(self) -> None:
        async def live() -> None:
            async with self.cluster() as join, join(None) as worker, join(None) as router:
                publishers = [await worker.plane.publisher(channel) for channel in (LOAD, BLOCKS, LOAD)]
                ears = [await router.plane.subscribe(channel) for channel in (LOAD, BLOCKS)]
                await link(publishers[0], ears[0])
                await link(publishers[1], ears[1])
                for payload in numbered(100):
                    publishers[0].publish(payload)
                await ears[0].aclose()
                await publishers[1].aclose()

        await live()  # what is loaded and started once per process
        tasks, files = len(asyncio.all_tasks()), open_files()
        await live()
        assert len(asyncio.all_tasks()) == tasks
        assert open_files() == files

    async def test_a_plane_that_was_not_used_costs_nothing(self) -> None:
        async with self.cluster() as join:
            tasks, files = len(asyncio.all_tasks()), open_files()
            async with join(None):
                assert (len(asyncio.all_tasks()), open_files()) == (tasks, files)


def _identity(record: EventChannelRecord) -> tuple[Channel, int]:
    return Channel(namespace=record.namespace, component=record.component, topic=record.topic), record.instance_id


class Outage(msgspec.Struct, kw_only=True):
    """What is between publishers and subscribers, taken away and brought back."""

    begin: Callable[[], Awaitable[object]]
    end: Callable[[], Awaitable[object]]


class EventOutageSuite(ABC):
    """The cases for planes over a broker."""

    @abstractmethod
    def breakable(self) -> AbstractAsyncContextManager[tuple[Join, Outage]]:
        """A fresh cluster, and how to break it."""

    async def test_publishing_while_it_is_away_neither_waits_nor_fails_and_recovers_by_itself(self) -> None:
        async with self.breakable() as (join, outage), join(None) as worker, join(None) as router:
            heard, publisher = await router.plane.subscribe(LOAD), await worker.plane.publisher(LOAD)
            for _ in range(2):
                await link(publisher, heard)
                await outage.begin()
                for payload in numbered(500):
                    publisher.publish(payload)
                    await asyncio.sleep(0)
                await outage.end()
            await link(publisher, heard)
            publisher.publish(b"again")
            assert payloads(await take(heard, 1)) == [b"again"]

    async def test_what_is_opened_while_it_is_away_works_once_it_is_there(self) -> None:
        async with self.breakable() as (join, outage), join(None) as worker, join(None) as router:
            await outage.begin()
            async with asyncio.timeout(WITHIN):
                heard, publisher = await router.plane.subscribe(LOAD), await worker.plane.publisher(LOAD)
            publisher.publish(b"early")
            await outage.end()
            await link(publisher, heard)

    async def test_closing_while_it_is_away_does_not_hang(self) -> None:
        async with self.breakable() as (join, outage):
            async with join(None) as worker:
                heard, publisher = await worker.plane.subscribe(LOAD), await worker.plane.publisher(LOAD)
                await link(publisher, heard)
                await outage.begin()
                publisher.publish(b"lost")
                async with asyncio.timeout(WITHIN):
                    await worker.plane.aclose()
                assert await worker.discovery.list(RECORDS) == []
            await outage.end()
