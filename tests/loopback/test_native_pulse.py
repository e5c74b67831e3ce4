"""The pulse: answers while the loop cannot, not when the process cannot; ignores noise; ends at once."""

import asyncio
import contextlib
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stator.errors import StreamIncomplete
from stator.protocol.native.frames import ACCEPT, OPEN, PING, PONG, frame
from stator.protocol.records import NativeAddress
from stator.tasks import SystemClock
from stator.testing.native_pair import WORKER_PROCESS
from stator.testing.native_sockets import Recorder, native_caller, native_record, raw_listener
from stator.testing.plane_suite import INSTANCE, count, drain, eventually
from stator.transports.native import NativeConfig
from stator.transports.native.pulse import Pulse, PulseAddress, PulseProbe, find_pulse

pytestmark = pytest.mark.timeout(40)

PROCESS = bytes.fromhex(WORKER_PROCESS)
SCRIPT = Path(__file__).with_name("pulse_process.py")
QUICK = NativeConfig(unix=False, pulse=False, silence=0.5, suspect_after=0.3, dead_after=1.2)


@asynccontextmanager
async def a_pulse(host: str = "127.0.0.1") -> AsyncGenerator[Pulse, None]:
    pulse = Pulse(host, WORKER_PROCESS, SystemClock())
    pulse.start(asyncio.get_running_loop())
    try:
        yield pulse
    finally:
        await pulse.aclose()


@asynccontextmanager
async def a_probe() -> AsyncGenerator[PulseProbe, None]:
    probe = PulseProbe(asyncio.get_running_loop(), Random(3))
    try:
        yield probe
    finally:
        probe.close()


def at(port: int, *, host: str = "127.0.0.1", process: bytes = PROCESS) -> PulseAddress:
    return PulseAddress(host=host, port=port, process=process)


async def answers(probe: PulseProbe, address: PulseAddress, *, within: float = 2.0) -> float | None:
    """How late the asked loop is, None without an answer."""
    answered: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    probe.ask(address, lambda late: answered.done() or answered.set_result(late))
    with contextlib.suppress(TimeoutError):
        return await asyncio.wait_for(answered, within)
    return None


@asynccontextmanager
async def a_process(how: str) -> AsyncGenerator[tuple[asyncio.subprocess.Process, PulseAddress], None]:
    process = await asyncio.create_subprocess_exec(sys.executable, str(SCRIPT), how, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            port = int(await process.stdout.readline())
        yield process, at(port)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def stop(process: asyncio.subprocess.Process) -> None:
    """SIGSTOP, which takes a moment."""
    process.send_signal(signal.SIGSTOP)
    state = Path(f"/proc/{process.pid}/stat")
    await eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", what="the process stopped")


async def test_an_idle_process_answers_at_once() -> None:
    async with a_pulse() as pulse, a_probe() as probe:
        late = await answers(probe, at(pulse.port))
        assert late is not None and late < 0.5


@pytest.mark.usefixtures("ipv6")
async def test_over_ipv6() -> None:
    async with a_pulse("::1") as pulse, a_probe() as probe:
        assert await answers(probe, at(pulse.port, host="::1")) is not None


@pytest.mark.parametrize("how", ["sleep", "busy", "native"])
async def test_a_blocked_loop_is_told_from_a_dead_process(how: str) -> None:
    async with a_process(how) as (process, address), a_probe() as probe:
        async with asyncio.timeout(10):
            while (await answers(probe, address) or 0.0) <= 0.3:
                await asyncio.sleep(0.05)
        late = [await answers(probe, address) for _ in range(3)]
        assert all(each is not None and each > 0.3 for each in late), late
        await stop(process)
        assert await answers(probe, address, within=0.5) is None
        process.send_signal(signal.SIGCONT)
        assert await answers(probe, address) is not None


async def test_a_stopped_process_does_not_answer() -> None:
    async with a_process("idle") as (process, address), a_probe() as probe:
        late = await answers(probe, address)
        assert late is not None and late < 1.0
        await stop(process)
        assert await answers(probe, address, within=0.5) is None


async def test_a_dead_process_does_not_answer() -> None:
    async with a_process("idle") as (process, address), a_probe() as probe:
        process.kill()
        await process.wait()
        for _ in range(3):
            assert await answers(probe, address, within=0.1) is None


async def test_another_process_is_not_asked_about() -> None:
    async with a_pulse() as pulse, a_probe() as probe:
        assert await answers(probe, at(pulse.port, process=bytes(16)), within=0.3) is None
        assert await answers(probe, at(pulse.port)) is not None


NOISE = [b"", b"\0", b"x", b"STP1", b"STP1" + bytes(23), b"STP1" + bytes(25), b"stp1" + bytes(12), bytes(28), b"x" * 60_000]


async def test_noise_neither_ends_nor_moves_it() -> None:
    async with a_pulse() as pulse, a_probe() as probe:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noisy:
            noisy.setblocking(False)
            for _ in range(20):
                for data in NOISE:
                    noisy.sendto(data, ("127.0.0.1", pulse.port))
            await asyncio.sleep(0.1)
            with pytest.raises(BlockingIOError):
                noisy.recvfrom(100)
        assert await answers(probe, at(pulse.port)) is not None


async def test_answers_nobody_asked_for_are_ignored() -> None:
    async with a_pulse() as pulse, a_probe() as probe:
        assert await answers(probe, at(pulse.port)) is not None
        port = probe._sockets[socket.AF_INET].getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as forger:
            for data in (*NOISE, b"stp1" + bytes(8) + b"\0\0\0\1"):
                forger.sendto(data, ("127.0.0.1", port))
        assert await answers(probe, at(pulse.port)) is not None
        assert probe._pending == {}


async def test_questions_without_answer_are_bounded() -> None:
    async with a_probe() as probe:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
            deaf.bind(("127.0.0.1", 0))
            for _ in range(6000):
                probe.ask(at(deaf.getsockname()[1]), lambda late: None)
        assert len(probe._pending) == PulseProbe._MOST_PENDING


@pytest.mark.parametrize("host", ["256.1.1.1", "not an address", "::1%nowhere", "255.255.255.255"])
async def test_asking_never_raises(host: str) -> None:
    async with a_probe() as probe:
        assert await answers(probe, at(9, host=host), within=0.05) is None
    probe.ask(at(9), lambda late: None)  # closed
    probe.close()


@pytest.mark.parametrize(
    ("pulse", "process", "found"),
    [
        ("127.0.0.1:9", WORKER_PROCESS, "127.0.0.1"),
        ("[::1]:9", WORKER_PROCESS, "::1"),
        ("localhost:9", WORKER_PROCESS, True),
        ("", WORKER_PROCESS, None),
        ("127.0.0.1", WORKER_PROCESS, None),
        ("127.0.0.1:0", WORKER_PROCESS, None),
        ("127.0.0.1:9", "zz", None),
        ("127.0.0.1:9", "aabb", None),
        ("no.such.host.invalid:9", WORKER_PROCESS, None),
    ],
)
async def test_where_a_record_says_the_pulse_is(pulse: str, process: str, found: Any) -> None:
    native = NativeAddress(plane=1, address="127.0.0.1:1", process=process, pulse=pulse)
    address = await find_pulse(asyncio.get_running_loop(), native)
    if found is None:
        assert address is None
    else:
        assert address is not None and address.port == 9 and address.process == PROCESS
        assert found is True or address.host == found


async def test_it_ends_at_once_and_leaves_no_thread() -> None:
    before = threading.active_count()
    loop = asyncio.get_running_loop()
    pulse = Pulse("127.0.0.1", WORKER_PROCESS, SystemClock())
    pulse.start(loop)
    assert any(thread.name == "stator-pulse" for thread in threading.enumerate())
    started = loop.time()
    await pulse.aclose()
    await pulse.aclose()
    assert loop.time() - started < 0.5
    assert not any(thread.name == "stator-pulse" for thread in threading.enumerate())
    assert threading.active_count() <= before + 1  # the loop's own worker thread may have come
    assert pulse._socket.fileno() == -1


async def test_a_wildcard_pulse_ends_too() -> None:
    async with a_pulse("0.0.0.0") as pulse, a_probe() as probe:
        assert await answers(probe, at(pulse.port)) is not None


# -- what the client makes of it


async def silent(request: Any, context: Any) -> AsyncIterator[Any]:
    """Say one item, then nothing."""
    yield "here"
    await asyncio.Event().wait()


async def test_a_silent_worker_without_pulse_is_suspect_then_dead() -> None:
    observer = Recorder()
    loop = asyncio.get_running_loop()
    async with native_caller(count, config=QUICK, observer=observer) as caller, raw_listener() as listener:
        calling = asyncio.create_task(caller.open(record=native_record(listener.address, process="b" * 32)))
        async with await listener.accepted() as peer:
            await peer.greet("worker", process="b" * 32)
            inbox = await calling
            await peer.until(OPEN)
            await peer.say(frame(5, 1, b"1\n", count=1))
            silence = loop.time()
            await peer.until(PING)
            await eventually(lambda: ("suspect", INSTANCE) in observer.told)
            assert 0.7 < loop.time() - silence < 1.4
            with pytest.raises(StreamIncomplete, match="no pulse"):
                await drain(inbox)
            assert 1.1 < loop.time() - silence < 2.2
            await peer.until_closed()
        assert observer.told == [("suspect", INSTANCE), ("lost", INSTANCE)]


async def test_a_blocked_worker_with_a_pulse_keeps_its_streams_and_recovers() -> None:
    observer = Recorder()
    async with native_caller(count, config=QUICK, observer=observer) as caller, raw_listener() as listener, a_pulse() as pulse:
        record = native_record(listener.address, pulse=f"127.0.0.1:{pulse.port}")
        calling = asyncio.create_task(caller.open(record=record))
        async with await listener.accepted() as peer:
            await peer.greet("worker", process=WORKER_PROCESS)
            inbox = await calling
            await asyncio.sleep(3)  # twice what a process without pulse has
            assert observer.told == [("suspect", INSTANCE)] and not inbox.ended
            await peer.say(frame(ACCEPT, 1))
            await eventually(lambda: observer.told == [("suspect", INSTANCE), ("recovered", INSTANCE)])
            inbox.kill()


async def test_a_suspicion_ends_also_when_its_streams_ended_first() -> None:
    observer = Recorder()
    async with native_caller(count, config=QUICK, observer=observer) as caller, raw_listener() as listener, a_pulse() as pulse:
        record = native_record(listener.address, pulse=f"127.0.0.1:{pulse.port}")
        calling = asyncio.create_task(caller.open(record=record))
        async with await listener.accepted() as peer:
            await peer.greet("worker", process=WORKER_PROCESS)
            inbox = await calling
            await eventually(lambda: observer.told == [("suspect", INSTANCE)])
            inbox.kill()
            await asyncio.sleep(0.5)
            assert observer.told == [("suspect", INSTANCE)]
            await peer.say(frame(PONG, payload=b"statping"))
            await eventually(lambda: observer.told == [("suspect", INSTANCE), ("recovered", INSTANCE)])


async def test_a_quiet_stream_is_asked_and_lives() -> None:
    observer = Recorder()
    config = NativeConfig(unix=False, pulse=True, silence=0.5, suspect_after=0.3, dead_after=1.2)
    async with native_caller(silent, config=config, observer=observer) as caller:
        inbox = await caller.open()
        assert await inbox.more()
        await asyncio.sleep(2.5)
        assert not inbox.ended and observer.told == []
        inbox.kill()
