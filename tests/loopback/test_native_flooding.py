"""Peers on the native plane that send and do not read: what waits for them is bounded, and nobody waits for ever."""

import asyncio
import socket
from collections.abc import AsyncIterator
from struct import pack
from typing import Any

import msgspec
import pytest

from stator.errors import StatorError
from stator.protocol.native.frames import OPEN, PING, frame
from stator.runtime.context import Context
from stator.testing.native_sockets import (
    RawPeer,
    native_address,
    native_caller,
    native_record,
    raw_listener,
)
from stator.testing.plane_suite import INSTANCE, Caller, count, eventually
from stator.transports.native import NativeConfig

pytestmark = pytest.mark.timeout(30)

TCP = NativeConfig(unix=False, pulse=False)
QUICK = NativeConfig(unix=False, pulse=False, connect_timeout=0.3)


def lines(caller: Caller) -> list[Any]:
    return list(caller.pair.client._all)  # type: ignore[attr-defined]


async def waits(request: Any, context: Context) -> AsyncIterator[Any]:
    """Say one item, then nothing."""
    yield "here"
    await asyncio.Event().wait()


@pytest.mark.parametrize("what", ["pings", "requests for nobody", "requests killed at once"])
async def test_answers_to_a_client_that_does_not_read_are_bounded(what: str) -> None:
    async with native_caller(waits, config=TCP) as caller:
        server: Any = caller.pair.server
        async with await RawPeer.connect(native_address(caller.record).address) as peer:
            await peer.greet()
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # the less the kernel holds, the sooner it shows
                peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, buffer, 65536)
            peer.writer.transport.pause_reading()
            path = f"{INSTANCE:x}/generate" if what == "requests killed at once" else "nobody"
            head = msgspec.json.encode([path, "r", {}, {}, None])
            body = pack(">IH", 16384, len(head)) + head + b"null"
            number = 1

            def batch() -> bytes:
                nonlocal number
                if what == "pings":
                    return frame(PING, payload=b"12345678") * 3000
                out: list[bytes] = []
                for _ in range(700):
                    number = (number + 2) % 2**32
                    out.append(frame(OPEN, number, body))
                    if what == "requests killed at once":
                        out.append(frame(9, number))
                return b"".join(out)

            (connection,) = server._sessions
            transport = connection._transport
            held = 0
            stopped = False
            try:
                for _ in range(2000 if what != "pings" else 300):
                    async with asyncio.timeout(1):
                        await peer.say(batch())
                    held = max(held, transport.get_write_buffer_size())
            except TimeoutError:
                stopped = True
            assert held < 4 * 2**20, held
            assert stopped or what == "pings"  # PONGs are dropped, so that reading may go on
            neighbour = await caller.open()
            assert await neighbour.more()
            neighbour.kill()
            peer.writer.transport.resume_reading()  # a client that reads again is served again
            await until_answered(peer)
            peer.writer.transport.abort()
        await eventually(lambda: server.open_streams == 0 and caller.serving.inflight == 0)


async def until_answered(peer: RawPeer) -> None:
    """Ask again and again, and read, until there is an answer."""
    token = b"answer!!"

    async def read() -> None:
        while await peer._hear():
            if any(each.payload == token for each in peer.frames):
                return
            peer.frames.clear()

    async with asyncio.timeout(20):
        reading = asyncio.create_task(read())
        while not reading.done():
            await peer.say(frame(PING, payload=token))
            await asyncio.wait([reading], timeout=0.02)


async def test_new_requests_wait_for_a_worker_that_does_not_read() -> None:
    async with native_caller(count, config=TCP) as caller, raw_listener() as listener:
        record = native_record(listener.address, process="b" * 32)
        calling = asyncio.create_task(caller.open("x" * 60_000, record=record))
        async with await listener.accepted() as peer:
            await peer.greet("worker", process="b" * 32)
            inboxes = [await calling]
            peer.writer.transport.pause_reading()
            (line,) = [each for each in lines(caller) if each.native.process == "b" * 32]
            for number in range(500):
                inboxes.append(await caller.open("x" * 60_000, record=record, id=f"r{number}"))
                await asyncio.sleep(0)
            assert not line.session.outgoing.writable
            assert line.connection._transport.get_write_buffer_size() < 2 * 2**20
            for inbox in inboxes:
                inbox.kill()
            written = sum(1 for inbox in inboxes if inbox.ended)
            assert written == len(inboxes)
            assert len(line.session.killed) < 200  # the others were withdrawn unsent
            assert line.session.open_streams == 0


async def test_two_ends_with_much_to_say_do_not_wait_for_each_other() -> None:
    async def echo(request: Any, context: Context) -> AsyncIterator[Any]:
        for _ in range(3):
            yield request

    async with native_caller(echo, config=TCP) as caller:
        text = "x" * 1_000_000
        results = await asyncio.gather(*(caller.collect(text, id=f"r{n}") for n in range(20)), return_exceptions=True)
        assert all(not isinstance(result, StatorError) for result in results)
        assert all(result == [text] * 3 for result in results)
