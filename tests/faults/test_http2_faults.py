"""The HTTP/2 plane when something is broken: the way, the bytes, the other side's patience."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random
from struct import pack
from typing import Any

import msgspec
import pytest

from loopback.test_http2_plane import http2_pair
from loopback.test_http2_worker import RawClient, bench, request
from loopback.test_http2_worker import endless as talks
from stator.errors import Cancelled, Disconnected, PeerProtocolError, StatorError, StreamIncomplete
from stator.protocol.call_home import KILL, PROLOGUE, SENTINEL, STOP
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_frames import PREFACE, FrameViolation, Goaway, encode_goaway
from stator.protocol.http2_library import SessionLimits
from stator.protocol.http2_map import BodyReader, Said, encode_request
from stator.protocol.http2_session import Session, Verdict
from stator.protocol.item_frame import FINAL, encode_item
from stator.protocol.records import EndpointRecord, Transport
from stator.protocol.response_stream import ResponseReader
from stator.protocol.stream import Receiver
from stator.protocol.two_part import encode_frame
from stator.runtime.context import Context
from stator.tasks import DeadlineWheel
from stator.testing.plane_suite import Caller, count, drain, endless, eventually
from stator.transports.http2 import Http2Config
from stator.transports.http2.server import Http2Server
from stator.transports.inbox import Inbox

pytestmark = pytest.mark.timeout(60)


# -- the way


class Proxy:
    """Carries bytes between callers and one worker; `flowing` stops it without a word, `cut` resets both sides."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers += (writer, back)
        loop = asyncio.get_running_loop()
        for source, sink in ((reader, back), (there, writer)):
            task = loop.create_task(self._carry(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                await self.flowing.wait()
                writer.write(data)
                await writer.drain()
            writer.write_eof()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def aclose(self) -> None:
        self.cut()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def through_a_proxy(handler: Any, **config: Any) -> AsyncIterator[tuple[Caller, Proxy, EndpointRecord]]:
    async with http2_pair(Http2Config(**config), resolution=0.02) as pair:
        assert isinstance(pair.server, Http2Server)
        proxy = Proxy(int(pair.server.url.rpartition(":")[2]))
        listener = await asyncio.start_server(proxy.taken, "127.0.0.1", 0)
        proxy.port = listener.sockets[0].getsockname()[1]
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), handler, "generate")
        url = (caller.record.transport.http or "").replace(str(proxy.target), str(proxy.port))
        try:
            yield caller, proxy, msgspec.structs.replace(caller.record, transport=Transport(http=url))
            await eventually(lambda: caller.serving.inflight == 0, what="handlers ended")
            await eventually(lambda: pair.open_streams() == 0, what="no stream left")
        finally:
            await proxy.aclose()
            listener.close()
            await listener.wait_closed()


async def test_a_way_that_is_cut_ends_both_sides_and_the_next_request_finds_another() -> None:
    async with through_a_proxy(endless) as (caller, proxy, record):
        inbox = await caller.open(record=record)
        assert await inbox.more()
        proxy.cut()
        with pytest.raises(StreamIncomplete):
            await drain(inbox)
        await eventually(lambda: caller.contexts[0].is_killed, what="the handler was told")
        again = await caller.open(record=record, id="again")
        assert await again.more()
        again.stop()
        await drain(again)


async def test_silence_on_the_way_is_noticed_by_both_sides() -> None:
    async def waits(inputs: Any, context: Context) -> AsyncIterator[Any]:
        yield 1
        await asyncio.Event().wait()

    patience = {"keep_alive_interval": 0.2, "keep_alive_timeout": 0.2}
    async with through_a_proxy(waits, **patience) as (caller, proxy, record):
        inbox = await caller.open(record=record)
        assert await inbox.more()
        await asyncio.sleep(0.6)  # answered pings keep it
        assert not inbox.ended and not caller.contexts[0].is_killed
        proxy.flowing.clear()
        async with asyncio.timeout(5):
            with pytest.raises(StreamIncomplete):
                await drain(inbox)
        await eventually(lambda: caller.contexts[0].is_killed, what="the handler was told")


async def test_a_worker_that_shuts_its_side_has_ended() -> None:
    async with http2_pair() as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), endless, "generate")
        assert isinstance(pair.server, Http2Server)
        inbox = await caller.open()
        assert await inbox.more()
        (connection,) = pair.server._sessions  # pyright: ignore[reportPrivateUsage]
        assert connection._transport is not None  # pyright: ignore[reportPrivateUsage]
        connection._transport.write_eof()  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(Disconnected):
            await drain(inbox)
        await eventually(lambda: caller.contexts[0].is_killed, what="the handler was told")


async def test_a_client_that_does_not_read_stops_the_handler_and_no_other() -> None:
    async def floods(request: Any, context: Context) -> AsyncIterator[Any]:
        while True:
            yield "x" * 1000

    async with bench(floods) as worker:
        async with await RawClient.connect(worker.port) as deaf, await RawClient.connect(worker.port) as quick:
            deaf.ask(request(), end=False)
            await eventually(lambda: len(worker.contexts) == 1, what="the request was taken")
            number = quick.ask(request(), end=False)
            for _ in range(50):
                await quick.until(number, b'"never"') if number in quick.done else await quick.step()
            (stuck, *_) = [each for each in worker.contexts if not each.is_killed]
            before = stuck.sent_bytes  # type: ignore[attr-defined]
            for _ in range(50):
                await quick.step()
            assert stuck.sent_bytes == before < 1_000_000  # type: ignore[attr-defined]
        await eventually(lambda: worker.serving.inflight == 0, what="handlers ended")


# -- cancellation


async def test_a_thousand_requests_cancelled_anywhere_leave_nothing() -> None:
    random = Random(20_261)
    async with http2_pair() as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), count, "generate")
        assert await caller.collect({"n": 1}) == [0]
        tasks = len(asyncio.all_tasks())

        async def abandoned(number: int) -> None:
            inbox: Inbox | None = None

            async def whole() -> list[Any]:
                nonlocal inbox
                inbox = await caller.open({"n": 20}, id=f"r{number}")
                return await drain(inbox)

            task = asyncio.get_running_loop().create_task(whole())
            for _ in range(random.randrange(30)):
                await asyncio.sleep(0)
            if random.random() < 0.5:
                task.cancel()
                await asyncio.wait([task])
            if inbox is not None:
                inbox.kill()
            with suppress(Cancelled, asyncio.CancelledError):
                assert await task == list(range(20))

        for batch in range(20):
            await asyncio.gather(*(abandoned(50 * batch + each) for each in range(50)))
        await eventually(lambda: caller.serving.inflight == 0, what="handlers ended")
        await eventually(lambda: pair.open_streams() == 0, what="streams closed")
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks, what="no task left")


# -- the bytes


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 1) -> bytes:
    return pack(">I", len(payload))[1:] + bytes((kind, flags)) + pack(">I", stream) + payload


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", b"not HTTP/2"),
        (frame(0, b"x" * 20), b"not HTTP/2"),
        (frame(4, b"12345", stream=0), b"not HTTP/2"),
        (frame(1, b"\xff\xff\xff\xff", flags=4), b"header block"),
        (b"\xff" * 9, b"allowed are 1048576"),
        (frame(1, b"x" * 16_000) + frame(9, b"x" * 16_000) * 9, b"header block of more than 131072"),
        (frame(6, b"12345678", stream=0) * 20_000, b"frames per second that carry nothing"),
        (frame(3, b"\0\0\0\x08", stream=1), b"not HTTP/2"),
        (frame(8, b"\0\0\0\0", stream=0), b"not HTTP/2"),
    ],
)
async def test_a_client_that_breaks_the_protocol_is_told_counted_and_cut(said: bytes, reason: bytes) -> None:
    async with bench(talks) as worker, await RawClient.connect(worker.port) as neighbour:
        number = neighbour.ask(request(), end=False)
        await neighbour.until(number, b'"item"')
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        writer.write(PREFACE + frame(4, stream=0) + (said or frame(5, b"\0\0\0\2", flags=4)))
        heard = b""
        async with asyncio.timeout(5):
            with suppress(ConnectionError):
                while data := await reader.read(65_536):
                    heard += data
        if len(said) < 20_000:
            assert reason in heard
        writer.close()
        await eventually(lambda: worker.server.counts.get("protocol") == 1, what="it was counted")
        seen = len(neighbour.bodies[number])
        await neighbour.step()
        assert len(neighbour.bodies[number]) > seen


async def test_rapid_resets_end_the_connection() -> None:
    async with bench(talks) as worker:
        limits = worker.server._limits  # pyright: ignore[reportPrivateUsage]
        worker.server._limits = msgspec.structs.replace(limits, idle_rate=10.0, idle_burst=500.0)  # pyright: ignore[reportPrivateUsage]
        client = await RawClient.connect(worker.port)
        for _ in range(2000):
            client.h2.reset_stream(client.ask(b"", end=False), 8)
        client.flush()
        heard = b""
        async with asyncio.timeout(10):
            with suppress(ConnectionError):
                while data := await client.reader.read(65_536):
                    heard += data
        assert b"carry nothing" in heard
        client.writer.transport.abort()
        await eventually(lambda: worker.server.counts.get("protocol") == 1, what="the flood was counted")


class Quiet(Exchange):
    """The worker's end of a mutated stream: reads the body as the plane does, answers some."""

    def __init__(self, session: Session, random: Random) -> None:
        super().__init__()
        self.owner = session
        self.random = random
        self.reader = BodyReader(limit=50_000)
        self.over = False

    def data(self, data: bytes) -> None:
        if self.over:
            return
        try:
            for event in self.reader.receive_data(data):
                if event is Said.KILL:
                    self.over = True
                    self.reset(8)
        except PeerProtocolError:
            self.over = True
            self.reset(1)
        self.release()
        if self.random.random() < 0.3 and not self.over:
            self.over = True
            self.owner.respond(self, [(b":status", b"200")])
            self.push(PROLOGUE + FINAL["json"] + SENTINEL)
            self.finish()

    def lost(self, error: StatorError) -> None:
        self.over = True


class Reading(Exchange):
    """The caller's end of a mutated stream."""

    def __init__(self) -> None:
        super().__init__()
        self.receiver = Receiver()
        self.reader = ResponseReader(self.receiver, limit=50_000, window=2**62)

    def data(self, data: bytes) -> None:
        try:
            if not self.reader.closed:
                self.reader.receive_data(data)
        except PeerProtocolError:
            self.reset(8)
        self.receiver.items.clear()
        self.release()

    def ended(self) -> None:
        self.finish()


ASK = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/")]


def body_of(random: Random) -> bytes:
    head = encode_request(RequestEnvelope(id="r", payload=b"1", streams_in=random.random() < 0.5), limit=10_000)
    return head + random.choice([STOP, KILL, SENTINEL, encode_frame(data=b"1"), b"\xff" * 30, b""])


def answer_of(random: Random) -> bytes:
    return random.choice([PROLOGUE, PROLOGUE + encode_item(1, "json") + SENTINEL, b"\xff" * 40, SENTINEL, FINAL["json"]])


class Dice:
    """Real traffic of one side, with something broken in it now and then."""

    def __init__(self, random: Random, *, to_client: bool) -> None:
        self.random = random
        self.to_client = to_client
        self.renew()

    def renew(self) -> None:
        limits = SessionLimits(streams=8, idle_rate=1e9, idle_burst=1e9)
        random = self.random
        self.client = Session(limits=limits, wake=lambda: None, now=0.0)
        self.server: Session = Session(
            limits=limits, wake=lambda: None, now=0.0, accept=lambda fields: Quiet(self.server, random)
        )
        self.server.receive_data(self.client.data_to_send(), 0.0)
        self.client.receive_data(self.server.data_to_send(), 0.0)

    def close(self) -> None:
        """The connection ends: nothing is left of it."""
        for session in (self.client, self.server):
            session.close("broken")
            assert not session.streams and not session._ready and not session._blocked  # pyright: ignore[reportPrivateUsage]
        self.renew()

    def roll(self) -> bytes:
        """What one side says next."""
        random = self.random
        if self.client.room and len(self.client.streams) < 4:
            exchange = Reading()
            self.client.open(exchange, ASK)
            exchange.push(body_of(random))
            if random.random() < 0.3:
                exchange.finish()
        for exchange in tuple(self.server.streams.values()):
            if self.to_client and random.random() < 0.3 and not exchange.over:  # type: ignore[attr-defined]
                self.server.respond(exchange, [(b":status", b"200")])
                exchange.push(answer_of(random))
                exchange.over = True  # type: ignore[attr-defined]
        if random.random() < 0.15:
            stranger = random.choice([self.client, self.server])
            for exchange in tuple(stranger.streams.values()):
                exchange.reset(8)
        speaker, hearer = (self.server, self.client) if self.to_client else (self.client, self.server)
        answers = hearer.data_to_send()
        if answers:
            speaker.receive_data(answers, 0.0)
        data = bytearray(speaker.data_to_send() or frame(6, b"12345678", stream=0))
        match random.randrange(8):
            case 0:
                for _ in range(random.randrange(1, 4)):
                    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            case 1:
                data[random.randrange(len(data)) :] = b""
            case 2:
                data += frame(random.randrange(12), random.randbytes(random.randrange(20)), flags=random.randrange(256))
            case 3:
                data += frame(random.choice([0, 1, 3, 8]), random.randbytes(4), stream=random.choice([0, 1, 2, 3, 999]))
            case 4:
                data += encode_goaway(Goaway(last=random.choice([0, 1, 2**31 - 1]), code=random.randrange(14)))
            case _:
                pass
        return bytes(data)


@pytest.mark.parametrize("to_client", [False, True], ids=["worker", "client"])
def test_ten_thousand_mutated_frames(to_client: bool) -> None:
    """Only `FrameViolation` comes out, and nothing is held of a session that was closed."""
    random = Random(20_262)
    dice = Dice(random, to_client=to_client)
    refused = 0
    for number in range(10_000):
        try:
            data = dice.roll()
            cut = random.randrange(len(data) + 1)
            subject = dice.client if to_client else dice.server
            subject.receive_data(data[:cut], float(number))
            subject.receive_data(data[cut:], float(number))
            assert len(dice.client.streams) <= 8 and len(dice.server.streams) <= 8
            assert subject.judge(float(number)) in Verdict
        except FrameViolation as error:
            assert error.message
            refused += 1
            dice.close()
        if number % 10 == 0:  # a length that lies swallows what follows
            dice.close()
    assert 500 < refused < 9_500, refused
