"""The worker's side of the compatible plane, seen by a client that is nothing but sockets."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any

import msgspec
import pytest

from stator.protocol.call_home import KILL, PROLOGUE, STOP, read_prologue
from stator.protocol.control_message import CallHomeAddress, ConnectionInfo, ControlMessage, encode_control_message
from stator.protocol.request_frame import encode_request_frame
from stator.protocol.two_part import TwoPartParser, encode_frame
from stator.runtime.admission import Admission, AdmissionConfig
from stator.runtime.context import Context
from stator.runtime.engine import generate_function
from stator.runtime.serving import Serving
from stator.tasks import DeadlineWheel, SystemClock
from stator.testing.plane_suite import eventually
from stator.testing.recorded import recorded
from stator.transports.plane import PlaneHost
from stator.transports.tcp import CompatibleServer, TcpConfig

pytestmark = pytest.mark.timeout(30)

PATH = "123456789abcdef/generate"
RESET = struct.pack("ii", 1, 0)


class Home:
    """A bare call-home listener and the connections it took."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.port = 0
        self.open: list[asyncio.StreamWriter] = []

    async def taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.append(writer)
        self.calls.put_nowait((reader, writer))

    async def call(self) -> "Call":
        async with asyncio.timeout(5):
            return Call(*await self.calls.get())


class Call:
    """One call-home connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.received = b""

    async def until(self, text: bytes) -> bytes:
        """Everything up to the chunk that brings `text`, or to the end of the connection."""
        async with asyncio.timeout(5):
            while text not in self.received:
                chunk = await self.reader.read(65536)
                if not chunk:
                    break
                self.received += chunk
        return self.received

    async def to_end(self) -> bytes:
        """Everything up to the sentinel."""
        return await self.until(b'"sentinel"')

    async def frames(self) -> list[tuple[bytes, bytes]]:
        return list(TwoPartParser(limit=2**27).receive_data(await self.to_end()))

    async def refusal(self) -> str:
        """The text of a negative prologue."""
        frames = await self.frames()
        error = read_prologue(*frames[1])
        assert error is not None
        assert frames[2:] == [(b'"sentinel"', b"")]
        return msgspec.json.decode(frames[1][0])["error"]

    def reset(self) -> None:
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.writer.transport.abort()


class Bench:
    """A worker plane with one handler, a request connection to it, and a home for its answers."""

    def __init__(self, server: CompatibleServer, serving: Serving, home: Home) -> None:
        self.server = server
        self.serving = serving
        self.home = home
        self.contexts: list[Context] = []
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    def frame(
        self,
        request: bytes = b'{"n":2}',
        *,
        path: str = PATH,
        subject: str = "subj-30-worker-stream-json-ok",
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> bytes:
        address = CallHomeAddress(address=f"127.0.0.1:{self.home.port}", subject=subject, context="c")
        message = ControlMessage(**{"id": "c", "connection_info": ConnectionInfo.of(address), **fields})
        return encode_request_frame(path, headers or {}, encode_frame(encode_control_message(message), request))

    def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    async def acknowledgement(self) -> bytes:
        async with asyncio.timeout(5):
            size = await self.reader.readexactly(4)
            return size + await self.reader.readexactly(int.from_bytes(size, "big"))


async def count(request: Any, context: Context) -> AsyncIterator[Any]:
    for number in range(request["n"]):
        yield {"token_ids": [number], "text": "tok"}


async def endless(request: Any, context: Context) -> AsyncIterator[Any]:
    while not context.is_stopped:
        yield "item"
        await asyncio.sleep(0.001)


async def silent(request: Any, context: Context) -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield


@asynccontextmanager
async def bench(
    handler: Any = count, *, admission: Admission | None = None, bidirectional: bool = False, **config: Any
) -> AsyncIterator[Bench]:
    wheel = DeadlineWheel(asyncio.get_running_loop(), resolution=0.02)
    host = PlaneHost(
        process="a" * 32,
        bind_host="127.0.0.1",
        advertise_host="127.0.0.1",
        socket_directory=None,
        wheel=wheel,
        clock=SystemClock(),
        random=Random(1),
        observer=None,
    )
    server = await CompatibleServer.listen(TcpConfig(**config), host)
    home = Home()
    listener = await asyncio.start_server(home.taken, "127.0.0.1", 0)
    home.port = listener.sockets[0].getsockname()[1]
    generate = generate_function(handler)
    bench: Bench

    def noted(request: Any, context: Context) -> AsyncIterator[Any]:
        bench.contexts.append(context)
        return generate(request, context)

    serving = Serving(noted, name="test.backend.generate", admission=admission, bidirectional=bidirectional)
    bench = Bench(server, serving, home)
    server.register(PATH, bench.serving)
    address, _, port = server.address.rpartition(":")
    bench.reader, bench.writer = await asyncio.open_connection(address, int(port))
    try:
        yield bench
        for writer in home.open:
            writer.transport.abort()
        await eventually(lambda: bench.serving.inflight == 0, what="handlers ended")
        await eventually(lambda: server.open_streams == 0, what="answers ended")
    finally:
        for writer in (bench.writer, *home.open):
            writer.transport.abort()
        listener.close()
        await server.aclose()
        await asyncio.sleep(0.01)  # uvloop closes handles in its own time
        await eventually(lambda: len(wheel) == 0, what="no deadline armed")


# -- streams


@pytest.mark.parametrize(
    ("codec", "name", "request_bytes"), [("json", "30-", b'{"n":2}'), ("msgpack", "31-", b"\x81\xa1n\x02")]
)
async def test_an_answer_has_the_recorded_bytes(codec: str, name: str, request_bytes: bytes) -> None:
    subject = {"json": "subj-30-worker-stream-json-ok", "msgpack": "subj-31-worker-stream-msgpack-ok"}[codec]
    async with bench() as worker:
        worker.send(worker.frame(request_bytes, subject=subject, payload_codec=codec))
        assert await worker.acknowledgement() == recorded("20-")
        assert await (await worker.home.call()).to_end() == recorded(name)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
async def test_a_request_in_pieces(chunk: int) -> None:
    async with bench() as worker:
        data = worker.frame() + worker.frame()
        for start in range(0, len(data), chunk):
            worker.send(data[start : start + chunk])
            await asyncio.sleep(0)
        for _ in range(2):
            assert await worker.acknowledgement() == recorded("20-")
            assert await (await worker.home.call()).to_end() == recorded("30-")


async def test_a_socket_without_delay_in_both_roles() -> None:
    async with bench(endless) as worker:
        worker.send(worker.frame())
        await worker.home.call()
        (answer,) = worker.server._reception.answers  # pyright: ignore[reportPrivateUsage]
        transport: Any = answer._transport  # pyright: ignore[reportPrivateUsage]
        assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_request_facts() -> None:
    async with bench() as worker:
        headers = {"traceparent": "t", "request-id": "other", "baggage": "b"}
        worker.send(worker.frame(headers=headers, metadata={"a": "b"}))
        await (await worker.home.call()).to_end()
        (context,) = worker.contexts
        assert (context.id, context.metadata, context.headers) == ("c", {"a": "b"}, {"traceparent": "t"})


# -- acknowledgements


async def test_an_unknown_endpoint_is_named_and_told_at_home() -> None:
    async with bench() as worker:
        worker.send(worker.frame(path="deadbeef/nope"), worker.frame())
        assert await worker.acknowledgement() == recorded("21-")
        assert await worker.acknowledgement() == recorded("20-")
        texts = {await (await worker.home.call()).to_end() for _ in range(2)}
        assert recorded("30-") in texts
        (other,) = texts - {recorded("30-")}
        assert b"no endpoint is served at deadbeef/nope" in other


async def test_a_path_that_is_not_utf8() -> None:
    async with bench() as worker:
        worker.send(b"\x00\x02\xff\xfe\x00\x00\x00\x00\x00\x00", worker.frame())
        assert await worker.acknowledgement() == recorded("24-")
        assert await worker.acknowledgement() == recorded("20-")
        await (await worker.home.call()).to_end()


async def test_a_request_that_is_too_large() -> None:
    async with bench() as worker:
        start = b"\x00\x01x\x00\x02{}" + (34_603_008).to_bytes(4, "big")
        worker.send(worker.frame(), start + bytes(1_000_000))
        assert await worker.acknowledgement() == recorded("20-")
        assert await worker.acknowledgement() == recorded("23-")
        worker.send(bytes(1_000_000))
        async with asyncio.timeout(5):
            assert await worker.reader.read() == b""
        await (await worker.home.call()).to_end()


async def test_the_largest_request() -> None:
    async with bench(max_message_size=1_000_000) as worker:
        empty = len(worker.frame(b'{"n":2,"x":""}'))
        worker.send(worker.frame(b'{"n":2,"x":"%s"}' % (b"x" * (1_000_000 - empty))))
        assert await worker.acknowledgement() == recorded("20-")
        assert await (await worker.home.call()).to_end() == recorded("30-")


async def test_slots_queue_and_refusal() -> None:
    async with bench(silent, admission=Admission(AdmissionConfig(slots=1, queue=2))) as worker:
        worker.send(*(worker.frame(subject=f"s{number}") for number in range(5)))
        got = [await worker.acknowledgement() for _ in range(5)]
        assert got[:3] == [recorded("20-")] * 3
        assert all(each[4:].startswith(recorded("22-")[4:] + b": ") for each in got[3:])
        first = await worker.home.call()
        await asyncio.sleep(0.05)
        assert worker.home.calls.empty()
        assert worker.server.open_streams == 3
        first.writer.write(KILL)
        second = await worker.home.call()
        assert b'"s1"' in await second.until(PROLOGUE)
        second.reset()
        await worker.home.call()


async def test_a_draining_worker_takes_nothing_new() -> None:
    async with bench() as worker:
        worker.serving.drain()
        worker.send(worker.frame())
        assert (await worker.acknowledgement())[4:] == b"Server unavailable: endpoint test.backend.generate is draining"
        worker.server.drain()
        worker.send(worker.frame())
        assert (await worker.acknowledgement())[4:].startswith(b"Server unavailable:")


async def test_acknowledgements_are_delivered_after_a_half_close() -> None:
    async with bench() as worker:
        worker.send(worker.frame())
        worker.writer.write_eof()
        assert await worker.acknowledgement() == recorded("20-")
        async with asyncio.timeout(5):
            assert await worker.reader.read() == b""
        assert await (await worker.home.call()).to_end() == recorded("30-")


async def test_a_request_is_answered_although_its_connection_ended() -> None:
    async with bench() as worker:
        worker.send(worker.frame())
        worker.writer.close()
        assert await (await worker.home.call()).to_end() == recorded("30-")


# -- requests that cannot be served


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda worker: worker.frame(b"{"), "is not json"),
        (lambda worker: worker.frame(b""), "is not json"),
        (lambda worker: worker.frame(b"\xc1", payload_codec="msgpack"), "is not msgpack"),
        (lambda worker: worker.frame(payload_codec="protobuf"), "protobuf"),
        (lambda worker: worker.frame(request_type="many_in"), "bidirectional"),
        (lambda worker: worker.frame(id="another"), "belongs to another request"),
        (lambda worker: worker.frame().replace(b'"request_type":"single_in"', b'"request_type":[1,2,3,4,5]'), "request_type"),
    ],
)
async def test_a_request_that_cannot_be_read_is_refused_at_home(make: Callable[[Bench], bytes], text: str) -> None:
    async with bench() as worker:
        worker.send(make(worker))
        assert await worker.acknowledgement() == recorded("20-")
        assert text in await (await worker.home.call()).refusal()
        assert worker.contexts == []


@pytest.mark.parametrize("payload", [b"", b"x" * 10, b"\xff" * 24, encode_frame(b"{}", b"1"), encode_frame(b"[" * 5000, b"1")])
async def test_a_request_that_does_not_say_where_home_is(payload: bytes) -> None:
    async with bench() as worker:
        worker.send(encode_request_frame(PATH, {}, payload), worker.frame())
        assert await worker.acknowledgement() == recorded("20-")
        assert await worker.acknowledgement() == recorded("20-")
        assert await (await worker.home.call()).to_end() == recorded("30-")


async def test_a_client_that_cannot_be_reached_kills_its_request() -> None:
    async with bench(endless) as worker:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = CallHomeAddress(address=f"127.0.0.1:{unused.getsockname()[1]}", subject="s", context="c")
            worker.send(worker.frame(connection_info=ConnectionInfo.of(address)))
            assert await worker.acknowledgement() == recorded("20-")
            await eventually(lambda: bool(worker.contexts) and worker.contexts[0].is_killed, what="the request was killed")


# -- the client's side of a stream


async def test_stop() -> None:
    async with bench(endless) as worker:
        worker.send(worker.frame())
        call = await worker.home.call()
        call.writer.write(STOP)
        frames = await call.frames()
        assert frames[-2:] == [(b"", b'{"complete_final":true}'), (b'"sentinel"', b"")]
        assert not worker.contexts[0].is_killed


@pytest.mark.parametrize(
    "data",
    [KILL, encode_frame(b'"pause"'), encode_frame(b"", b"data"), encode_frame(), b"\xff" * 30, STOP + KILL],
    ids=["kill", "pause", "data", "empty", "garbage", "stop and kill"],
)
@pytest.mark.parametrize("handler", [endless, silent])
async def test_everything_else_is_a_kill(data: bytes, handler: Any) -> None:
    async with bench(handler) as worker:
        worker.send(worker.frame())
        call = await worker.home.call()
        await call.until(PROLOGUE)
        call.writer.write(data)
        await eventually(lambda: worker.contexts[0].is_killed, what="killed")
        await eventually(lambda: worker.server.open_streams == 0, what="the connection ended")


@pytest.mark.parametrize("handler", [endless, silent])
async def test_a_reset_is_a_kill(handler: Any) -> None:
    async with bench(handler) as worker:
        worker.send(worker.frame())
        call = await worker.home.call()
        await call.until(PROLOGUE)
        call.reset()
        await eventually(lambda: worker.contexts[0].is_killed, what="killed")


@pytest.mark.parametrize("handler", [endless, silent])
async def test_a_client_that_is_gone_is_told_from_one_that_only_shut_its_side(handler: Any) -> None:
    """Both send a FIN. A frame that readers skip finds out, even where the handler says nothing."""
    async with bench(handler) as worker:
        worker.send(worker.frame(subject="half"), worker.frame(subject="gone"))
        calls = {}
        for _ in range(2):
            call = await worker.home.call()
            calls["half" if b'"half"' in await call.until(PROLOGUE) else "gone"] = call
        half, gone = worker.contexts
        calls["half"].writer.write_eof()
        calls["gone"].writer.close()
        await eventually(lambda: gone.is_killed, what="the one that is gone was killed")
        await asyncio.sleep(0.2)
        assert not half.is_killed
        calls["half"].reset()


async def test_a_client_that_shut_its_side_gets_its_answer() -> None:
    async def later(request: Any, context: Context) -> AsyncIterator[Any]:
        yield 1
        await asyncio.sleep(0.3)
        yield 2

    async with bench(later) as worker:
        worker.send(worker.frame())
        call = await worker.home.call()
        call.writer.write_eof()
        frames = [frame for frame in await call.frames() if frame != (b"", b"")]
        assert [data for _, data in frames[2:4]] == [b'{"data":{"data":%d},"complete_final":false}' % n for n in (1, 2)]
        assert frames[-1] == (b'"sentinel"', b"")
        async with asyncio.timeout(5):
            assert await call.reader.read() == b""
        assert not worker.contexts[0].is_killed


async def test_a_finished_answer_waits_for_its_client_but_not_for_ever() -> None:
    async with bench(linger=0.3) as worker:
        worker.send(worker.frame())
        call = await worker.home.call()
        await call.to_end()
        await asyncio.sleep(0.15)
        assert worker.server.open_streams == 1
        assert worker.serving.inflight == 0
        await eventually(lambda: worker.server.open_streams == 0, within=1, what="the worker closed")


async def test_a_client_that_does_not_read_suspends_the_handler() -> None:
    sent = 0

    async def floods(request: Any, context: Context) -> AsyncIterator[Any]:
        nonlocal sent
        while True:
            yield "x" * 10_000
            sent += 1

    async with bench(floods) as worker:
        worker.send(worker.frame())
        call = await worker.home.call()
        call.writer.transport.pause_reading()
        before = -1

        def settled() -> bool:
            nonlocal before
            was, before = before, sent
            return was == sent > 0

        async with asyncio.timeout(20):
            while not settled():
                await asyncio.sleep(0.1)
        (answer,) = worker.server._reception.answers  # pyright: ignore[reportPrivateUsage]
        assert answer._queued <= 64  # pyright: ignore[reportPrivateUsage]
        transport: Any = answer._transport  # pyright: ignore[reportPrivateUsage]
        assert transport.get_write_buffer_size() <= 64 * 11_000
        call.writer.transport.resume_reading()
        async with asyncio.timeout(5):
            while sent <= before + 100:  # and the handler goes on
                assert await call.reader.read(65536)
        call.reset()


async def test_closing_the_plane_cuts_streams_and_connections() -> None:
    async with bench(endless) as worker:
        worker.send(worker.frame())
        call = await worker.home.call()
        await call.until(PROLOGUE)
        await worker.server.aclose()
        await worker.server.aclose()
        with suppress(ConnectionResetError):
            async with asyncio.timeout(5):
                await call.reader.read()
        assert worker.contexts[0].is_killed
        assert worker.server.open_streams == 0
