"""The caller's side, seen by what may stand in front of a worker: proxies that answer for it, peers of older releases, strangers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from loopback.test_http2_plane import without_marker
from stator.errors import (
    ConnectFailed,
    Disconnected,
    Overloaded,
    StatorError,
    StreamIncomplete,
    Timeout,
    Unavailable,
    UsageError,
)
from stator.protocol.call_home import PROLOGUE, SENTINEL, encode_handshake
from stator.protocol.control_message import decode_control_message, read_call_home
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_frames import ErrorCode
from stator.protocol.http2_library import SessionLimits
from stator.protocol.http2_map import DRAINING, STREAM_TYPE, Fields, field_values
from stator.protocol.http2_session import Session
from stator.protocol.item_frame import FINAL, encode_item
from stator.protocol.records import EndpointRecord, NativeAddress, Transport
from stator.protocol.two_part import decode_message, encode_frame
from stator.tasks import DeadlineWheel
from stator.testing.plane_pair import plane_host
from stator.testing.plane_suite import drain, eventually
from stator.transports.http2 import Http2Config
from stator.transports.http2.client import Http2Client
from stator.transports.http2.connection import Http2Connection
from stator.transports.inbox import Inbox, Patience, PhaseLimits
from stator.transports.plane import InstanceObserver

pytestmark = pytest.mark.timeout(30)

INSTANCE = 16
STREAM = (b"content-type", STREAM_TYPE.encode())
ITEMS = PROLOGUE + encode_item(1, "json") + encode_item(2, "json")


class Asked(Exchange):
    """One request as somebody in front of a worker has it."""

    def __init__(self, front: "Front") -> None:
        super().__init__()
        self.front = front
        self.facts: dict[str, str] = {}
        self.body = b""

    def headers(self, fields: Fields) -> None:
        self.facts = field_values(fields)

    def data(self, data: bytes) -> None:
        self.body += data
        self.release()
        self.front.arrived.set()

    def answer(self, status: int, *more: tuple[bytes, bytes], body: bytes = b"", end: bool = True) -> None:
        self.front.session.respond(self, [(b":status", b"%d" % status), *more])
        if body:
            self.push(body)
        if end:
            self.finish()


class Front:
    """A listener that speaks HTTP/2 and does what the test says."""

    def __init__(self, wheel: DeadlineWheel) -> None:
        self.wheel = wheel
        self.asked: list[Asked] = []
        self.arrived = asyncio.Event()
        self.connections: list[Http2Connection] = []
        self.sessions: list[Session] = []
        self.limits = SessionLimits()

    @property
    def session(self) -> Session:
        return self.sessions[-1]

    def take(self, fields: Fields) -> Exchange:
        asked = Asked(self)
        self.asked.append(asked)
        return asked

    def accept(self) -> asyncio.Protocol:
        connection = Http2Connection(wheel=self.wheel, patience=5, lost=lambda connection, reason: None)
        session = Session(limits=self.limits, wake=connection.wake, now=self.wheel.now(), accept=self.take)
        connection.attach(session, look=1.0)
        self.connections.append(connection)
        self.sessions.append(session)
        return connection

    async def request(self) -> Asked:
        async with asyncio.timeout(5):
            await self.arrived.wait()
        return self.asked[-1]


class Bench:
    def __init__(self, client: Http2Client, front: Front, port: int) -> None:
        self.client = client
        self.front = front
        self.port = port

    def record(self, *, streams: bool = True) -> EndpointRecord:
        record = EndpointRecord(
            component="b",
            endpoint="generate",
            namespace="n",
            instance_id=INSTANCE,
            transport=Transport(http=f"http://127.0.0.1:{self.port}/v1/rpc/10/generate"),
            stator=NativeAddress(plane=0, address="", process="b" * 32, http2=1),
        )
        return record if streams else without_marker(record)

    async def open(self, *, streams: bool = True, limits: PhaseLimits | None = None, **facts: Any) -> Inbox:
        inbox = Inbox(wheel=self.front.wheel, patience=Patience(limits or PhaseLimits()), instance=INSTANCE)
        envelope = RequestEnvelope(**{"id": "r1", "payload": b'{"n":1}', **facts})
        try:
            await self.client.open(self.record(streams=streams), envelope, inbox)
        except StatorError as error:
            inbox.finish(error)
            raise
        return inbox


@asynccontextmanager
async def bench(
    listener: Callable[[], asyncio.Protocol] | None = None, *, observer: InstanceObserver | None = None, **config: Any
) -> AsyncIterator[Bench]:
    host = plane_host(resolution=0.02, observer=observer)
    client = await Http2Client.start(Http2Config(**config), host)
    front = Front(DeadlineWheel(asyncio.get_running_loop(), resolution=0.02))
    strangers: list[Any] = []

    def accept() -> asyncio.Protocol:
        if listener is None:
            return front.accept()
        strangers.append(listener())
        return strangers[-1]

    server = await asyncio.get_running_loop().create_server(accept, "127.0.0.1", 0)
    try:
        yield Bench(client, front, server.sockets[0].getsockname()[1])
    finally:
        await client.aclose()
        server.close()
        for connection in front.connections:
            connection.abort(Disconnected("the test is over"))
        for stranger in strangers:
            stranger.transport.abort()
        await eventually(lambda: not front.wheel._slots or len(front.wheel) == 0, what="no deadline armed")  # pyright: ignore[reportPrivateUsage]
        await server.wait_closed()
        assert client.open_streams == client.connections == 0
        assert len(host.wheel) == 0


# -- what is said


async def test_the_request_is_what_the_document_says() -> None:
    async with bench() as caller:
        trace = {"traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "x-request-id": "x-1"}
        inbox = await caller.open(headers=trace, deadline=2.5, metadata={"k": "v"})
        asked = await caller.front.request()
        assert asked.facts.pop("x-frontend-send-ts-ns").isdigit()
        assert asked.facts == {
            ":method": "POST",
            ":scheme": "http",
            ":authority": f"127.0.0.1:{caller.port}",
            ":path": "/v1/rpc/10/generate",
            "content-type": STREAM_TYPE,
            "request-id": "r1",
            "x-stator-deadline": "2.500",
            **trace,
        }
        assert asked.body == encode_frame(b'{"id":"r1","metadata":{"k":"v"}}', b'{"n":1}')
        asked.answer(200, STREAM, body=ITEMS + FINAL["json"] + SENTINEL)
        assert await drain(inbox) == [1, 2]
        await eventually(lambda: not caller.front.session.streams, what="the caller ended its side")


# -- what proxies say


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (502, Disconnected),
        (503, Unavailable),
        (504, Timeout),
        (404, Unavailable),
        (429, Overloaded),
        (413, UsageError),
        (403, ConnectFailed),
        (200, ConnectFailed),
        (202, ConnectFailed),
    ],
)
async def test_a_status_that_a_proxy_made(status: int, kind: type[StatorError]) -> None:
    async with bench() as caller:
        inbox = await caller.open()
        asked = await caller.front.request()
        asked.answer(status, (b"content-type", b"text/html"), body=b"<html>" + b"x" * 100_000)
        with pytest.raises(kind, match=f"HTTP status {status}") as caught:
            await drain(inbox)
        assert type(caught.value) is kind
        assert (caught.value.instance, caught.value.phase) == (INSTANCE, "accept")
        await eventually(lambda: caller.client.open_streams == 0, what="the stream was dropped")


@pytest.mark.parametrize(
    ("code", "kind"),
    [(ErrorCode.REFUSED_STREAM, Unavailable), (ErrorCode.ENHANCE_YOUR_CALM, Overloaded), (2, Disconnected), (8, Disconnected)],
)
async def test_a_stream_that_is_reset_before_its_answer(code: int, kind: type[StatorError]) -> None:
    async with bench() as caller:
        inbox = await caller.open()
        (await caller.front.request()).reset(code)
        with pytest.raises(kind) as caught:
            await drain(inbox)
        assert caught.value.retryable


@pytest.mark.parametrize("how", ["end", "reset", "cut", "half"])
@pytest.mark.parametrize(("body", "kind"), [(ITEMS, StreamIncomplete), (PROLOGUE, Disconnected), (b"", Disconnected)])
async def test_an_answer_without_its_sentinel_is_not_complete(how: str, body: bytes, kind: type[StatorError]) -> None:
    async with bench() as caller:
        inbox = await caller.open()
        asked = await caller.front.request()
        asked.answer(200, STREAM, body=body + (ITEMS[:7] if how == "half" else b""), end=how in ("end", "half"))
        if body == ITEMS:
            assert await inbox.more()
        elif body:
            await inbox.opened()
        await asyncio.sleep(0.02)
        if how == "reset":
            asked.reset(2)
        elif how == "cut":
            caller.front.connections[0].abort(Disconnected("cut"))
        got: list[Any] = []
        with pytest.raises(Disconnected) as caught:
            await drain(inbox, got)
        assert type(caught.value) is kind
        assert got == ([1, 2] if body == ITEMS else [])


async def test_the_final_frame_without_sentinel_will_do() -> None:
    async with bench() as caller:
        inbox = await caller.open()
        (await caller.front.request()).answer(200, STREAM, body=ITEMS + FINAL["json"])
        assert await drain(inbox) == [1, 2]


@pytest.mark.parametrize("body", [b"<html>" * 20, ITEMS + b"\xff" * 24, encode_frame(data=b"1"), ITEMS + encode_frame(b'"x"')])
async def test_a_body_that_is_no_stream_ends_it(body: bytes) -> None:
    async with bench() as caller:
        inbox = await caller.open()
        (await caller.front.request()).answer(200, STREAM, body=body, end=False)
        with pytest.raises(StatorError):
            await drain(inbox)
        await eventually(lambda: not caller.front.session.streams, what="the stream was reset")


async def test_an_answer_that_goes_on_behind_its_sentinel_is_reset_after_a_while() -> None:
    async with bench(linger=0.2) as caller:
        inbox = await caller.open()
        (await caller.front.request()).answer(200, STREAM, body=ITEMS + FINAL["json"] + SENTINEL, end=False)
        assert await drain(inbox) == [1, 2]
        assert caller.client.open_streams == 1
        await eventually(lambda: caller.client.open_streams == 0, what="the stream was reset")


async def test_an_early_hint_is_not_the_answer() -> None:
    async with bench() as caller:
        inbox = await caller.open()
        asked = await caller.front.request()
        asked.answer(103, (b"link", b"x"), end=False)
        await asyncio.sleep(0.02)
        asked.answer(200, STREAM, body=ITEMS + FINAL["json"] + SENTINEL)
        assert await drain(inbox) == [1, 2]


# -- goodbyes


async def test_a_connection_that_goes_away_finishes_and_the_next_request_makes_another() -> None:
    async with bench() as caller:
        first = await caller.open()
        asked = await caller.front.request()
        caller.front.session.drain("too many requests on this connection")
        await eventually(lambda: caller.client._lines()[0].session.draining, what="the caller was told")  # pyright: ignore[reportPrivateUsage]
        caller.front.arrived.clear()
        second = await caller.open(id="r2")
        again = await caller.front.request()
        assert len(caller.front.sessions) == 2
        again.answer(200, STREAM, body=ITEMS + FINAL["json"] + SENTINEL)
        assert await drain(second) == [1, 2]
        caller.front.sessions[0].respond(asked, [(b":status", b"200"), STREAM])
        asked.push(ITEMS + FINAL["json"] + SENTINEL)
        asked.finish()
        assert await drain(first) == [1, 2]


class Watcher:
    """Notes how instances fare."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def suspect(self, instance: int) -> None:
        self.seen.append(f"suspect {instance}")

    def recovered(self, instance: int) -> None:
        self.seen.append(f"recovered {instance}")

    def lost(self, instance: int, reason: str) -> None:
        self.seen.append(f"lost {instance}")

    def draining(self, instance: int) -> None:
        self.seen.append(f"draining {instance}")


@pytest.mark.parametrize(("reason", "seen"), [(DRAINING, ["draining 16", "lost 16"]), ("reload of the proxy", ["lost 16"])])
async def test_whose_connection_ends_is_noted_and_who_drains(reason: str, seen: list[str]) -> None:
    watcher = Watcher()
    async with bench(observer=watcher) as caller:
        inbox = await caller.open()
        (await caller.front.request()).answer(200, STREAM, body=ITEMS, end=False)
        assert await inbox.more()
        caller.front.session.drain(reason)
        await eventually(lambda: caller.client._lines()[0].session.draining, what="the caller was told")  # pyright: ignore[reportPrivateUsage]
        caller.front.connections[0].abort(Disconnected("killed"))
        with pytest.raises(StreamIncomplete):
            await drain(inbox)
        assert watcher.seen == seen


async def test_a_connection_without_requests_is_nobodys_loss() -> None:
    watcher = Watcher()
    async with bench(observer=watcher) as caller:
        inbox = await caller.open()
        (await caller.front.request()).answer(200, STREAM, body=ITEMS + FINAL["json"] + SENTINEL)
        assert await drain(inbox) == [1, 2]
        await eventually(lambda: caller.client.open_streams == 0, what="the stream ended")
        caller.front.connections[0].abort(Disconnected("killed"))
        await eventually(lambda: caller.client.connections == 0, what="the connection ended")
        assert watcher.seen == []


async def test_what_leaves_discovery_is_not_waited_for() -> None:
    async with bench() as caller:
        waiting = await caller.open()
        await caller.front.request()
        caller.client.forget(caller.record())
        with pytest.raises(Disconnected, match="left discovery"):
            await drain(waiting)


# -- strangers


class Stranger(asyncio.Protocol):
    """Says one thing."""

    def __init__(self, said: bytes, *, hangs_up: bool = False) -> None:
        self.said = said
        self.hangs_up = hangs_up
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.write(self.said)
        if self.hangs_up:
            self.transport.close()


@pytest.mark.parametrize(
    ("said", "hangs_up"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False),
        (b"\x15\x03\x03\x00\x02\x02\x0a", True),
        (b"", True),
        (b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\xff\xff\xff\xff", False),
    ],
)
async def test_who_does_not_speak_http2_is_a_failed_connect(said: bytes, hangs_up: bool) -> None:
    async with bench(lambda: Stranger(said, hangs_up=hangs_up)) as caller:
        with pytest.raises(ConnectFailed):
            await caller.open()


async def test_who_says_nothing_is_a_timeout() -> None:
    async with bench(lambda: Stranger(b""), connect_timeout=0.2) as caller:
        with pytest.raises(Timeout) as caught:
            await caller.open()
        assert caught.value.phase == "connect"


async def test_a_worker_without_a_free_stream_is_a_timeout() -> None:
    async with bench(connect_timeout=0.3, pool_size=1) as caller:
        caller.front.limits = SessionLimits(streams=1)
        first = await caller.open()
        with pytest.raises(Timeout, match="no stream to") as caught:
            await caller.open(id="r2")
        assert caught.value.phase == "connect"
        first.kill()
        await caller.open(id="r3")


async def test_a_request_that_is_stopped_while_it_waits_for_a_connection_is_over() -> None:
    async with bench(lambda: Stranger(b"")) as caller:
        inbox = Inbox(wheel=caller.front.wheel, patience=Patience(PhaseLimits()), instance=INSTANCE)
        opening = asyncio.get_running_loop().create_task(
            caller.client.open(caller.record(), RequestEnvelope(id="r", payload=b"1"), inbox)
        )
        await asyncio.sleep(0.05)
        inbox.stop()
        async with asyncio.timeout(1):
            await opening
        assert inbox.ended and inbox.error is None


# -- workers that call home


async def test_an_older_worker_is_sent_a_message_and_calls_home() -> None:
    async with bench() as caller:
        inbox = await caller.open(streams=False)
        asked = await caller.front.request()
        assert asked.facts["content-type"] == "application/octet-stream"
        assert asked.facts["request-id"] == "r1"
        header, data = decode_message(asked.body)
        assert decode_control_message(header).id == "r1" and bytes(data) == b'{"n":1}'
        asked.answer(202, (b"content-length", b"0"))
        home = read_call_home(header)
        reader, writer = await asyncio.open_connection(*home.address.rsplit(":", 1))
        writer.write(encode_handshake(home.subject) + ITEMS + FINAL["json"] + SENTINEL)
        assert await drain(inbox) == [1, 2]
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize(
    ("status", "kind"), [(404, Unavailable), (503, Unavailable), (405, ConnectFailed), (500, Disconnected), (502, Disconnected)]
)
async def test_an_older_worker_that_does_not_take_it(status: int, kind: type[StatorError]) -> None:
    async with bench() as caller:
        inbox = await caller.open(streams=False)
        (await caller.front.request()).answer(status, body=b"Endpoint not found")
        with pytest.raises(kind, match=str(status)):
            await drain(inbox)


async def test_an_older_worker_that_does_not_answer_is_a_timeout() -> None:
    async with bench(request_timeout=0.2) as caller:
        inbox = await caller.open(streams=False)
        await caller.front.request()
        with pytest.raises(Timeout, match="no status within") as caught:
            await drain(inbox)
        assert caught.value.phase == "accept"


async def test_an_older_worker_that_hangs_up_before_its_status() -> None:
    async with bench() as caller:
        inbox = await caller.open(streams=False)
        await caller.front.request()
        caller.front.connections[0].abort(Disconnected("cut"))
        with pytest.raises(Disconnected):
            await drain(inbox)
