"""The caller's side of the compatible plane, seen by a worker that is nothing but sockets."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest

from stator.errors import (
    Cancelled,
    ConfigError,
    ConnectFailed,
    Disconnected,
    Overloaded,
    PeerProtocolError,
    StatorError,
    StreamIncomplete,
    Timeout,
    Unavailable,
    UsageError,
)
from stator.protocol.call_home import KILL, PROLOGUE, SENTINEL, STOP, HandshakeReader, encode_handshake
from stator.protocol.control_message import CallHomeAddress, ControlMessage, decode_control_message, read_call_home
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.item_frame import FINAL, encode_item
from stator.protocol.records import EndpointRecord, Transport
from stator.protocol.request_frame import RequestFrame, RequestFrameParser, encode_acknowledgement
from stator.protocol.stream import Phase
from stator.protocol.two_part import decode_message, encode_frame
from stator.tasks import DeadlineWheel
from stator.testing.plane_pair import plane_host
from stator.testing.plane_suite import drain, eventually
from stator.testing.recorded import recorded
from stator.transports.inbox import Inbox, Patience, PhaseLimits
from stator.transports.tcp import CompatibleClient, TcpConfig

pytestmark = pytest.mark.timeout(30)

INSTANCE = 0x123456789ABCDEF
PATH = "123456789abcdef/generate"
ACCEPTED = encode_acknowledgement()


class Request:
    """One request as it came out of the wire, and where it wants its answer."""

    def __init__(self, frame: RequestFrame, writer: asyncio.StreamWriter, dialled: "list[Call]") -> None:
        self.frame = frame
        self.writer = writer
        self.dialled = dialled
        self.header, self.data = decode_message(frame.payload)
        self.message: ControlMessage = decode_control_message(self.header)
        self.home: CallHomeAddress = read_call_home(self.header)

    def acknowledge(self, text: bytes = b"") -> None:
        self.writer.write(encode_acknowledgement(text))

    async def call(self, *frames: bytes, subject: str | None = None) -> "Call":
        """Call home and say hello, then `frames`."""
        call = await dial(self.home.address, self.dialled)
        call.write(encode_handshake(self.home.subject if subject is None else subject), *frames)
        return call


class Call:
    """One call-home connection from the worker's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def write(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    async def heard(self) -> bytes | None:
        """Everything the client says; None at its end if that was a reset."""
        data = b""
        async with asyncio.timeout(5):
            with suppress(ConnectionResetError, BrokenPipeError):
                while chunk := await self.reader.read(1000):
                    data += chunk
                return data
        return data or None

    async def listen(self, size: int) -> bytes:
        async with asyncio.timeout(5):
            return await self.reader.readexactly(size)


async def dial(address: str, dialled: list[Call]) -> Call:
    """Connect to a client's listener."""
    host, _, port = address.rpartition(":")
    call = Call(*await asyncio.open_connection(host, int(port)))
    dialled.append(call)
    return call


class Worker:
    """A request listener that does what the test says."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[Request] = asyncio.Queue()
        self.connections: list[asyncio.StreamWriter] = []
        self.dialled: list[Call] = []
        self.address = ""

    async def taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        parser = RequestFrameParser()
        with suppress(OSError):
            while data := await reader.read(65536):
                for frame in parser.receive_data(data):
                    self.requests.put_nowait(Request(frame, writer, self.dialled))

    async def request(self) -> Request:
        async with asyncio.timeout(5):
            return await self.requests.get()


class Bench:
    """A client plane and a bare worker."""

    def __init__(self, client: CompatibleClient, worker: Worker, wheel: DeadlineWheel) -> None:
        self.client = client
        self.worker = worker
        self.wheel = wheel

    def record(self, **fields: Any) -> EndpointRecord:
        return EndpointRecord(
            component="backend",
            endpoint="generate",
            namespace="test",
            **{"instance_id": INSTANCE, "transport": Transport(tcp=f"{self.worker.address}/{PATH}"), **fields},
        )

    async def open(
        self,
        payload: bytes = b'{"n":2,"prompt":"hi"}',
        *,
        limits: PhaseLimits | None = None,
        record: EndpointRecord | None = None,
        **facts: Any,
    ) -> Inbox:
        inbox = Inbox(wheel=self.wheel, patience=Patience(limits or PhaseLimits()), instance=INSTANCE)
        try:
            await self.client.open(
                record or self.record(), RequestEnvelope(**{"id": "req-plain", "payload": payload, **facts}), inbox
            )
        except BaseException as error:
            inbox.finish(error if isinstance(error, StatorError) else Cancelled("given up"))
            raise
        return inbox

    async def stranger(self, *frames: bytes) -> Call:
        """A connection to the listener for answers that says `frames`."""
        call = await dial(self.client.call_home_address, self.worker.dialled)
        call.write(*frames)
        return call

    async def exchange(self, *frames: bytes, **options: Any) -> tuple[Inbox, Call]:
        """An accepted request, called home with `frames` behind the prologue."""
        inbox = await self.open(**options)
        request = await self.worker.request()
        request.acknowledge()
        return inbox, await request.call(PROLOGUE, *frames)


@asynccontextmanager
async def bench(**config: Any) -> AsyncIterator[Bench]:
    wheel = DeadlineWheel(asyncio.get_running_loop(), resolution=0.02)
    host = plane_host(wheel=wheel)
    worker = Worker()
    listener = await asyncio.start_server(worker.taken, "127.0.0.1", 0)
    worker.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    client: CompatibleClient | None = None
    try:
        client = await CompatibleClient.start(TcpConfig(**config), host)
        yield Bench(client, worker, wheel)
        await eventually(lambda: client.open_streams == 0, what="streams ended")
    finally:
        if client is not None:
            await client.aclose()
        for writer in (*worker.connections, *(call.writer for call in worker.dialled)):
            writer.transport.abort()
        listener.close()
        await asyncio.sleep(0.01)  # uvloop closes handles in its own time
        await eventually(lambda: len(wheel) == 0, what="no deadline armed")


def items(*values: Any) -> bytes:
    return b"".join(encode_item(value, "json") for value in values)


END = FINAL["json"] + SENTINEL

# -- requests


@pytest.mark.parametrize(("codec", "name"), [("json", "01-"), ("msgpack", "02-")])
async def test_a_request_is_the_recorded_one(codec: str, name: str) -> None:
    """But for what differs on every run: the address, the subject and the time."""
    (frame,) = RequestFrameParser().receive_data(recorded(name))
    header, data = decode_message(frame.payload)
    async with bench(codec=codec) as caller:
        inbox = await caller.open()
        request = await caller.worker.request()
        assert request.frame.path == frame.path
        assert request.frame.headers.keys() == frame.headers.keys()
        assert request.data == data
        home = read_call_home(header)
        mine = request.header.decode().replace(request.home.address, home.address).replace(request.home.subject, home.subject)
        assert mine.encode() == header
        inbox.kill()


async def test_facts_and_trace_travel() -> None:
    async with bench() as caller:
        inbox = await caller.open(
            metadata={"tenant": "t1", "a": "b"}, headers={"traceparent": "tp", "other": "x"}, deadline=5.0
        )
        request = await caller.worker.request()
        assert b'"metadata":{"a":"b","tenant":"t1"}' in request.header
        assert request.frame.headers["traceparent"] == "tp"
        assert request.frame.headers["x-stator-deadline"] == "5.000"
        assert "other" not in request.frame.headers
        inbox.kill()


@pytest.mark.parametrize(("named", "used"), [("msgpack", "msgpack"), ("json", "json"), ("later", "msgpack"), (None, "msgpack")])
async def test_the_codec_of_the_record_is_followed(named: str | None, used: str) -> None:
    async with bench(codec="msgpack") as caller:
        fields = {} if named is None else {"request_plane_codec": named}
        inbox = await caller.open(record=caller.record(**fields))
        assert (await caller.worker.request()).message.payload_codec == used
        inbox.kill()


async def test_requests_share_a_connection_and_are_acknowledged_in_order() -> None:
    async with bench() as caller:
        inboxes = [await caller.open(id=f"r{number}") for number in range(50)]
        requests = [await caller.worker.request() for _ in range(50)]
        assert [request.message.id for request in requests] == [f"r{number}" for number in range(50)]
        requests[0].writer.write(b"".join(encode_acknowledgement(b"" if n % 2 else b"no %d" % n) for n in range(50)))
        await eventually(lambda: sum(inbox.ended for inbox in inboxes) == 25, what="half were refused")
        for number, inbox in enumerate(inboxes):
            assert inbox.ended is (number % 2 == 0)
            if inbox.ended:
                assert f"no {number}" in str(inbox.error)
            else:
                assert inbox.phase is Phase.CALL_HOME
                inbox.kill()
        assert len(caller.worker.connections) == caller.client.request_connections == 1


async def test_a_full_connection_gets_a_second_one_and_a_full_pool_a_queue() -> None:
    async with bench(pipeline=2, pool_size=2) as caller:
        inboxes = [await caller.open() for _ in range(4)]
        requests = [await caller.worker.request() for _ in range(4)]
        assert len(caller.worker.connections) == 2
        late = asyncio.create_task(caller.open())
        await asyncio.sleep(0.05)
        assert not late.done()
        requests[0].acknowledge()
        inboxes.append(await asyncio.wait_for(late, 5))
        assert len(caller.worker.connections) == 2
        for inbox in inboxes:
            inbox.kill()


async def test_many_at_once_share_one_dial() -> None:
    async with bench() as caller:
        inboxes = await asyncio.gather(*(caller.open(id=f"r{number}") for number in range(100)))
        assert len(caller.worker.connections) == 1
        for inbox in inboxes:
            inbox.kill()


async def test_a_caller_that_stops_waiting_for_the_dial_leaves_it_to_the_others() -> None:
    async with bench() as caller:
        impatient = asyncio.create_task(caller.open())
        patient = asyncio.create_task(caller.open())
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        (await asyncio.wait_for(patient, 5)).kill()


async def test_an_idle_connection_is_closed() -> None:
    async with bench(idle_timeout=0.2, request_timeout=0.2) as caller:
        inbox = await caller.open()
        (await caller.worker.request()).acknowledge(b"no")
        with pytest.raises(ConnectFailed):
            await inbox.more()
        await eventually(lambda: caller.client.request_connections == 0, what="the connection was closed")
        (await caller.open()).kill()


# -- acknowledgements


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b"Server overloaded: worker at capacity", Overloaded),
        (b"Server unavailable: worker pool channel closed", Unavailable),
        (b"Unknown endpoint: 1/x", Unavailable),
        (b"Invalid endpoint path", ConnectFailed),
        (b"something new", ConnectFailed),
    ],
)
async def test_a_refusal_ends_the_request_at_once(text: bytes, kind: type[StatorError]) -> None:
    async with bench() as caller:
        inbox = await caller.open()
        request = await caller.worker.request()
        request.acknowledge(text)
        with pytest.raises(kind) as caught:
            await inbox.more()
        assert caught.value.retryable
        assert (caught.value.instance, caught.value.phase) == (INSTANCE, "accept")
        assert await (await request.call(PROLOGUE)).heard() is None


async def test_no_acknowledgement() -> None:
    async with bench(request_timeout=0.2) as caller:
        inbox = await caller.open()
        with pytest.raises(Timeout) as caught:
            await inbox.more()
        assert caught.value.phase == "accept"
        assert caller.client.request_connections == 0


async def test_the_connection_ends_before_the_acknowledgement() -> None:
    async with bench() as caller:
        inbox = await caller.open()
        (await caller.worker.request()).writer.close()
        with pytest.raises(Disconnected) as caught:
            await inbox.more()
        assert caught.value.phase == "accept"
        assert caught.value.retryable


async def test_a_worker_that_called_home_needs_no_acknowledgement() -> None:
    async with bench(request_timeout=0.2) as caller:
        inbox = await caller.open()
        request = await caller.worker.request()
        call = await request.call(PROLOGUE, items(1))
        assert await inbox.more()
        await eventually(lambda: caller.client.request_connections == 0, what="the slow connection was closed")
        call.write(items(2), END)
        assert await drain(inbox) == [1, 2]


async def test_acknowledgements_that_nobody_waits_for() -> None:
    async with bench() as caller:
        inbox = await caller.open()
        request = await caller.worker.request()
        request.acknowledge()
        request.acknowledge()
        await eventually(lambda: caller.client.request_connections == 0, what="the connection was closed")
        inbox.kill()


async def test_an_endless_acknowledgement() -> None:
    async with bench() as caller:
        inbox = await caller.open()
        (await caller.worker.request()).writer.write(b"\xff\xff\xff\xff")
        with pytest.raises(Disconnected, match="larger than the limit"):
            await inbox.more()


# -- what is refused before anything is sent


async def test_nobody_listens() -> None:
    async with bench() as caller:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            record = caller.record(transport=Transport(tcp=f"127.0.0.1:{unused.getsockname()[1]}/{PATH}"))
            for _ in range(2):
                with pytest.raises(ConnectFailed) as caught:
                    await caller.open(record=record)
                assert (caught.value.instance, caught.value.phase) == (INSTANCE, "connect")


async def test_an_instance_that_cannot_call_a_loopback_address_is_refused_at_once() -> None:
    async with bench() as caller:
        with pytest.raises(ConfigError, match="STATOR_ADVERTISE_HOST"):
            await caller.open(record=caller.record(transport=Transport(tcp=f"192.0.2.1:5/{PATH}")))


async def test_a_request_that_is_too_large() -> None:
    async with bench(max_message_size=2000) as caller:
        with pytest.raises(UsageError, match="limit of 2000 bytes"):
            await caller.open(b'"%s"' % (b"x" * 2000))
        with pytest.raises(UsageError, match="control message too large"):
            await caller.open(metadata={"m": "x" * 131_072})
        assert caller.client.open_streams == 0


async def test_answers_are_not_awaited_where_others_can_reach_unless_the_host_says_so() -> None:
    with pytest.raises(ConfigError, match="reachable by others"):
        async with bench(call_home_host="0.0.0.0"):
            pass


# -- calling home


@pytest.mark.parametrize("first", ["acknowledgement", "call"])
async def test_acknowledgement_and_call_come_in_any_order(first: str) -> None:
    async with bench() as caller:
        inbox = await caller.open()
        request = await caller.worker.request()
        if first == "acknowledgement":
            request.acknowledge()
            await eventually(lambda: inbox.phase is Phase.CALL_HOME)
        await request.call(PROLOGUE, items(1, 2), END)
        assert await drain(inbox) == [1, 2]
        if first == "call":
            request.acknowledge(b"too late to matter")


async def test_bytes_one_by_one() -> None:
    async with bench() as caller:
        inbox = await caller.open()
        request = await caller.worker.request()
        call = await caller.stranger()
        for byte in encode_handshake(request.home.subject) + PROLOGUE + items({"a": 1}) + END:
            call.write(bytes([byte]))
            await call.writer.drain()
        assert await drain(inbox) == [{"a": 1}]


async def test_the_client_closes_at_the_sentinel_without_leaving_a_port_behind() -> None:
    async with bench() as caller:
        inbox, call = await caller.exchange(items(1), END)
        assert await drain(inbox) == [1]
        assert await call.heard() is None


@pytest.mark.parametrize(
    "hello",
    [
        encode_handshake("nobody"),
        encode_frame(b"", b"data"),
        encode_frame(b"{"),
        b"\xff" * 30,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_whoever_is_not_expected_is_turned_away(hello: bytes) -> None:
    async with bench() as caller:
        inbox, call = await caller.exchange(items(1))
        stranger = await caller.stranger()
        stranger.write(hello)
        assert await stranger.heard() is None
        call.write(items(2), END)
        assert await drain(inbox) == [1, 2]


async def test_a_subject_is_good_for_one_call_and_one_kind() -> None:
    async with bench() as caller:
        inbox = await caller.open()
        request = await caller.worker.request()
        wrong = await caller.stranger()
        wrong.write(encode_handshake(request.home.subject, "request"))
        assert await wrong.heard() is None
        call = await request.call(PROLOGUE, items(1))
        assert await inbox.more()
        assert await (await request.call(PROLOGUE, items(9))).heard() is None
        call.write(END)
        assert await drain(inbox) == [1]


async def test_the_silent_are_closed_in_time_and_in_number() -> None:
    async with bench(handshake_timeout=0.3, max_silent=3) as caller:
        silent = [await caller.stranger() for _ in range(5)]
        silent[4].write(encode_handshake("x")[:10])
        assert await silent[0].heard() is None
        assert await silent[1].heard() is None
        assert caller.client.open_streams == 3
        await eventually(lambda: caller.client.open_streams == 0, within=2, what="the others were closed")


async def test_nobody_calls_home() -> None:
    async with bench() as caller:
        inbox = await caller.open(limits=PhaseLimits(call_home=0.2))
        request = await caller.worker.request()
        request.acknowledge()
        with pytest.raises(Timeout) as caught:
            await inbox.more()
        assert caught.value.phase == "call home"
        assert await (await request.call(PROLOGUE)).heard() is None


async def test_no_prologue() -> None:
    async with bench() as caller:
        inbox = await caller.open(limits=PhaseLimits(prologue=0.2))
        request = await caller.worker.request()
        request.acknowledge()
        call = await request.call()
        with pytest.raises(Timeout) as caught:
            await inbox.more()
        assert caught.value.phase == "prologue"
        assert await call.heard() in (KILL, None)


async def test_an_instance_that_left() -> None:
    async with bench() as caller:
        waiting, sent = await caller.open(), await caller.open()
        (await caller.worker.request()).acknowledge()
        await caller.worker.request()
        streaming, call = await caller.exchange(items(1))
        assert await streaming.more()
        caller.client.forget(caller.record(instance_id=5))
        assert not waiting.ended
        caller.client.forget(caller.record())
        for inbox in (waiting, sent):
            with pytest.raises(Disconnected, match="left discovery"):
                await inbox.more()
        call.write(items(2), END)
        assert await drain(streaming) == [1, 2]


# -- streams


async def test_the_end_of_the_connection_is_complete_after_the_final_frame() -> None:
    async with bench() as caller:
        inbox, call = await caller.exchange(items(1), FINAL["json"])
        call.writer.close()
        assert await drain(inbox) == [1]


@pytest.mark.parametrize("how", ["close", "reset", "sentinel"])
@pytest.mark.parametrize("after", [0, 2])
async def test_a_stream_that_is_cut(how: str, after: int) -> None:
    async with bench() as caller:
        inbox, call = await caller.exchange(items(*range(after)))
        got: list[Any] = []
        if after:
            assert await inbox.more()
        else:
            await inbox.opened()
        if how == "sentinel":
            call.write(SENTINEL)
        elif how == "close":
            call.writer.close()
        else:
            call.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            call.writer.transport.abort()
        with pytest.raises(StreamIncomplete if after else Disconnected):
            await drain(inbox, got)
        assert got == list(range(after))


@pytest.mark.parametrize("bad", [encode_frame(b"header", b"data"), b"\xff" * 40, encode_frame(data=b"{"), END + items(1)])
async def test_bytes_that_break_the_protocol_end_their_stream_alone(bad: bytes) -> None:
    async with bench() as caller:
        other, other_call = await caller.exchange(items(1))
        inbox, call = await caller.exchange(items(1), bad)
        got: list[Any] = []
        if bad.startswith(END):
            assert await drain(inbox) == [1]
        else:
            with pytest.raises((StreamIncomplete, PeerProtocolError)):
                await drain(inbox, got)
            assert got == [1]
            assert await call.heard() in (KILL, None)
        other_call.write(items(2), END)
        assert await drain(other) == [1, 2]


async def test_stop_is_one_frame_and_the_stream_goes_on() -> None:
    async with bench() as caller:
        inbox, call = await caller.exchange(items(1))
        assert await inbox.more()
        inbox.stop()
        inbox.stop()
        assert await call.listen(len(STOP)) == recorded("05-")
        call.write(items(2), END)
        assert await drain(inbox) == [1, 2]


async def test_stop_before_the_prologue_follows_it() -> None:
    async with bench() as caller:
        inbox = await caller.open()
        inbox.stop()
        request = await caller.worker.request()
        call = await request.call(PROLOGUE)
        assert await call.listen(len(STOP)) == STOP
        call.writer.close()
        assert await drain(inbox) == []


async def test_kill_is_sent_at_once_and_the_connection_reset() -> None:
    async with bench() as caller:
        inbox, call = await caller.exchange(items(1))
        assert await inbox.more()
        inbox.kill()
        assert await call.heard() in (recorded("06-"), None)
        inbox.items.clear()
        with pytest.raises(Cancelled):
            await inbox.more()


async def test_an_error_item_is_followed_by_the_end_within_a_second() -> None:
    failed = encode_frame(
        data=b'{"data":{"event":"error","error":{"error_type":"Cancelled","message":"m"}},"complete_final":false}'
    )
    async with bench() as caller:
        inbox, call = await caller.exchange(items(1), failed)
        got: list[Any] = []
        with pytest.raises(Cancelled):
            await drain(inbox, got)
        assert got == [1]
        assert caller.client.open_streams == 1
        call.write(END)
        assert await call.heard() is None
        inbox, call = await caller.exchange(failed)
        with pytest.raises(Cancelled):
            await inbox.more()
        assert await call.heard() is None


async def test_a_reader_that_does_not_read_holds_sixty_four_items_and_stops_its_socket() -> None:
    async with bench() as caller:
        inbox, call = await caller.exchange()
        other, other_call = await caller.exchange()
        call.writer.transport.set_write_buffer_limits(high=0)
        written = 0
        with suppress(TimeoutError):
            while True:
                call.write(items(*("x" * 1000 for _ in range(100))))
                written += 100
                async with asyncio.timeout(0.3):
                    await call.writer.drain()
        assert len(inbox.items) == 64
        other_call.write(items(*range(1000)), END)
        assert await drain(other) == list(range(1000))
        assert len(inbox.items) == 64
        call.write(END)
        assert len(await drain(inbox)) == written


async def test_closing_the_plane_ends_everything() -> None:
    async with bench() as caller:
        streaming, call = await caller.exchange(items(1))
        assert await streaming.more()
        waiting = await caller.open()
        await caller.client.aclose()
        await caller.client.aclose()
        for inbox in (streaming, waiting):
            inbox.items.clear()
            with pytest.raises(Disconnected):
                await inbox.more()
        assert await call.heard() is None
        with pytest.raises(ConnectFailed):
            await caller.open()


def test_a_handshake_is_what_the_tests_say() -> None:
    found = HandshakeReader().receive_data(encode_handshake("s"))
    assert found is not None
    assert msgspec.to_builtins(found[0]) == {"subject": "s", "stream_type": "response"}
