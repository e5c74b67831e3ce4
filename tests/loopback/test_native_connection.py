"""Native connections on real sockets: limits of a worker, draining, closing, resets."""

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from struct import pack
from typing import Any

import msgspec
import pytest

from stator.errors import Cancelled, ConnectFailed, Disconnected, StreamIncomplete, Unavailable
from stator.protocol.native.frames import CRITICAL, GOAWAY, HELLO, ITEMS, MAX_PAYLOAD, OPEN, PING, frame
from stator.protocol.native.hello import Goaway, Hello, read_goaway
from stator.runtime.context import Context
from stator.testing.native_pair import CLIENT_PROCESS, WORKER_PROCESS
from stator.testing.native_sockets import (
    RawPeer,
    Recorder,
    native_address,
    native_caller,
    native_record,
    plane_host,
    raw_listener,
    with_native,
)
from stator.testing.plane_suite import INSTANCE, Caller, count, drain, endless, eventually
from stator.transports.native import NativeConfig, NativePlane, NativeServer

pytestmark = pytest.mark.timeout(30)

TCP = NativeConfig(unix=False, pulse=False)
QUICK = NativeConfig(unix=False, pulse=False, connect_timeout=0.3)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path with mode 0700, as Unix sockets want it."""
    with tempfile.TemporaryDirectory(prefix="st") as path:
        yield Path(path)


def lines(caller: Caller) -> list[Any]:
    return list(caller.pair.client._all)  # type: ignore[attr-defined]


async def waits(request: Any, context: Context) -> AsyncIterator[Any]:
    """Say one item, then nothing."""
    yield "here"
    await asyncio.Event().wait()


# -- the server's side


async def test_a_client_that_says_nothing_is_told_and_cut() -> None:
    async with native_caller(count, config=QUICK) as caller:
        async with await RawPeer.connect(native_address(caller.record).address) as peer:
            started = asyncio.get_running_loop().time()
            said = await peer.until_closed()
            assert 0.25 < asyncio.get_running_loop().time() - started < 1.0
        assert [each.kind for each in said] == [HELLO, GOAWAY]
        assert read_goaway(said[1].payload).code == "timeout"
        await eventually(lambda: not caller.pair.server._sessions)  # type: ignore[attr-defined]


async def test_connections_that_wait_for_hello_are_bounded() -> None:
    config = NativeConfig(unix=False, pulse=False, greeting=3)
    async with native_caller(count, config=config) as caller:
        server: Any = caller.pair.server
        peers = [await RawPeer.connect(native_address(caller.record).address) for _ in range(6)]
        await eventually(lambda: len(server._greeting) == 3 and len(server._sessions) == 3)
        for peer in peers[:3]:
            await peer.until_closed()
        await peers[3].greet()
        assert await caller.collect({"n": 1}) == [0]
        for peer in peers:
            peer.writer.close()
        await eventually(lambda: len(server._sessions) == 1 and not server._greeting)


async def test_more_connections_than_allowed_are_told_so() -> None:
    config = NativeConfig(unix=False, pulse=False, connections=2)
    async with native_caller(count, config=config) as caller:
        peers = [await RawPeer.connect(native_address(caller.record).address) for _ in range(2)]
        for peer in peers:
            await peer.greet()
        async with await RawPeer.connect(native_address(caller.record).address) as third:
            said = await third.until_closed()
            assert [each.kind for each in said] == [GOAWAY] and read_goaway(said[0].payload).code == "overloaded"
        with pytest.raises(ConnectFailed, match="overloaded the worker holds 2 connections"):
            await caller.open()
        async with peers[0], peers[1]:
            pass
        await eventually(lambda: not caller.pair.server._sessions)  # type: ignore[attr-defined]
        assert await caller.collect({"n": 1}) == [0]


async def test_a_listener_that_cannot_be_bound_leaves_nothing_open(directory: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConnectFailed, match="cannot listen"):
            await NativeServer.listen(NativeConfig(port=taken.getsockname()[1]), plane_host(directory=directory))
    with pytest.raises(ConnectFailed, match="cannot listen"):
        await NativeServer.listen(NativeConfig(), plane_host(directory=directory / "missing"))
    assert list(directory.iterdir()) == []


async def test_nagle_is_off_on_both_ends() -> None:
    async with native_caller(waits, config=TCP) as caller:
        inbox = await caller.open()
        assert await inbox.more()
        connections = [line.connection for line in lines(caller)]
        connections += list(caller.pair.server._sessions)  # type: ignore[attr-defined]
        assert len(connections) == 2
        for connection in connections:
            sock = connection._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        inbox.kill()


async def test_the_plane_reaches_records_of_its_version() -> None:
    plane = NativePlane()
    good = native_record("127.0.0.1:1")
    assert plane.reaches(good)
    assert plane.reaches(with_native(good, plane=9))  # it speaks ours too, or HELLO says that it does not
    assert not plane.reaches(with_native(good, plane=0))
    assert not plane.reaches(msgspec.structs.replace(good, stator=msgspec.UNSET))


# -- draining and closing


async def test_a_draining_worker_finishes_and_the_line_closes_behind_it() -> None:
    observer = Recorder()
    async with native_caller(endless, config=TCP, observer=observer) as caller:
        running = await caller.open()
        assert await running.more()
        caller.pair.server.drain()
        await eventually(lambda: ("draining", INSTANCE) in observer.told)
        for _ in range(3):
            with pytest.raises(Unavailable, match="draining"):
                await caller.open()
        assert len(lines(caller)) == 1  # nobody dialled again
        running.stop()
        await drain(running)
        await eventually(lambda: lines(caller) == [], what="the line closed")
        assert ("lost", INSTANCE) not in observer.told


async def test_dialling_a_draining_worker_is_no_connection() -> None:
    observer = Recorder()
    async with native_caller(count, config=TCP, observer=observer) as caller:
        caller.pair.server.drain()
        for _ in range(3):
            with pytest.raises(Unavailable, match="draining"):
                await caller.open()
        await eventually(lambda: lines(caller) == [], what="the line closed")
        assert observer.told[0] == ("draining", INSTANCE)


async def test_requests_that_cross_the_goaway_are_refused_and_may_go_elsewhere() -> None:
    async with native_caller(endless, config=TCP) as caller:
        running = await caller.open()
        assert await running.more()
        inboxes = [await caller.open(id=f"r{n}") for n in range(5)]
        caller.pair.server.drain()
        for inbox in inboxes:
            with pytest.raises(Unavailable) as caught:
                await inbox.more()
            assert caught.value.retryable
        running.kill()


async def test_a_worker_that_closes_cuts_its_streams_after_what_it_had_answered() -> None:
    async with native_caller(waits, config=TCP) as caller:
        inboxes = [await caller.open(id=f"r{n}") for n in range(10)]
        await eventually(lambda: len(caller.contexts) == 10)
        await asyncio.sleep(0)
        await caller.pair.server.aclose()
        for inbox in inboxes:
            got: list[Any] = []
            with pytest.raises(StreamIncomplete):
                await drain(inbox, got)
            assert got == ["here"]
        await eventually(lambda: lines(caller) == [])


async def test_what_was_answered_reaches_a_slow_client_before_the_close() -> None:
    async def talks(request: Any, context: Context) -> AsyncIterator[Any]:
        for number in range(40):
            yield f"{number:06}" * 10_000

    async with native_caller(talks, config=TCP) as caller:
        async with await RawPeer.connect(native_address(caller.record).address) as peer:
            peer.writer.transport.pause_reading()
            head = msgspec.json.encode([f"{INSTANCE:x}/generate", "r", {}, {}, None])
            hello = Hello(process=CLIENT_PROCESS, role="client").encode()
            await peer.say(
                frame(HELLO, payload=hello, flags=CRITICAL), frame(OPEN, 1, pack(">IH", 2**31, len(head)) + head + b"null")
            )
            await eventually(lambda: caller.finished == 1)
            closing = asyncio.create_task(caller.pair.server.aclose())
            await asyncio.sleep(0.05)
            peer.writer.transport.resume_reading()
            said = await peer.until_closed()
            await closing
        assert sum(each.count for each in said if each.kind == ITEMS) == 40


async def test_closing_does_not_wait_for_a_client_that_does_not_read() -> None:
    async def floods(request: Any, context: Context) -> AsyncIterator[Any]:
        while True:
            yield "x" * 60_000

    async with (
        native_caller(floods, config=TCP) as caller,
        await RawPeer.connect(native_address(caller.record).address) as peer,
    ):
        peer.writer.transport.pause_reading()
        head = msgspec.json.encode([f"{INSTANCE:x}/generate", "r", {}, {}, None])
        hello = Hello(process=CLIENT_PROCESS, role="client").encode()
        await peer.say(
            frame(HELLO, payload=hello, flags=CRITICAL), frame(OPEN, 1, pack(">IH", 2**31, len(head)) + head + b"null")
        )
        server: Any = caller.pair.server
        await eventually(lambda: any(not s.outgoing.writable for s in server._sessions.values()))
        started = asyncio.get_running_loop().time()
        await server.aclose()
        assert asyncio.get_running_loop().time() - started < 2.5
        await eventually(lambda: server.open_streams == 0 and not server._sessions)
        await eventually(lambda: caller.serving.inflight == 0)


async def test_a_broken_client_that_does_not_read_is_cut_all_the_same() -> None:
    async with native_caller(endless, config=TCP) as caller:
        server: Any = caller.pair.server
        async with await RawPeer.connect(native_address(caller.record).address) as peer:
            await peer.greet()
            ((connection, session),) = server._sessions.items()
            await eventually(lambda: session.peer is not None)
            peer.writer.transport.pause_reading()
            while session.outgoing.writable:  # until the kernel holds no more
                session.outgoing.control(frame(PING, payload=b"12345678") * 3000)
                connection.flush()
            await peer.say(frame(99, flags=CRITICAL))
            await eventually(lambda: not server._sessions, within=4, what="the connection was cut")


async def test_closing_the_client_ends_every_line() -> None:
    async with native_caller(endless, config=TCP) as caller:
        first = await caller.open()
        assert await first.more()
        caller.pair.server.drain()  # this line only finishes what it has
        await eventually(lambda: not lines(caller)[0].usable)
        await caller.pair.client.aclose()
        with pytest.raises((Disconnected, Cancelled)):
            await drain(first)
        await eventually(lambda: caller.contexts[0].is_killed)
        assert lines(caller) == []
        await caller.pair.client.aclose()


async def test_a_lost_connection_is_told_when_requests_were_open() -> None:
    observer = Recorder()
    async with native_caller(waits, config=TCP, observer=observer) as caller:
        inbox = await caller.open()
        assert await inbox.more()
        inbox.kill()
        await eventually(lambda: caller.pair.open_streams() == 0)
        caller.pair.cut()
        await eventually(lambda: lines(caller) == [])
        assert observer.told == []
        inbox = await caller.open()
        assert await inbox.more()
        caller.pair.cut()
        with pytest.raises(StreamIncomplete):
            await drain(inbox)
        assert observer.told == [("lost", INSTANCE)]


async def test_an_idle_line_is_closed_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    observer = Recorder()
    async with native_caller(count, config=TCP, observer=observer) as caller:
        assert await caller.collect({"n": 1}) == [0]
        (line,) = lines(caller)
        liveness = line.session.liveness
        monkeypatch.setattr(liveness, "_limits", msgspec.structs.replace(liveness._limits, idle_close=0.05))
        await eventually(lambda: lines(caller) == [], what="the idle line closed")
        assert observer.told == []
        assert await caller.collect({"n": 2}) == [0, 1]  # and is made again


async def test_a_goaway_with_a_reason_ends_the_streams_with_it() -> None:
    async with native_caller(count, config=TCP) as caller, raw_listener() as listener:
        calling = asyncio.create_task(caller.open(record=native_record(listener.address, process="b" * 32)))
        async with await listener.accepted() as peer:
            await peer.greet("worker", process="b" * 32)
            inbox = await calling
            await peer.until(OPEN)
            await peer.say(frame(GOAWAY, payload=Goaway(code="protocol", reason="I do not like you").encode()))
            with pytest.raises(Disconnected, match="I do not like you"):
                await inbox.more()
            await peer.until_closed()  # the client closes; nobody is left on it


async def test_a_reset_while_the_transport_is_full() -> None:
    async def floods(request: Any, context: Context) -> AsyncIterator[Any]:
        while True:
            yield "x" * 60_000

    async with native_caller(floods, config=TCP) as caller:
        server: Any = caller.pair.server
        async with await RawPeer.connect(native_address(caller.record).address) as peer:
            await peer.greet()
            peer.writer.transport.pause_reading()
            head = msgspec.json.encode([f"{INSTANCE:x}/generate", "r", {}, {}, None])
            await peer.say(frame(OPEN, 1, pack(">IH", 2**31, len(head)) + head + b"null"))
            await eventually(lambda: any(not s.outgoing.writable for s in server._sessions.values()))
            peer.writer.transport.abort()
        await eventually(lambda: not server._sessions, what="the reset was noticed")
        await eventually(lambda: caller.serving.inflight == 0, what="the handler was ended")


async def test_a_client_that_ends_its_half_is_gone() -> None:
    async with native_caller(waits, config=TCP) as caller, await RawPeer.connect(native_address(caller.record).address) as peer:
        await peer.greet()
        head = msgspec.json.encode([f"{INSTANCE:x}/generate", "r", {}, {}, None])
        await peer.say(frame(OPEN, 1, pack(">IH", 16384, len(head)) + head + b"null"))
        await peer.until(ITEMS)
        peer.writer.write_eof()
        await eventually(lambda: caller.contexts[0].is_killed, what="the handler was told")
        await eventually(lambda: not caller.pair.server._sessions)  # type: ignore[attr-defined]


def test_frames_fit_the_constants_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "native-plane.md").read_text()
    assert f"{MAX_PAYLOAD:,}".replace(",", " ") in page
    assert len(WORKER_PROCESS) == len(CLIENT_PROCESS) == 32
