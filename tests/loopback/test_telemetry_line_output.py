"""Request lines into real pipes: nobody reads, somebody reads again, and other lines in between."""

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from blockbuster import BlockBuster

from stator.protocol.ids import EndpointId
from stator.tasks import SystemClock
from stator.telemetry import LogConfig, RequestLog, configure_logging

ENDPOINT = EndpointId.parse("demo.backend.generate")


class Pipe:
    """A log that goes into a pipe. Set up by the test itself: pytest puts its own handlers on before it calls the test."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self.stream = open(self.writing, "w", encoding="utf-8")  # noqa: SIM115
        self.undo: Callable[[], None] = lambda: None
        self.log = RequestLog(SystemClock())

    def configure(self) -> None:
        self.undo = configure_logging(LogConfig(), stream=self.stream)

    def complete(self, count: int) -> None:
        for number in range(count):
            self.log.completed(f"r-{number}", ENDPOINT, 7, 1.0, 1.0, 1.0, 2.0, 1, 10, "ok")

    def read_all(self) -> bytes:
        """What is in the pipe now."""
        os.set_blocking(self.reading, False)
        found = b""
        try:
            while more := os.read(self.reading, 65536):
                found += more
        except BlockingIOError:
            pass
        return found


class Channel(Pipe):
    """The same with a socket, as systemd gives it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.reading, self.writing = theirs.detach(), ours.detach()
        self.stream = open(self.writing, "w", encoding="utf-8")  # noqa: SIM115
        self.undo = lambda: None
        self.log = RequestLog(SystemClock())


@pytest.fixture(params=[Pipe, Channel])
def any_pipe(request: pytest.FixtureRequest) -> Iterator[Pipe]:
    found = request.param()
    yield found
    found.undo()
    os.close(found.reading)
    try:
        found.stream.close()
    except BrokenPipeError:
        pass


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    found = Pipe()
    yield found
    found.undo()
    os.close(found.reading)
    try:
        found.stream.close()
    except BrokenPipeError:
        pass


@pytest.mark.timeout(30)
async def test_a_pipe_that_nobody_reads_does_not_stop_the_loop(any_pipe: Pipe, no_blocking_calls: BlockBuster) -> None:
    no_blocking_calls.functions["socket.socket.send"].deactivate()  # it does not know MSG_DONTWAIT
    pipe = any_pipe
    pipe.configure()
    begin = time.monotonic()
    for _ in range(30):
        pipe.complete(1000)  # 6 MB; a pipe holds 64 KiB, 1 MiB waits
        pipe.log.flush()
        await asyncio.sleep(0)
    assert time.monotonic() - begin < 10
    assert pipe.log.dropped > 20_000
    lines: list[bytes] = []
    until = time.monotonic() + 20
    while b"were dropped" not in (lines[-1] if lines else b"") and time.monotonic() < until:
        lines += pipe.read_all().splitlines()
        pipe.log.flush()
    told = int(lines[-1].rpartition(b"dropped=")[2])
    assert lines[-1].split()[1] == b"WARN"
    assert told == pipe.log.dropped
    assert len(lines) - 1 + told == 30_000
    assert all(line.count(b"stator.request: request completed request_id=r-") == 1 for line in lines[:-1])


@pytest.mark.timeout(30)
async def test_what_waits_is_written_by_itself_once_there_is_room(pipe: Pipe) -> None:
    pipe.configure()
    pipe.complete(1000)
    pipe.log.flush()
    found = pipe.read_all()
    async with asyncio.timeout(10):
        while found.count(b"\n") < 1000:
            await asyncio.sleep(0.01)
            found += pipe.read_all()
    assert found.count(b"\n") == 1000
    assert pipe.log.dropped == 0


@pytest.mark.timeout(30)
async def test_closing_waits_a_second_for_a_reader_and_no_longer(pipe: Pipe) -> None:
    pipe.configure()
    pipe.complete(1000)
    begin = time.monotonic()
    pipe.log.close()
    assert 0.9 < time.monotonic() - begin < 3
    assert pipe.log.dropped + pipe.read_all().count(b"\n") == 1000


@pytest.mark.timeout(30)
async def test_a_reader_that_is_gone_costs_lines_and_nothing_else(pipe: Pipe) -> None:
    pipe.configure()
    spare = os.dup(pipe.reading)
    os.close(pipe.reading)
    os.close(spare)
    pipe.complete(10)
    pipe.log.flush()
    assert pipe.log.dropped == 10
    pipe.reading = os.open(os.devnull, os.O_RDONLY)


@pytest.mark.timeout(30)
async def test_somebody_stuck_in_a_write_of_their_own_stops_nobody_else(pipe: Pipe) -> None:
    pipe.configure()
    handler = logging.getLogger().handlers[0]
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with handler.lock or threading.RLock():
            held.set()
            done.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(5)
    begin = time.monotonic()
    pipe.complete(10)
    pipe.log.flush()
    assert time.monotonic() - begin < 1
    assert pipe.read_all() == b""
    done.set()
    holder.join(5)
    pipe.log.flush()
    assert pipe.read_all().count(b"\n") == 10


@pytest.mark.timeout(30)
async def test_other_lines_never_come_between_the_parts_of_a_line(pipe: Pipe) -> None:
    pipe.configure()
    found = bytearray()

    def read() -> None:
        while more := os.read(pipe.reading, 700):
            found.extend(more)

    def chat() -> None:
        for _ in range(500):
            logging.getLogger("stator.other").info("chatter %s", "x" * 60)

    reader, talker = threading.Thread(target=read), threading.Thread(target=chat)
    reader.start()
    talker.start()
    for _ in range(20):
        pipe.complete(100)
        await asyncio.sleep(0.005)
    talker.join(20)
    pipe.log.close()
    pipe.undo()
    pipe.stream.close()
    reader.join(20)
    pipe.undo = lambda: None
    lines = bytes(found).splitlines()
    assert sum(b"chatter" in line for line in lines) == 500
    assert sum(b"request completed" in line for line in lines) == 2000
    assert all(line.endswith((b"x" * 60, b"instance_id=7")) and line.startswith(b"20") for line in lines)
