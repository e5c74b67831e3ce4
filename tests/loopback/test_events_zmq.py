"""The ZMQ plane is an event plane, with and without brokers; and what strangers on its wire can do to it."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from stator.discovery.memory import MemoryStore
from stator.errors import ConnectFailed, Unavailable
from stator.events import Channel, EventHost, EventsConfig, Gap
from stator.events.zmq import ZmqEvents, ZmqEventsConfig
from stator.protocol.event_frame import Event, decode_frames, encode_frames
from stator.protocol.records import EventChannelRecord, EventTransport, Record
from stator.testing.event_suite import (
    BLOCKS,
    LOAD,
    RECORDS,
    EventOutageSuite,
    EventSuite,
    Join,
    Member,
    Outage,
    eventually,
    link,
    member,
    numbered,
    open_files,
    payloads,
    silence,
    take,
)
from stator.testing.zmq_broker import ZmqBroker, zmq_broker

pytestmark = pytest.mark.timeout(60)

RECORDED = Path(__file__).parents[1] / "unit" / "recorded_event_frames.json"


def join(
    store: MemoryStore,
    config: ZmqEventsConfig | None = None,
    common: EventsConfig | None = None,
    *,
    bind: str = "127.0.0.1",
    advertise: str = "127.0.0.1",
) -> AbstractAsyncContextManager[Member]:
    """One more process."""

    def plane(host: EventHost) -> ZmqEvents:
        return ZmqEvents(
            config or ZmqEventsConfig(), host=msgspec.structs.replace(host, bind_host=bind, advertise_host=advertise)
        )

    return member(store, plane, common)


class TestZmqEvents(EventSuite):
    kind = "Zmq"
    counts_publishers = True

    @asynccontextmanager
    async def cluster(self) -> AsyncGenerator[Join, None]:
        store = MemoryStore()
        yield lambda common: join(store, common=common)


class TestZmqBroker(EventSuite, EventOutageSuite):
    scoped = False

    @asynccontextmanager
    async def cluster(self) -> AsyncGenerator[Join, None]:
        async with self.breakable() as (connect, _):
            yield connect

    @asynccontextmanager
    async def breakable(self) -> AsyncGenerator[tuple[Join, Outage], None]:
        store = MemoryStore()
        with zmq_broker() as broker:
            config = ZmqEventsConfig(broker=broker.setting, reconnect_first=0.02, reconnect_most=0.1)
            outage = Outage(begin=lambda: asyncio.to_thread(broker.stop), end=lambda: asyncio.to_thread(broker.start))
            yield (lambda common: join(store, config, common)), outage


# -- several brokers


@pytest.fixture
def brokers() -> Iterator[tuple[ZmqBroker, ZmqBroker]]:
    with zmq_broker() as one, zmq_broker() as other:
        yield one, other


async def test_of_several_brokers_each_message_is_taken_once_and_one_may_fail(brokers: tuple[ZmqBroker, ZmqBroker]) -> None:
    ends = [broker.endpoints for broker in brokers]
    config = ZmqEventsConfig(broker=f"xsub={ends[0][0]};{ends[1][0]}, xpub={ends[0][1]};{ends[1][1]}", reconnect_first=0.02)
    store = MemoryStore()
    async with join(store, config) as worker, join(store, config) as router:
        heard, publisher = await router.plane.subscribe(LOAD), await worker.plane.publisher(LOAD)
        await link(publisher, heard)
        for payload in numbered(500):
            publisher.publish(payload)
        assert payloads(await take(heard, 500)) == numbered(500)
        await silence(heard)
        await asyncio.to_thread(brokers[0].stop)
        for payload in numbered(500, "alone "):
            publisher.publish(payload)
        assert payloads(await take(heard, 500)) == numbered(500, "alone ")
        assert heard.statistics().gaps == 0


# -- strangers


class Stranger:
    """A PUB socket and a record made by hand."""

    def __init__(self, store: MemoryStore, publisher_id: int, channel: Channel = LOAD) -> None:
        self.id = publisher_id
        self._store = store
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channel = channel
        self.listen(0)
        self.announce({"endpoint": self.endpoint})

    def listen(self, port: int) -> None:
        self.socket = self._context.socket(zmq.PUB)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(f"tcp://127.0.0.1:{port}")
        self.endpoint = bytes(self.socket.get(zmq.LAST_ENDPOINT)).decode()

    def announce(self, config: dict[str, Any], kind: str = "Zmq") -> None:
        channel = self._channel
        record = EventChannelRecord(
            namespace=channel.namespace,
            component=channel.component,
            topic=channel.topic,
            instance_id=self.id,
            transport=EventTransport(kind=kind, config=config),
        )
        self._store.apply({record.key: record})

    def frames(self, sequence: int, payload: bytes, *, publisher_id: int | None = None) -> list[bytes]:
        id = self.id if publisher_id is None else publisher_id
        event = Event(publisher_id=id, sequence=sequence, published_at=1, topic=self._channel.topic, payload=payload)
        return list(encode_frames(event, event.topic.encode()))

    def send(self, frames: list[bytes]) -> None:
        self.socket.send_multipart(frames, zmq.DONTWAIT)

    async def linked(self, subscription: Any) -> None:
        """Send number 0 until it is heard once."""
        received = subscription.statistics().received
        async with asyncio.timeout(10):
            while subscription.statistics().received == received:
                self.send(self.frames(0, b"probe"))
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)
        while subscription.statistics().queued:
            await anext(subscription)

    def close(self) -> None:
        self._context.destroy(0)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def stranger(store: MemoryStore) -> Iterator[Stranger]:
    made = Stranger(store, 0x677AC896E91812F6)
    yield made
    made.close()


async def test_a_plain_socket_with_a_record_made_by_hand_is_heard(store: MemoryStore) -> None:
    message = next(m for m in json.loads(RECORDED.read_text("utf-8"))["messages"] if m["envelope"]["topic"] == "kv_metrics")
    frames = [bytes.fromhex(frame) for frame in message["zmq_frames_hex"]]
    peer = Stranger(store, int(message["envelope"]["publisher_id"]))
    try:
        async with join(store) as router, await router.plane.subscribe(LOAD) as heard:
            await peer.linked(heard)
            peer.send(frames)
            assert await take(heard, 1) == [decode_frames(frames)]
    finally:
        peer.close()


async def test_a_plain_subscriber_hears_four_frames(store: MemoryStore) -> None:
    async with join(store) as worker, await worker.plane.publisher(BLOCKS) as publisher:
        record = (await worker.discovery.list(RECORDS))[0]
        assert isinstance(record, EventChannelRecord)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        listener = context.socket(zmq.SUB)
        try:
            listener.set(zmq.SUBSCRIBE, b"kv-events")
            listener.connect(record.transport.config["endpoint"])
            async with asyncio.timeout(10):
                while not listener.poll(0):
                    publisher.publish(b"hello")
                    await asyncio.sleep(0.02)
            frames = listener.recv_multipart()
            event = decode_frames(frames)
            assert frames == list(encode_frames(event, b"kv-events"))
            assert (event.publisher_id, event.topic, event.payload) == (publisher.publisher_id, "kv-events", b"hello")
            assert frames[1] == publisher.publisher_id.to_bytes(8, "big")
        finally:
            context.destroy(0)


async def test_what_makes_no_sense_is_counted_and_dropped(
    store: MemoryStore, stranger: Stranger, caplog: pytest.LogCaptureFixture
) -> None:
    async with join(store) as router, await router.plane.subscribe(LOAD) as heard:
        await stranger.linked(heard)
        good = stranger.frames(1, b"good")
        broken = [
            [b"kv_metrics"],
            [b"kv_metrics", b"", b"", b""],
            good[:3],
            [*good, b"more"],
            [*good, *[b"x"] * 5000],
            [*good[:3], good[3][:-3]],
            [*good[:3], b"\x07" + good[3][1:]],
            [b"kv_metrics", *stranger.frames(0, b"", publisher_id=stranger.id)[1:3], b"\x01\0\0\0\x01\xc1"],
            stranger.frames(1, b"an impostor", publisher_id=99),
        ]
        other_topics = [[b"kv_metrics_2", b""], [b"kv_metrics longer", *good[1:]]]
        for frames in broken + other_topics:
            stranger.send(frames)
        stranger.send(good)
        assert payloads(await take(heard, 1)) == [b"good"]
        assert heard.statistics().malformed == len(broken)
        assert heard.statistics().gaps == 0
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1  # the first of them


async def test_an_address_that_passed_to_another_publisher(store: MemoryStore) -> None:
    """The record is stale, the port is somebody else's now: another namespace, the same topic."""
    async with join(store) as worker, join(store) as router:
        elsewhere = Channel(namespace="other", topic=LOAD.topic)
        publisher = await worker.plane.publisher(elsewhere)
        right = await router.plane.subscribe(elsewhere)
        record = next(iter(store.records.values()))
        assert isinstance(record, EventChannelRecord)
        stale = msgspec.structs.replace(record, namespace=LOAD.namespace, instance_id=4711)
        store.apply({stale.key: stale})
        heard = await router.plane.subscribe(LOAD)
        await link(publisher, right)
        await eventually(lambda: _speaks(publisher) or heard.statistics().malformed > 0, "the wrong one is heard")
        assert heard.statistics().received == 0


def _speaks(publisher: Any) -> bool:
    publisher.publish(b"not for you")
    return False


async def test_a_gap_on_the_wire(store: MemoryStore, stranger: Stranger) -> None:
    gaps: list[Gap] = []
    async with join(store) as router, await router.plane.subscribe(LOAD, on_gap=gaps.append) as heard:
        await stranger.linked(heard)
        for number in (1, 2, 5, 6, 3, 4, 0, 1, 9):
            stranger.send(stranger.frames(number, str(number).encode()))
        await take(heard, 8)
        assert gaps == [Gap(publisher_id=stranger.id, expected=3, found=5)]  # lower numbers begin anew
        await take(heard, 1)
        assert gaps[1:] == [Gap(publisher_id=stranger.id, expected=2, found=9)]
        assert heard.statistics().gaps == 2


async def test_a_message_above_the_limit_is_dropped(store: MemoryStore, stranger: Stranger) -> None:
    async with join(store, common=EventsConfig(max_payload=10_000)) as router, await router.plane.subscribe(LOAD) as heard:
        await stranger.linked(heard)
        stranger.send(stranger.frames(1, bytes(20_000)))
        stranger.send(stranger.frames(2, bytes(10_000)))
        assert payloads(await take(heard, 1)) == [bytes(10_000)]
        assert heard.statistics().malformed == 1


async def test_a_message_far_above_the_limit_is_not_even_received(store: MemoryStore, stranger: Stranger) -> None:
    async with join(store) as worker, join(store, common=EventsConfig(max_payload=10_000)) as router:
        heard, publisher = await router.plane.subscribe(LOAD), await worker.plane.publisher(LOAD)
        await link(publisher, heard)
        await stranger.linked(heard)
        stranger.send(stranger.frames(1, bytes(1_000_000)))
        stranger.send(stranger.frames(2, b"its connection is gone"))
        publisher.publish(b"undisturbed")
        assert payloads(await take(heard, 1)) == [b"undisturbed"]
        await silence(heard)
        assert heard.statistics().malformed == 0


async def test_a_publisher_that_vanished_is_connected_to_again(store: MemoryStore, stranger: Stranger) -> None:
    async with (
        join(store, ZmqEventsConfig(reconnect_first=0.02, reconnect_most=0.05)) as router,
        await router.plane.subscribe(LOAD) as heard,
    ):
        for _ in range(2):
            await stranger.linked(heard)
            port = int(stranger.endpoint.rpartition(":")[2])
            stranger.socket.close(0)
            await asyncio.sleep(0.1)
            async with asyncio.timeout(10):
                while True:
                    try:
                        stranger.listen(port)
                        break
                    except zmq.ZMQError:
                        await asyncio.sleep(0.02)
        await stranger.linked(heard)
        assert heard.statistics().publishers == 1


async def test_an_address_that_changes(store: MemoryStore, stranger: Stranger) -> None:
    async with join(store) as router, await router.plane.subscribe(LOAD) as heard:
        await stranger.linked(heard)
        old = stranger.socket
        stranger.listen(0)
        old.close(0)
        stranger.announce({"endpoint": stranger.endpoint})
        await stranger.linked(heard)
        assert heard.statistics().publishers == 1


async def test_two_publishers_at_one_address(store: MemoryStore, stranger: Stranger) -> None:
    """Nobody does that; but a record that goes must not take the other's connection along."""
    second = Stranger(store, 2)
    try:
        second.announce({"endpoint": stranger.endpoint})
        async with join(store) as router, await router.plane.subscribe(LOAD) as heard:
            await stranger.linked(heard)
            assert heard.statistics().publishers == 2
            key = next(key for key in store.records if key.id == 2)
            store.apply({key: None})
            await eventually(lambda: heard.statistics().publishers == 1, "the record is gone")
            stranger.send(stranger.frames(1, b"still here"))
            assert payloads(await take(heard, 1)) == [b"still here"]
    finally:
        second.close()


@pytest.mark.parametrize(
    ("kind", "config", "text"),
    [
        ("Nats", {"subject_prefix": "namespace.demo"}, "speaks Nats"),
        ("Zmq", {}, "speaks Zmq"),
        ("Zmq", {"endpoint": 7}, "speaks Zmq"),
        ("Zmq", {"endpoint": "inproc://x"}, "speaks Zmq"),
        ("Zmq", {"endpoint": "tcp://"}, "is no address"),
        ("Zmq", {"endpoint": "tcp://127.0.0.1"}, "is no address"),
    ],
)
async def test_a_record_that_does_not_lead_anywhere(
    store: MemoryStore, kind: str, config: dict[str, Any], text: str, stranger: Stranger, caplog: pytest.LogCaptureFixture
) -> None:
    async with join(store) as router, await router.plane.subscribe(LOAD) as heard:
        await stranger.linked(heard)
        lost = Stranger(store, 2)
        try:
            lost.announce(config, kind)
            await eventually(lambda: text in caplog.text, "it is said")
        finally:
            lost.close()
        stranger.send(stranger.frames(1, b"others are heard"))
        assert payloads(await take(heard, 1)) == [b"others are heard"]
        assert heard.statistics().publishers == 1


# -- slow and absent peers


async def test_a_subscriber_that_does_not_read_disturbs_nobody(store: MemoryStore) -> None:
    async with join(store, ZmqEventsConfig(send_queue=1000)) as worker, join(store) as router:
        publisher, heard = await worker.plane.publisher(LOAD), await router.plane.subscribe(LOAD)
        await link(publisher, heard)
        record = next(iter(store.records.values()))
        assert isinstance(record, EventChannelRecord)
        port = int(record.transport.config["endpoint"].rpartition(":")[2])
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stuck = context.socket(zmq.SUB)
        try:
            stuck.set(zmq.RCVHWM, 1)
            stuck.set(zmq.RCVBUF, 4096)
            stuck.set(zmq.SUBSCRIBE, b"")
            stuck.connect(f"tcp://127.0.0.1:{port}")
            async with asyncio.timeout(10):
                while not stuck.poll(0):
                    publisher.publish(b"probe")
                    await asyncio.sleep(0.01)
            body = bytes(1000)
            for number in range(20_000):  # 20 MB: far more than the kernel's buffers and the queue hold
                publisher.publish(b"%d " % number + body)
                if number % 100 == 99:
                    heard_now = await take(heard, 100)
                    assert heard_now[-1].payload.startswith(b"%d " % number)
            assert publisher.statistics().dropped == 0  # ZMQ drops for that one subscriber and does not say so
            assert heard.statistics().gaps == 0
        finally:
            context.destroy(0)


async def test_connections_that_speak_no_zmq_are_harmless(store: MemoryStore) -> None:
    async with join(store) as worker, join(store) as router:
        publisher, heard = await worker.plane.publisher(LOAD), await router.plane.subscribe(LOAD)
        await link(publisher, heard)
        record = next(iter(store.records.values()))
        assert isinstance(record, EventChannelRecord)
        port = int(record.transport.config["endpoint"].rpartition(":")[2])
        for junk in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" * 1000,
            b"\xff\0\0\0\0\0\0\0\x01\x7f\x03" + bytes(53) + b"\x02" + b"\x7f" * 8,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(junk)
            await writer.drain()
            publisher.publish(junk)
            assert payloads(await take(heard, 1)) == [junk]
            writer.transport.abort()
            del reader


# -- addresses


@pytest.mark.parametrize("bind", ["0.0.0.0", "*", "localhost"])
async def test_where_a_publisher_listens_and_what_it_says(store: MemoryStore, bind: str) -> None:
    async with join(store, bind=bind, advertise="127.0.0.1") as worker, join(store) as router:
        publisher, heard = await worker.plane.publisher(LOAD), await router.plane.subscribe(LOAD)
        record = next(iter(store.records.values()))
        assert isinstance(record, EventChannelRecord)
        assert record.transport.config["endpoint"].startswith("tcp://127.0.0.1:")
        await link(publisher, heard)


@pytest.mark.usefixtures("ipv6")
async def test_version_6_of_the_internet_protocol(store: MemoryStore) -> None:
    async with join(store, bind="::1", advertise="::1") as worker, join(store) as router:
        publisher, heard = await worker.plane.publisher(LOAD), await router.plane.subscribe(LOAD)
        record = next(iter(store.records.values()))
        assert isinstance(record, EventChannelRecord)
        assert record.transport.config["endpoint"].startswith("tcp://[::1]:")
        await link(publisher, heard)


@pytest.mark.parametrize("bind", ["192.0.2.1", "no-such-host.invalid"])
async def test_an_address_that_cannot_be_bound(store: MemoryStore, bind: str) -> None:
    async with join(store, bind=bind) as worker:
        await worker.plane.subscribe(LOAD)  # loads the library
        files = open_files()
        with pytest.raises(ConnectFailed, match="cannot listen"):
            await worker.plane.publisher(LOAD)
        await eventually(lambda: open_files() == files, "the socket is closed")
        assert await worker.discovery.list(RECORDS) == []


async def test_a_publisher_that_discovery_refuses_is_none(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async with join(store) as worker:
        await worker.plane.subscribe(LOAD)
        files = open_files()

        async def refuse(record: Record) -> bool:
            raise Unavailable("the backend is away")

        monkeypatch.setattr(worker.discovery, "register", refuse)
        with pytest.raises(Unavailable):
            await worker.plane.publisher(LOAD)
        await eventually(lambda: open_files() == files, "the socket is closed")
