"""The worker's listener, seen by clients that are not ours: HTTP/1.1 as 1.2.1 speaks it, and HTTP/2 as anybody does."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset

from loopback.test_compatible_worker import Home
from stator.protocol.call_home import PROLOGUE, SENTINEL, STOP, read_prologue
from stator.protocol.control_message import CallHomeAddress, ConnectionInfo, ControlMessage, encode_control_message
from stator.protocol.http2_map import STREAM_TYPE
from stator.protocol.item_frame import FINAL, encode_item
from stator.protocol.two_part import TwoPartParser, encode_frame
from stator.runtime.context import Context
from stator.runtime.engine import generate_function
from stator.runtime.serving import Serving
from stator.testing.plane_pair import plane_host
from stator.testing.plane_suite import eventually
from stator.testing.recorded import recorded
from stator.transports.http2 import Http2Config
from stator.transports.http2.server import Http2Server

pytestmark = pytest.mark.timeout(30)

PATH = "10/generate"
TARGET = "/v1/rpc/10/generate"


async def count(request: Any, context: Context) -> AsyncIterator[Any]:
    for number in range(request["n"]):
        yield number


async def endless(request: Any, context: Context) -> AsyncIterator[Any]:
    while not context.is_stopped:
        yield "item"
        await asyncio.sleep(0.001)
    yield "bye"


class Bench:
    """A worker's listener with one handler."""

    def __init__(self, server: Http2Server, serving: Serving, contexts: list[Context], home: Home) -> None:
        self.server = server
        self.serving = serving
        self.contexts = contexts
        self.home = home

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    @property
    def url(self) -> str:
        return self.server.url + TARGET

    def message(self, request: bytes = b'{"n":2}', **fields: Any) -> bytes:
        """A TwoPart request that says where home is."""
        address = CallHomeAddress(address=f"127.0.0.1:{self.home.port}", subject="subj", context="c")
        message = ControlMessage(**{"id": "c", "connection_info": ConnectionInfo.of(address), **fields})
        return encode_frame(encode_control_message(message), request)


@asynccontextmanager
async def bench(handler: Any = count, **config: Any) -> AsyncIterator[Bench]:
    contexts: list[Context] = []
    generate = generate_function(handler)

    def start(request: Any, context: Context) -> AsyncIterator[Any]:
        contexts.append(context)
        return generate(request, context)

    host = plane_host(resolution=0.02)
    server = await Http2Server.listen(Http2Config(**config), host)
    serving = Serving(start, name="test.backend.generate")
    server.register(PATH, serving)
    home = Home()
    listener = await asyncio.start_server(home.taken, "127.0.0.1", 0)
    home.port = listener.sockets[0].getsockname()[1]
    try:
        yield Bench(server, serving, contexts, home)
    finally:
        listener.close()
        for writer in home.open:
            writer.transport.abort()
        await server.aclose()
        await eventually(lambda: serving.inflight == 0, what="handlers ended")
        await listener.wait_closed()
        assert server.open_streams == server.connections == 0
        assert server._desk.budget.out == 0  # pyright: ignore[reportPrivateUsage]
        assert len(host.wheel) == 0


# -- HTTP/1.1: the answer calls home


async def test_a_peer_of_the_older_release_is_answered_at_home() -> None:
    async with bench() as worker, aiohttp.ClientSession() as session:
        headers = {"content-type": "application/octet-stream", "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
        for _ in range(2):  # on one connection
            async with session.post(worker.url, data=worker.message(), headers=headers) as response:
                assert (response.status, await response.read()) == (202, b"")
            call = await worker.home.call()
            frames = await call.frames()
            assert [data for _, data in frames[2:4]] == [
                b'{"data":{"data":0},"complete_final":false}',
                b'{"data":{"data":1},"complete_final":false}',
            ]
            call.reset()
        assert worker.server.connections == 1
        assert worker.contexts[0].headers["traceparent"] == headers["traceparent"]


async def test_the_recorded_request_is_taken() -> None:
    async with bench() as worker:
        worker.server.register("generate", worker.serving)
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        writer.write(recorded("45-"))
        async with asyncio.timeout(5):
            status = await reader.readuntil(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 202 Accepted\r\n") and b"content-length: 0\r\n" in status.lower()
        assert worker.contexts == [] or worker.contexts[0].id == "my-ctx"
        await eventually(lambda: bool(worker.contexts), what="the handler was called")
        writer.close()


async def test_a_body_in_chunks_is_a_body() -> None:
    async def chunks(data: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(data), 50):
            yield data[start : start + 50]

    async with bench() as worker, aiohttp.ClientSession() as session:
        async with session.post(worker.url, data=chunks(worker.message())) as response:
            assert response.status == 202
        await (await worker.home.call()).to_end()


@pytest.mark.parametrize(
    ("method", "target", "status", "text"),
    [
        ("POST", "/v1/rpc/10/other", 404, b"Endpoint not found"),
        ("POST", "/", 404, b"Endpoint not found"),
        ("GET", TARGET, 405, b""),
        ("PUT", TARGET, 405, b""),
    ],
)
async def test_other_requests_have_a_status(method: str, target: str, status: int, text: bytes) -> None:
    async with bench() as worker, aiohttp.ClientSession() as session:
        async with session.request(method, worker.server.url + target, data=b"x") as response:
            assert (response.status, await response.read()) == (status, text)
        assert worker.server.counts == {str(status): 1}


async def test_a_stream_over_http1_is_refused_with_a_reason() -> None:
    async with bench() as worker, aiohttp.ClientSession(headers={"content-type": STREAM_TYPE}) as session:
        response = await session.post(worker.url, data=b"x")
        assert response.status == 505
        assert b"HTTP/2" in await response.read()


async def test_a_request_that_is_too_large_is_refused() -> None:
    async with bench(max_request=65_536) as worker, aiohttp.ClientSession() as session:
        response = await session.post(worker.url, data=worker.message(b'"' + b"x" * 70_000 + b'"'))
        assert response.status == 413


async def test_a_body_that_does_not_come_is_a_timeout() -> None:
    async with bench(arrival_timeout=0.2) as worker:
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        writer.write(f"POST {TARGET} HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\nabc".encode())
        async with asyncio.timeout(5):
            assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_a_client_that_hangs_up_in_mid_body_leaves_nothing() -> None:
    async with bench() as worker:
        _, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        writer.write(f"POST {TARGET} HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\nabc".encode())
        await eventually(lambda: worker.server.connections == 1, what="the connection is there")
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await eventually(lambda: worker.server.connections == 0, what="the connection ended")


@pytest.mark.parametrize("said", [b"", b"P", b"PRI * HTTP/2.0\r\n", b"GET / HTTP/1.1\r\n"])
async def test_a_client_that_says_too_little_is_cut(said: bytes) -> None:
    async with bench(connect_timeout=0.2) as worker:
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        writer.write(said)
        async with asyncio.timeout(5):
            with pytest.raises((ConnectionError, EOFError)):
                await reader.readexactly(1)
        writer.close()


async def test_fields_without_end_are_refused() -> None:
    async with bench() as worker:
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        writer.write(b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000)
        async with asyncio.timeout(5):
            assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
        writer.close()


async def test_a_client_that_speaks_tls_is_told_and_counted() -> None:
    async with bench() as worker:
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        writer.write(b"\x16\x03\x01\x00\x05hello")
        async with asyncio.timeout(5):
            assert (await reader.read())[:1] == b"\x15"
        assert worker.server._host.refusals.of("encrypted") == 1  # pyright: ignore[reportPrivateUsage]
        writer.close()


# -- HTTP/2


class RawClient:
    """The library `h2` on a stream of sockets: as far from our session as can be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(2**24)
        self.fields: dict[int, dict[str, str]] = {}
        self.bodies: dict[int, bytes] = {}
        self.done: dict[int, str] = {}
        self.flush()

    @classmethod
    async def connect(cls, port: int) -> "RawClient":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    def ask(
        self,
        body: bytes,
        *,
        end: bool,
        target: str = TARGET,
        method: str = "POST",
        content_type: str = STREAM_TYPE,
        more: tuple[tuple[str, str], ...] = (),
    ) -> int:
        number = self.h2.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", "http"), (":authority", "worker"), (":path", target)]
        self.h2.send_headers(number, [*pseudo, ("content-type", content_type), *more])
        for start in range(0, len(body), 16_000):
            self.h2.send_data(number, body[start : start + 16_000])
        if end:
            self.h2.end_stream(number)
        self.flush()
        return number

    def say(self, number: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(number, data, end_stream=end)
        self.flush()

    async def until(self, number: int, text: bytes = b"\0never") -> bytes:
        """The body of a stream up to the chunk that brings `text`, or to its end."""
        async with asyncio.timeout(5):
            while text not in self.bodies.get(number, b"") and number not in self.done and await self.step():
                pass
        return self.bodies.get(number, b"")

    async def step(self) -> bool:
        """Take what comes next; False at the end of the connection."""
        data = await self.reader.read(65_536)
        for event in self.h2.receive_data(data):
            self._take(event)
        self.flush()
        return bool(data)

    async def pour(self, number: int, data: bytes) -> None:
        """Say `data` as fast as windows allow, until it is said or the stream has ended."""
        async with asyncio.timeout(10):
            while data and number not in self.done:
                room = min(self.h2.local_flow_control_window(number), 16_000)
                if room:
                    self.say(number, data[:room])
                    data = data[room:]
                else:
                    await self.step()

    def _take(self, event: Any) -> None:
        if isinstance(event, ResponseReceived):
            self.fields[event.stream_id] = dict(event.headers)  # type: ignore[arg-type]
        elif isinstance(event, DataReceived):
            self.bodies[event.stream_id] = self.bodies.get(event.stream_id, b"") + event.data
            if event.flow_controlled_length and event.stream_ended is None:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, StreamEnded):
            self.done[event.stream_id] = "ended"
        elif isinstance(event, StreamReset):
            self.done.setdefault(event.stream_id, f"reset {int(event.error_code)}")
        elif isinstance(event, ConnectionTerminated):
            self.done[0] = f"goaway {int(event.error_code or 0)} {event.additional_data!r}"

    async def __aenter__(self) -> "RawClient":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.writer.transport.abort()


def request(payload: bytes = b'{"n":2}', **head: Any) -> bytes:
    return encode_frame(json.dumps({"id": "r1", **head}).encode(), payload)


async def test_the_response_body_is_what_the_document_says() -> None:
    async with bench() as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(request(), end=True, more=(("traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"),))
        body = await client.until(number)
        assert body == PROLOGUE + encode_item(0, "json") + encode_item(1, "json") + FINAL["json"] + SENTINEL
        assert client.fields[number] == {":status": "200", "content-type": STREAM_TYPE}
        assert client.done == {number: "ended"}
        assert worker.contexts[0].headers["traceparent"].startswith("00-aaa")


async def test_a_stop_is_a_frame_of_the_request_body() -> None:
    async with bench(endless) as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(request(), end=False)
        await client.until(number, b'"item"')
        client.say(number, STOP)
        assert (await client.until(number)).endswith(encode_item("bye", "json") + FINAL["json"] + SENTINEL)
        client.h2.end_stream(number)
        client.flush()
        await eventually(lambda: worker.server.open_streams == 0, what="the stream ended on both sides")


async def test_a_client_that_ended_its_body_is_no_client_that_wants_to_stop() -> None:
    async with bench() as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(request(b'{"n":100}'), end=True)
        assert (await client.until(number)).count(b'"complete_final":false') == 100
        assert not worker.contexts[0].is_stopped


async def test_a_reset_kills() -> None:
    async with bench(endless) as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(request(), end=False)
        await client.until(number, b'"item"')
        client.h2.reset_stream(number, 8)
        client.flush()
        await eventually(lambda: worker.contexts[0].is_killed, what="the handler was told")
        await eventually(lambda: worker.server.open_streams == 0, what="nothing is left")


async def test_a_stream_that_its_client_does_not_end_is_reset_after_a_while() -> None:
    async with bench(linger=0.2) as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(request(), end=False)
        await client.until(number)
        assert worker.server.open_streams == 1
        await eventually(lambda: worker.server.open_streams == 0, what="the stream was reset")


@pytest.mark.parametrize(
    ("body", "facts", "status", "text"),
    [
        (request(), {"target": "/v1/rpc/10/other"}, "404", "no such endpoint"),
        (request(), {"target": "/elsewhere"}, "404", "no such endpoint"),
        (request(b"{"), {}, "400", "is not json"),
        (request(b""), {}, "400", "is not json"),
        (encode_frame(b"[]", b"1"), {}, "400", "request header cannot be read"),
        (request()[:-1], {}, "400", "ended inside of its first frame"),
        (b"", {}, "400", "ended inside of its first frame"),
        (b"\xff" * 24, {}, "400", "larger than the limit"),
        (request(b"", request_type="many_in"), {}, "400", "call it with generate"),
    ],
)
async def test_refusals_have_a_status_and_say_why(body: bytes, facts: dict[str, Any], status: str, text: str) -> None:
    async with bench() as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(body, end=True, **facts)
        answer = await client.until(number)
        assert client.fields[number] == {":status": status, "content-type": STREAM_TYPE}
        (header, data), last = TwoPartParser(limit=10_000).receive_data(answer)
        refusal = read_prologue(header, data)
        assert refusal is not None and text in refusal.message
        assert last == (b'"sentinel"', b"")
        assert worker.server.counts[status] == 1
        assert worker.contexts == []


async def test_a_request_that_does_not_arrive_in_time_is_told_so() -> None:
    async with bench(arrival_timeout=0.2) as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(request()[:20], end=False)
        assert b"did not arrive" in await client.until(number)
        assert client.fields[number][":status"] == "504"


async def test_requests_that_arrive_share_a_space() -> None:
    space = {"request_budget": 2**20, "max_request": 2**21}
    async with bench(**space) as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(b"", end=False)
        await client.pour(number, request(b'"' + b"x" * 1_100_000 + b'"'))
        assert b"no space" in await client.until(number)
        assert client.fields[number][":status"] == "503"
        small = client.ask(request(), end=True)
        assert b'"sentinel"' in await client.until(small)


async def test_a_pushed_request_over_http2_is_answered_at_home() -> None:
    async with bench() as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(worker.message(), end=True, content_type="application/octet-stream")
        assert await client.until(number) == b""
        assert client.fields[number] == {":status": "202", "content-length": "0"}
        await (await worker.home.call()).to_end()
        lost = client.ask(worker.message(), end=True, content_type="application/octet-stream", target="/v1/rpc/1/x")
        assert await client.until(lost) == b"Endpoint not found"
        assert client.fields[lost][":status"] == "404"
        read = client.ask(b"", end=True, method="GET")
        await client.until(read)
        assert client.fields[read] == {":status": "405", "content-length": "0", "allow": "POST"}


async def test_a_connection_too_many_is_closed() -> None:
    async with bench(connections=1) as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(request(), end=True)
        await client.until(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        assert worker.server.counts == {"connections": 1}
        again = client.ask(request(), end=True)
        assert b'"sentinel"' in await client.until(again)


async def test_a_worker_that_drains_says_so_and_resets_what_is_new() -> None:
    async with bench(endless) as worker, await RawClient.connect(worker.port) as client:
        number = client.ask(request(), end=False)
        await client.until(number, b'"item"')
        worker.server.drain()
        heard = b""
        async with asyncio.timeout(5):
            while b"stator: the worker is draining" not in heard:
                heard += await client.reader.read(65_536)
        assert not worker.contexts[0].is_stopped
