"""The NATS plane is an event plane, over a real server; and what a server can do to it."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import nats
import pytest

from stator.discovery.memory import MemoryStore
from stator.errors import UsageError
from stator.events import Channel, EventHost, EventsConfig
from stator.events.nats import NatsConfig, NatsEvents
from stator.protocol.event_frame import Event, decode_envelope, encode_envelope
from stator.protocol.records import EventChannelRecord
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
    payloads,
    silence,
    take,
)
from stator.testing.nats_server import NatsServer, nats_server

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as running:
        yield running


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def config(server: NatsServer, **settings: float) -> NatsConfig:
    """Of a client that does not wait long."""
    return NatsConfig(servers=(server.url,), **{"reconnect_first": 0.02, "reconnect_most": 0.1, **settings})  # type: ignore[arg-type] - whatever fits


def join(store: MemoryStore, own: NatsConfig, common: EventsConfig | None = None) -> AbstractAsyncContextManager[Member]:
    """One more process."""

    def plane(host: EventHost) -> NatsEvents:
        return NatsEvents(own, host=host)

    return member(store, plane, common)


class TestNatsEvents(EventSuite, EventOutageSuite):
    kind = "Nats"

    @pytest.fixture(autouse=True)
    def _server(self, server: NatsServer) -> None:
        self.server = server

    @asynccontextmanager
    async def cluster(self) -> AsyncGenerator[Join, None]:
        async with self.breakable() as (connect, _):
            yield connect

    @asynccontextmanager
    async def breakable(self) -> AsyncGenerator[tuple[Join, Outage], None]:
        store, server = MemoryStore(), self.server
        outage = Outage(begin=lambda: asyncio.to_thread(server.stop), end=lambda: asyncio.to_thread(server.start))
        try:
            yield (lambda common: join(store, config(server), common)), outage
        finally:
            if not server.running:
                await asyncio.to_thread(server.start)


# -- the wire


async def test_what_is_on_the_wire(server: NatsServer, store: MemoryStore) -> None:
    client = await nats.connect(server.url)
    try:
        inbox = await client.subscribe("namespace.demo.component.backend.kv-events")
        await client.flush()
        async with join(store, config(server)) as worker, await worker.plane.publisher(BLOCKS) as publisher:
            publisher.publish(b"hello")
            message = await inbox.next_msg(5)
            event = decode_envelope(message.data)
            assert message.data == encode_envelope(event)
            assert not message.headers
            assert (event.publisher_id, event.sequence, event.payload) == (publisher.publisher_id, 0, b"hello")
            record = (await worker.discovery.list(RECORDS))[0]
            assert isinstance(record, EventChannelRecord)
            assert record.transport.config == {"subject_prefix": "namespace.demo.component.backend"}
    finally:
        await client.close()


async def test_what_makes_no_sense_is_counted_and_dropped(server: NatsServer, store: MemoryStore) -> None:
    client = await nats.connect(server.url)
    try:
        async with (
            join(store, config(server), EventsConfig(max_payload=10_000)) as router,
            await router.plane.subscribe(LOAD) as heard,
        ):
            good = Event(publisher_id=1, sequence=0, published_at=1, topic="kv_metrics", payload=b"good")
            other = Event(publisher_id=1, sequence=0, published_at=1, topic="other", payload=b"")
            large = Event(publisher_id=1, sequence=0, published_at=1, topic="kv_metrics", payload=bytes(20_000))
            broken = [b"", b"\xc1", b"{}", encode_envelope(good)[:-1], encode_envelope(other), encode_envelope(large)]
            for body in [*broken, encode_envelope(good)]:
                await client.publish(LOAD.subject, body)
            assert await take(heard, 1) == [good]
            assert heard.statistics().malformed == len(broken)
    finally:
        await client.close()


async def test_who_has_subscribed_hears_what_is_published_then(server: NatsServer, store: MemoryStore) -> None:
    client = await nats.connect(server.url)
    try:
        async with join(store, config(server)) as router:
            for number in range(100):
                async with await router.plane.subscribe(LOAD) as heard:
                    event = Event(publisher_id=1, sequence=number, published_at=1, topic="kv_metrics", payload=b"at once")
                    await client.publish(LOAD.subject, encode_envelope(event))
                    assert await take(heard, 1) == [event]
    finally:
        await client.close()


async def test_a_subscription_given_up_while_it_was_made_leaves_nothing(tmp_path: Path, store: MemoryStore) -> None:
    with nats_server(tmp_path) as server:
        async with join(store, config(server)) as router, join(store, config(server)) as worker:
            publisher, heard = await worker.plane.publisher(LOAD), await router.plane.subscribe(LOAD)
            await link(publisher, heard)
            with server.standing_still(), pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await router.plane.subscribe(BLOCKS)
            assert isinstance(router.plane, NatsEvents)
            assert router.plane.subjects == [LOAD.subject]


@pytest.mark.parametrize("namespace", ["with blank", "star*", "a..b", "a.>", ".a"])
async def test_a_name_that_makes_no_subject(server: NatsServer, store: MemoryStore, namespace: str) -> None:
    channel = Channel(namespace=namespace, topic="kv_metrics")
    async with join(store, config(server)) as worker:
        with pytest.raises(UsageError, match="no NATS subject"):
            await worker.plane.publisher(channel)
        with pytest.raises(UsageError, match="no NATS subject"):
            await worker.plane.subscribe(channel)
        assert await worker.discovery.list(RECORDS) == []


# -- servers that are away, full, silent


async def test_what_was_published_while_it_was_away_comes_as_far_as_there_was_room(
    tmp_path: Path, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with nats_server(tmp_path) as server:
        async with join(store, config(server, send_queue=100)) as worker, join(store, config(server)) as router:
            publisher, heard = await worker.plane.publisher(LOAD), await router.plane.subscribe(LOAD)
            await link(publisher, heard)
            caplog.set_level(logging.INFO)
            await asyncio.to_thread(server.stop)
            await eventually(lambda: caplog.text.count("NATS is away") == 2, "both have noticed")
            before = publisher.statistics()
            for payload in numbered(250):
                publisher.publish(payload)
            after = publisher.statistics()
            assert (after.published - before.published, after.dropped - before.dropped, after.queued) == (250, 150, 100)
            await asyncio.to_thread(server.start)
            await eventually(lambda: caplog.text.count("connected to NATS again") == 2, "both are back")
            assert caplog.text.count("NATS is away") == 2  # said once, not at every try
            publisher.publish(b"end")
            found = payloads(await take(heard, 1))
            while found[-1] != b"end":
                found += payloads(await take(heard, 1))
            # The subscriber may have come back later than the publisher: what it hears is the end of what was kept.
            assert found[:-1] == numbered(250)[250 - len(found) + 1 :]
            assert publisher.statistics().queued == 0


async def test_the_queue_is_bounded_in_bytes(tmp_path: Path, store: MemoryStore) -> None:
    with nats_server(tmp_path) as server:
        own = config(server, send_queue_bytes=10_000)
        await asyncio.to_thread(server.stop)
        async with join(store, own) as worker, await worker.plane.publisher(LOAD) as publisher:
            for _ in range(20):
                publisher.publish(bytes(1000))
            assert publisher.statistics().queued == 9
            publisher.publish(bytes(50_000))  # one may always wait
            assert publisher.statistics().queued == 1
            assert publisher.statistics().dropped == 20


async def test_a_server_that_was_never_there(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = NatsConfig(servers=("nats://user:secret@127.0.0.1:1",), reconnect_first=0.02, reconnect_most=0.1)
    async with asyncio.timeout(10), join(store, nowhere) as worker:
        publisher = await worker.plane.publisher(LOAD)
        await worker.plane.subscribe(LOAD)
        publisher.publish(b"into the void")
        assert [record.key.id for record in await worker.discovery.list(RECORDS)] == [publisher.publisher_id]
    assert "NATS is away (nats://127.0.0.1:1)" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"INFO {}\r\n", b"INFO nonsense\r\n", b"\xff" * 100_000]
)
async def test_something_else_at_its_address(server: NatsServer, store: MemoryStore, greeting: bytes) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    stranger = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = stranger.sockets[0].getsockname()[1]
    own = NatsConfig(servers=(f"nats://127.0.0.1:{port}",), reconnect_first=0.02, reconnect_most=0.05, connect_timeout=0.2)
    async with join(store, own) as worker:
        publisher, heard = await worker.plane.publisher(LOAD), await worker.plane.subscribe(LOAD)
        publisher.publish(b"waits")
        await asyncio.sleep(0.3)
        stranger.close()
        await stranger.wait_closed()
        relay = await asyncio.start_server(lambda r, w: _relay(r, w, server.port), "127.0.0.1", port)
        await link(publisher, heard)
        await worker.plane.aclose()
        relay.close()
        await relay.wait_closed()


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            target.write(data)
        target.close()

    await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))


async def test_the_next_server_is_taken(server: NatsServer, store: MemoryStore) -> None:
    own = NatsConfig(servers=("nats://127.0.0.1:1", server.url))
    async with join(store, own) as worker:
        publisher, heard = await worker.plane.publisher(LOAD), await worker.plane.subscribe(LOAD)
        await link(publisher, heard)


async def test_a_server_that_takes_less_than_we_do(
    tmp_path: Path, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with nats_server(tmp_path, settings={"max_payload": "2KB"}) as server:
        async with join(store, config(server)) as worker:
            publisher, heard = await worker.plane.publisher(LOAD), await worker.plane.subscribe(LOAD)
            await link(publisher, heard)
            publisher.publish(bytes(4000))
            publisher.publish(b"small")
            assert payloads(await take(heard, 1)) == [b"small"]
            assert publisher.statistics().dropped == 1
            assert heard.statistics().gaps == 1
            assert "max_payload" in caplog.text


async def test_a_server_that_stands_still_is_given_up(tmp_path: Path, store: MemoryStore) -> None:
    with nats_server(tmp_path) as server:
        own = config(server, ping_interval=0.2, connect_timeout=0.3)
        async with join(store, own) as worker:
            publisher, heard = await worker.plane.publisher(LOAD), await worker.plane.subscribe(LOAD)
            await link(publisher, heard)
            with server.standing_still():
                body = bytes(1_000_000)
                for _ in range(100):  # more than the kernel holds, and than the library does before it waits
                    publisher.publish(body)
                    await asyncio.sleep(0.01)
                await eventually(lambda: publisher.statistics().dropped > 0, "the queue is full")
                async with asyncio.timeout(10):
                    await heard.aclose()
            heard = await worker.plane.subscribe(LOAD)
            await link(publisher, heard)


async def test_closing_before_a_server_that_stands_still(tmp_path: Path, store: MemoryStore) -> None:
    with nats_server(tmp_path) as server:
        async with join(store, config(server)) as worker:
            publisher, heard = await worker.plane.publisher(LOAD), await worker.plane.subscribe(LOAD)
            await link(publisher, heard)
            with server.standing_still():
                for _ in range(60):
                    publisher.publish(bytes(1_000_000))
                await asyncio.sleep(0.1)
                async with asyncio.timeout(10):
                    await worker.plane.aclose()


async def test_what_is_published_last_leaves_before_the_end(server: NatsServer, store: MemoryStore) -> None:
    async with join(store, config(server)) as router, await router.plane.subscribe(LOAD) as heard:
        async with join(store, config(server)) as worker:
            publisher = await worker.plane.publisher(LOAD)
            for payload in numbered(1000):
                publisher.publish(payload)
        assert payloads(await take(heard, 1000)) == numbered(1000)
        await silence(heard)
