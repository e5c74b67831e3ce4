"""The native plane under load: time linear in bytes, large items delay nobody, a slow reader costs only its own stream."""

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest

from stator.protocol.native.frames import ITEMS, FrameReader, frame
from stator.protocol.native.outgoing import ITEM_OVERHEAD
from stator.runtime.context import Context
from stator.testing.growth import LINEAR, Growth
from stator.testing.native_pair import NativePair
from stator.testing.native_sockets import native_address, native_caller, with_native
from stator.testing.plane_suite import Caller, drain, eventually
from stator.transports.inbox import Inbox, PhaseLimits
from stator.transports.native import NativeConfig

pytestmark = [pytest.mark.load, pytest.mark.timeout(110)]

TCP = NativeConfig(unix=False, pulse=False)
PATIENT = PhaseLimits(accept=60, first_item=60)


# -- linear


def test_frames_that_dribble_in_byte_by_byte() -> None:
    def dribble(data: bytes) -> None:
        reader = FrameReader()
        for position in range(len(data)):
            for _ in reader.feed(data[position : position + 1]):
                pass

    some = frame(ITEMS, 1, b"x" * 60_000) * 10
    growth = Growth()
    for _ in growth.rounds(5):
        with growth.small():
            dribble(some)
        with growth.large():
            dribble(some * 3)
    assert growth.ratio <= LINEAR, growth


@pytest.mark.parametrize("chunk", [100, 65_536])
def test_an_item_in_chunks_without_a_socket(chunk: int) -> None:
    def carry(item: bytes) -> None:
        pair = NativePair(record=False)
        _, receiver = pair.open()
        pair.settle()
        pair.calls[0].stream.push(item)
        while taken := pair.server.outgoing.data_to_send():
            for position in range(0, len(taken), chunk):
                pair.client.receive_data(taken[position : position + chunk], 0.0)
        assert len(receiver.items[0]) == len(item) - len(b'""')

    ten, thirty = (msgspec.json.encode("x" * size) for size in (10_000_000, 30_000_000))
    growth = Growth()
    for _ in growth.rounds(5):
        with growth.small():
            carry(ten)
        with growth.large():
            carry(thirty)
    assert growth.ratio <= LINEAR, growth


async def sized(request: Any, context: Context) -> AsyncIterator[Any]:
    """An item as large as asked for, or the size of what came."""
    yield "x" * request if isinstance(request, int) else len(request)


@pytest.mark.parametrize("what", ["item", "request"])
async def test_time_is_linear_in_the_size(what: str) -> None:
    async with native_caller(sized, config=TCP) as caller:

        async def carry(size: int) -> None:
            (got,) = await caller.collect(size if what == "item" else "x" * size, limits=PATIENT)
            assert (len(got) if what == "item" else got) == size

        growth = Growth()
        for _ in growth.rounds(5):
            with growth.small():
                await carry(10_000_000)
            with growth.large():
                await carry(30_000_000)
        assert growth.ratio <= LINEAR, growth


# -- fair


@asynccontextmanager
async def narrow(address: str, bytes_per_second: int) -> AsyncGenerator[str, None]:
    """A way to `address` that brings answers at that rate and holds little itself."""
    host, _, port = address.rpartition(":")
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []
    loop = asyncio.get_running_loop()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rate: int | None) -> None:
        due = loop.time()
        with suppress(ConnectionError):
            while data := await reader.read(16_384):
                writer.write(data)
                await writer.drain()
                if rate is not None:
                    due = max(due, loop.time() - 0.01) + len(data) / rate
                    await asyncio.sleep(max(0.0, due - loop.time()))

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        sock.setblocking(False)
        await loop.sock_connect(sock, (host, int(port)))
        far_reader, far_writer = await asyncio.open_connection(sock=sock, limit=32_768)
        writers.extend((writer, far_writer))
        tasks.add(asyncio.create_task(carry(reader, far_writer, None)))
        tasks.add(asyncio.create_task(carry(far_reader, writer, bytes_per_second)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in writers:
            each.transport.abort()
            with suppress(ConnectionError):
                await each.wait_closed()


async def paced_or_huge(request: Any, context: Context) -> AsyncIterator[Any]:
    if request == "huge":
        while True:
            yield "x" * 10_000_000
    while True:
        yield time.perf_counter()
        await asyncio.sleep(0.02)


async def test_one_stream_of_huge_items_keeps_fifty_small_ones_quick() -> None:
    """Over 20 MB/s an item of 10 MB takes half a second: no small item may wait that long."""
    async with native_caller(paced_or_huge, config=TCP) as caller:
        async with narrow(native_address(caller.record).address, 20_000_000) as address:
            record = with_native(caller.record, address=address)
            small = [await caller.open("small", id=f"s{n}", record=record, limits=PATIENT) for n in range(50)]
            for inbox in small:
                assert await inbox.more()
            huge = await caller.open("huge", id="huge", record=record, limits=PATIENT)
            late: list[float] = []
            arrived = 0

            async def read(inbox: Inbox) -> None:
                while await inbox.more():
                    now = time.perf_counter()
                    late.extend(now - sent for sent in inbox.items)
                    inbox.items.clear()

            readers = [asyncio.create_task(read(inbox)) for inbox in small]
            end = time.perf_counter() + 4
            while time.perf_counter() < end:
                assert await asyncio.wait_for(huge.more(), 10)
                arrived += len(huge.items)
                huge.items.clear()
            for inbox in (*small, huge):
                inbox.kill()
            await asyncio.gather(*readers, return_exceptions=True)
            late.sort()
            assert arrived >= 4, "the huge items did not get through"
            assert len(late) > 4000, len(late)
            assert late[int(len(late) * 0.99)] < 0.4, late[:: len(late) // 10]
        caller.pair.cut()


# -- slow readers


async def numbered(request: Any, context: Context) -> AsyncIterator[Any]:
    """Numbers with some weight: as fast as they are taken, or fifty a second."""
    number = 0
    while True:
        yield [number, "x" * request["weight"]]
        number += 1
        if request["pause"]:
            await asyncio.sleep(request["pause"])


class Counted:
    """A stream that is read to see that nothing is lost."""

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox
        self.next = 0

    async def read(self) -> None:
        while await self.inbox.more():
            self.take()

    def take(self) -> None:
        for number, _ in self.inbox.items:
            assert number == self.next
            self.next += 1
        self.inbox.items.clear()


def held(caller: Caller, slow: Inbox) -> int:
    """Charged bytes of one stream between its handler and its reader, without the kernel's."""
    unread = sum(len(msgspec.json.encode(item)) + 1 + ITEM_OVERHEAD for item in slow.items)
    server: Any = caller.pair.server
    queued = sum(stream._size for session in server._sessions.values() for stream in session.streams.values())
    return unread + queued


@pytest.mark.parametrize("weight", [10, 1000, 200_000])
async def test_a_slow_reader_holds_a_window_and_one_item_and_never_more(weight: int) -> None:
    config = NativeConfig(unix=False, pulse=False)
    async with native_caller(numbered, config=config) as caller:
        slow = await caller.open({"weight": weight, "pause": 0}, limits=PATIENT)
        assert await slow.more()
        bound = config.window + weight + 30 + ITEM_OVERHEAD
        samples: list[int] = []
        for _ in range(60):
            await asyncio.sleep(0.05)
            samples.append(held(caller, slow))
        assert max(samples) <= bound, (max(samples), bound)
        assert samples[20:] == [samples[20]] * 40, "it still moves"
        assert samples[-1] >= config.window - weight  # and the window is used
        counted = Counted(slow)
        for _ in range(20):
            assert await asyncio.wait_for(slow.more(), 5)
            counted.take()
        slow.kill()


@pytest.mark.parametrize("pause", [0.02, 0])
async def test_a_slow_reader_costs_the_other_ninety_nine_nothing(pause: float) -> None:
    async with native_caller(numbered, config=TCP) as caller:
        request = {"weight": 200, "pause": pause}
        streams = [Counted(await caller.open(request, id=f"s{n}", limits=PATIENT)) for n in range(100)]
        slow, others = streams[0], streams[1:]
        readers = [asyncio.create_task(stream.read()) for stream in others]
        reading = asyncio.create_task(slow.read())

        async def rate(seconds: float) -> float:
            before, started = sum(stream.next for stream in others), time.perf_counter()
            await asyncio.sleep(seconds)
            return (sum(stream.next for stream in others) - before) / (time.perf_counter() - started)

        await rate(0.5)
        ratios: list[float] = []
        for _ in range(5):  # alternately, since the machine has moods
            together = await rate(1)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            ratios.append(await rate(1) / together)
            assert held(caller, slow.inbox) <= 100 * (256 * 1024 + 1000)
            reading = asyncio.create_task(slow.read())
        assert sorted(ratios)[2] >= 0.8, ratios
        for stream in streams:
            stream.inbox.kill()
        await asyncio.gather(*readers, reading, return_exceptions=True)
        assert min(stream.next for stream in others) > 0
        await eventually(lambda: caller.pair.open_streams() == 0)


async def test_many_slow_readers_share_one_budget() -> None:
    """What streams hold together stays within the process-wide budget and a least window for each."""
    config = NativeConfig(unix=False, pulse=False, credit_budget=4 * 2**20)
    async with native_caller(numbered, config=config) as caller:
        request = {"weight": 500, "pause": 0}
        inboxes = [await caller.open(request, id=f"s{n}", limits=PATIENT) for n in range(200)]
        await asyncio.sleep(2)
        unread = sum(len(msgspec.json.encode(item)) + 1 + ITEM_OVERHEAD for inbox in inboxes for item in inbox.items)
        assert unread <= 4 * 2**20 + 200 * (16 * 2**10 + 600)
        client: Any = caller.pair.client
        assert unread <= client._host.budget.out + 200 * 600
        for inbox in inboxes:
            inbox.kill()
        await eventually(lambda: caller.pair.open_streams() == 0)
        assert client._host.budget.out == 0


async def test_draining_a_full_inbox_starts_it_again() -> None:
    async with native_caller(numbered, config=TCP) as caller:
        inbox = await caller.open({"weight": 100, "pause": 0}, limits=PATIENT)
        counted = Counted(inbox)
        for _ in range(10):
            await asyncio.sleep(0.1)
            assert await asyncio.wait_for(inbox.more(), 5)
            counted.take()
        assert counted.next > 5000
        inbox.stop()
        inbox.kill()
        with suppress(Exception):
            await drain(inbox)
