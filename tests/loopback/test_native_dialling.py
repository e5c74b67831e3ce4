"""How native connections are made: by whom they are answered, over which socket, shared by whom, given up when."""

import asyncio
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stator.errors import ConnectFailed, Timeout
from stator.protocol.native.frames import HELLO, OPEN, frame
from stator.testing.native_sockets import (
    native_address,
    native_caller,
    native_record,
    raw_listener,
    with_native,
)
from stator.testing.plane_suite import INSTANCE, Caller, count, eventually
from stator.transports.inbox import PhaseLimits
from stator.transports.native import NativeConfig

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


def is_unix(line: Any) -> bool:
    return line.connection._transport.get_extra_info("socket").family == socket.AF_UNIX


# -- who answers


async def test_another_process_at_the_address_is_a_failed_connect_and_gets_no_request() -> None:
    async with native_caller(count, config=TCP) as caller, raw_listener() as listener:
        record = native_record(listener.address, process="b" * 32)
        opening = asyncio.create_task(caller.open({"secret": 1}, record=record))
        async with await listener.accepted() as peer:
            await peer.greet("worker", process="d" * 32)
            with pytest.raises(ConnectFailed, match="another process answers") as caught:
                await opening
            said = await peer.until_closed()
        assert caught.value.phase == "connect"
        assert OPEN not in [each.kind for each in said]
        assert lines(caller) == []


async def test_a_reused_port_is_noticed(directory: Path) -> None:
    async with native_caller(count, config=TCP) as caller:
        with pytest.raises(ConnectFailed, match="another process answers"):
            await caller.collect({"n": 1}, record=with_native(caller.record, process="e" * 32))
        assert await caller.collect({"n": 1}) == [0]
        assert len(caller.contexts) == 1


@pytest.mark.parametrize(
    "native",
    [
        {"address": "nowhere"},
        {"address": "127.0.0.1:0"},
        {"address": "127.0.0.1:99999"},
        {"address": "127.0.0.1:http"},
        {"address": ""},
        {"address": "a" * 70 + ".example:80"},
        {"address": "127.0.0.1:1"},
        {"address": "127.0.0.1:1", "path": "/\0"},
        {"address": "127.0.0.1:1", "path": "/" + "x" * 300},
        {"address": "127.0.0.1:1", "path": "/dev/null"},
        {"address": "127.0.0.1:1", "process": "not hex"},
    ],
    ids=repr,
)
async def test_an_address_that_is_none_is_a_failed_connect(native: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    async with native_caller(count, config=TCP) as caller:
        with pytest.raises(ConnectFailed) as caught:
            await caller.open({"n": 1}, record=with_native(caller.record, **native))
        assert caught.value.phase == "connect" and caught.value.instance == INSTANCE
        assert await caller.collect({"n": 1}) == [0]
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []  # no crashed task


@pytest.mark.parametrize("pulse", ["nowhere", "127.0.0.1:99999", "[::1", "no.such.host.invalid:1"])
async def test_a_pulse_that_cannot_be_found_costs_nobody_the_connection(pulse: str) -> None:
    async with native_caller(count, config=TCP) as caller:
        assert await caller.collect({"n": 2}, record=with_native(caller.record, pulse=pulse)) == [0, 1]


# -- Unix sockets


async def test_the_unix_socket_is_preferred(directory: Path) -> None:
    async with native_caller(count, directory=directory) as caller:
        assert await caller.collect({"n": 3}) == [0, 1, 2]
        assert [is_unix(line) for line in lines(caller)] == [True]
        assert stat.S_ISSOCK(os.stat(native_address(caller.record).path).st_mode)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("what", ["missing", "plain file", "stale socket", "foreign", "too long"])
async def test_without_a_usable_unix_socket_tcp_is_used(directory: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "other.sock"
    if what == "plain file":
        path.write_bytes(b"")
    elif what == "stale socket":
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
    elif what == "too long":
        (directory / ("x" * 100)).mkdir()
        path = directory / ("x" * 100) / "other.sock"
        path.write_bytes(b"")
    async with native_caller(count, directory=directory) as caller:
        record = with_native(caller.record, path=str(path))
        if what == "foreign":
            record = caller.record
            monkeypatch.setattr("stator.transports.native.client.os.getuid", lambda: 12345)
        assert await caller.collect({"n": 2}, record=record) == [0, 1]
        assert [is_unix(line) for line in lines(caller)] == [False]


async def test_a_unix_socket_that_failed_is_not_tried_again(directory: Path) -> None:
    async with native_caller(count, config=TCP) as caller, raw_listener(str(directory / "w.sock")) as listener:
        record = with_native(caller.record, path=listener.address)
        opening = asyncio.create_task(caller.collect({"n": 1}, record=record))
        async with await listener.accepted():
            pass  # refused
        assert await opening == [0]
        caller.pair.cut()
        await eventually(lambda: lines(caller) == [])
        assert await caller.collect({"n": 1}, record=record) == [0]
        assert listener.count == 1


async def test_a_unix_socket_that_says_nothing_leaves_time_for_tcp(directory: Path) -> None:
    config = NativeConfig(unix=False, pulse=False, connect_timeout=0.6)
    async with native_caller(count, config=config) as caller, raw_listener(str(directory / "w.sock")) as listener:
        record = with_native(caller.record, path=listener.address)
        assert await caller.collect({"n": 1}, record=record) == [0]
        assert listener.count == 1


async def test_a_silent_process_is_not_remembered_as_one_without_unix_socket(directory: Path) -> None:
    async with native_caller(count, config=QUICK) as caller, raw_listener() as tcp, raw_listener(str(directory / "w")) as unix:
        record = native_record(tcp.address, process="b" * 32, path=unix.address)
        for attempt in (1, 2):
            with pytest.raises(Timeout):
                await caller.open(record=record)
            assert unix.count == tcp.count == attempt


async def test_a_long_socket_directory_means_no_unix_socket(directory: Path) -> None:
    deep = directory / ("d" * 90)
    deep.mkdir(mode=0o700)
    async with native_caller(count, directory=deep) as caller:
        assert native_address(caller.record).path == ""
        assert await caller.collect({"n": 1}) == [0]


async def test_a_socket_directory_of_everybody_means_no_unix_socket(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory.chmod(0o755)
    async with native_caller(count, directory=directory) as caller:
        assert native_address(caller.record).path == ""
    assert "mode 0700" in caplog.text


# -- dialling


async def test_concurrent_callers_share_one_connection() -> None:
    async with native_caller(count, config=TCP) as caller:
        assert await asyncio.gather(*(caller.collect({"n": 2}, id=f"r{n}") for n in range(50))) == [[0, 1]] * 50
        assert len(lines(caller)) == 1


async def test_a_cancelled_caller_leaves_the_dial_to_the_others() -> None:
    async with native_caller(count, config=TCP) as caller, raw_listener() as listener:
        record = native_record(listener.address, process="b" * 32)
        callers = [asyncio.create_task(caller.open(record=record, id=f"r{n}")) for n in range(3)]
        async with await listener.accepted() as peer:
            callers[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await callers[0]
            await peer.greet("worker", process="b" * 32)
            inboxes = await asyncio.gather(*callers[1:])
            await peer.until(OPEN)
            assert listener.count == 1
            for inbox in inboxes:
                inbox.kill()
            await eventually(lambda: caller.pair.open_streams() == 0)


async def test_when_all_callers_are_cancelled_nothing_is_sent() -> None:
    async with native_caller(count, config=TCP) as caller, raw_listener() as listener:
        record = native_record(listener.address, process="b" * 32)
        calling = asyncio.create_task(caller.open(record=record))
        async with await listener.accepted() as peer:
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            await peer.greet("worker", process="b" * 32)
            with pytest.raises(TimeoutError):
                await peer.until(OPEN, within=0.2)


@pytest.mark.parametrize("how", ["nothing", "half a hello"])
async def test_a_listener_that_never_says_hello_is_a_timeout_of_the_connect_phase(how: str) -> None:
    async with native_caller(count, config=QUICK) as caller, raw_listener() as listener:
        loop = asyncio.get_running_loop()
        started = loop.time()
        record = native_record(listener.address, process="b" * 32)
        opening = asyncio.create_task(caller.open(record=record))
        async with await listener.accepted() as peer:
            if how == "half a hello":
                await peer.say(frame(HELLO, payload=b"{")[:-1])
            with pytest.raises(Timeout) as caught:
                await opening
            assert caught.value.phase == "connect" and caught.value.instance == INSTANCE
            assert 0.25 < loop.time() - started < 1.0
            await peer.until_closed()
        assert lines(caller) == []


async def test_a_full_listener_is_a_timeout_of_the_connect_phase() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(busy.getsockname())
        try:
            async with native_caller(count, config=QUICK) as caller:
                with pytest.raises(Timeout) as caught:
                    await caller.open(record=native_record(f"127.0.0.1:{busy.getsockname()[1]}", process="b" * 32))
                assert caught.value.phase == "connect"
        finally:
            for filler in fillers:
                filler.close()


async def test_a_failed_dial_is_no_crashed_task(caplog: pytest.LogCaptureFixture) -> None:
    async with native_caller(count, config=TCP) as caller:
        results = await asyncio.gather(
            *(caller.open(record=with_native(caller.record, process="f" * 32)) for _ in range(3)), return_exceptions=True
        )
    assert [type(result) for result in results] == [ConnectFailed] * 3
    assert len({id(result) for result in results}) == 3  # each caller has an error of its own
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_closing_the_client_while_it_dials_is_a_failed_connect() -> None:
    async with native_caller(count, config=TCP) as caller, raw_listener() as listener:
        calling = [asyncio.create_task(caller.open(record=native_record(listener.address, process="b" * 32))) for _ in range(2)]
        async with await listener.accepted() as peer:
            await caller.pair.client.aclose()
            for each in calling:
                with pytest.raises(ConnectFailed, match="closed its plane"):
                    await each
            await peer.until_closed()
        with pytest.raises(ConnectFailed):
            await caller.open()


async def test_a_request_that_ends_while_its_connection_is_made_is_not_sent() -> None:
    async with native_caller(count, config=NativeConfig(unix=False, pulse=False)) as caller, raw_listener() as listener:
        record = native_record(listener.address, process="b" * 32)
        calling = asyncio.create_task(caller.open(record=record, limits=PhaseLimits(connect=0.1)))
        async with await listener.accepted() as peer:
            inbox = await calling
            with pytest.raises(Timeout) as caught:
                await inbox.more()
            assert caught.value.phase == "connect"
            await peer.greet("worker", process="b" * 32)
            with pytest.raises(TimeoutError):
                await peer.until(OPEN, within=0.2)


async def test_the_accept_limit_begins_when_the_request_leaves() -> None:
    async with native_caller(count, config=TCP) as caller, raw_listener() as listener:
        loop = asyncio.get_running_loop()
        record = native_record(listener.address, process="b" * 32)
        calling = asyncio.create_task(caller.open(record=record, limits=PhaseLimits(connect=3, accept=0.4)))
        async with await listener.accepted() as peer:
            await asyncio.sleep(0.5)
            await peer.greet("worker", process="b" * 32)
            inbox = await calling
            sent = loop.time()
            with pytest.raises(Timeout) as caught:
                await inbox.more()
            assert caught.value.phase == "accept"
            assert loop.time() - sent > 0.35
