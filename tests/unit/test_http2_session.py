"""An HTTP/2 connection without its socket: windows, turns, goodbyes, deadlines, floods."""

from collections.abc import Callable

import pytest

from stator.errors import Disconnected, Overloaded, StatorError, Unavailable
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_frames import PREFACE, ErrorCode, FrameViolation, Goaway
from stator.protocol.http2_library import SessionLimits
from stator.protocol.http2_map import Fields
from stator.protocol.http2_session import Session, Verdict

ASK = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"a"), (b":path", b"/p")]
OK = [(b":status", b"200")]
LIMITS = SessionLimits(window=70_000, streams=4)


class Recorder(Exchange):
    """Writes down what happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []
        self.received = b""
        self.keeps = False

    def headers(self, fields: Fields) -> None:
        self.told.append(dict(fields).get(b":status", "asked"))

    def data(self, data: bytes) -> None:
        self.received += data
        if not self.keeps:
            self.release()

    def ended(self) -> None:
        self.told.append("ended")

    def lost(self, error: StatorError) -> None:
        self.told.append(error)

    def too_slow(self, limit: float) -> None:
        self.told.append("too slow")

    def drained(self) -> None:
        if not self.told or self.told[-1] != "drained":
            self.told.append("drained")


class Pair:
    """Two sessions and the bytes between them."""

    def __init__(self, *, client: SessionLimits = LIMITS, server: SessionLimits = LIMITS) -> None:
        self.asked: list[Recorder] = []
        self.goaways: list[Goaway] = []
        self.now = 0.0
        self.client = Session(limits=client, wake=lambda: None, now=0.0, gone_away=self.goaways.append)
        self.server = Session(limits=server, wake=lambda: None, now=0.0, accept=self.accept)
        self.run()

    def accept(self, fields: Fields) -> Exchange:
        exchange = Recorder()
        self.asked.append(exchange)
        return exchange

    def run(self, step: int = 2**30) -> None:
        """Carry bytes until nobody has any."""
        moved = True
        while moved:
            moved = False
            for source, sink in ((self.client, self.server), (self.server, self.client)):
                data = source.data_to_send()
                for start in range(0, len(data), step):
                    sink.receive_data(data[start : start + step], self.now)
                moved |= bool(data)

    def ask(self, body: bytes = b"") -> tuple[Recorder, Recorder]:
        """One more stream: its two ends."""
        exchange = Recorder()
        assert self.client.room
        self.client.open(exchange, ASK)
        if body:
            exchange.push(body)
        self.run()
        return exchange, self.asked[-1]

    def answer(self, there: Recorder, body: bytes = b"") -> None:
        self.server.respond(there, OK)
        if body:
            there.push(body)


@pytest.mark.parametrize("step", [1, 13, 2**30])
def test_a_request_and_its_answer(step: int) -> None:
    pair = Pair()
    here, there = pair.ask(b"question")
    pair.answer(there, b"an")
    there.push(b"swer")
    there.finish()
    pair.run(step)
    here.finish()
    pair.run(step)
    assert there.received == b"question" and here.received == b"answer"
    assert [word for word in here.told if word != "drained"] == [b"200", "ended"]
    assert [word for word in there.told if word != "drained"] == ["asked", "ended"]
    assert not pair.client.streams and not pair.server.streams
    assert here.session is None and there.session is None


def test_a_reader_that_keeps_what_it_got_stops_its_writer_alone() -> None:
    pair = Pair()
    (slow, slows), (quick, quicks) = pair.ask(), pair.ask()
    slow.keeps = True
    for there in (slows, quicks):
        pair.answer(there, b"x" * 200_000)
        there.finish()
    pair.run()
    assert len(slow.received) == 70_000 and slows.pending == 130_000
    assert len(quick.received) == 200_000 and "ended" in quick.told
    slow.release()
    pair.run()
    assert len(slow.received) == 140_000
    slow.keeps = False
    slow.release()
    pair.run()
    assert len(slow.received) == 200_000 and "ended" in slow.told


def test_slow_readers_on_every_stream_do_not_use_up_the_connection() -> None:
    narrow = SessionLimits(window=70_000, connection_window=100_000, streams=4)
    pair = Pair(client=narrow)
    ends = [pair.ask() for _ in range(4)]
    for here, there in ends:
        here.keeps = True
        pair.answer(there, b"x" * 100_000)
    pair.run()
    assert [len(here.received) for here, _ in ends] == [70_000] * 4


def test_a_reserve_is_left_for_what_comes_last() -> None:
    pair = Pair()
    here, there = pair.ask()
    there.keeps = True
    here.reserve = 30
    here.push(b"x" * 100_000)
    pair.run()
    assert len(there.received) == 69_970
    here.truncate(0)
    here.reserve = 0
    here.push(b"the last word")
    pair.run()
    assert there.received.endswith(b"the last word")


def test_the_end_needs_no_window() -> None:
    pair = Pair()
    here, there = pair.ask(b"head")
    there.keeps = True
    here.push(b"x" * 100_000)
    pair.run()
    assert "ended" not in there.told
    here.truncate(0)
    here.finish()
    pair.run()
    assert there.told[-1] == "ended" and len(there.received) == 70_000


def test_truncation_keeps_what_it_is_told_to() -> None:
    exchange = Recorder()
    pair = Pair(client=SessionLimits(window=70_000), server=SessionLimits(window=65_535))
    pair.client.open(exchange, ASK)
    exchange.push(b"h" * 100_000)
    exchange.push(b"item")
    pair.asked.clear()
    pair.client.data_to_send()
    assert exchange.sent_parts == 0
    exchange.truncate(1)
    assert exchange.pending == 100_000 - 65_535


def test_streams_take_turns() -> None:
    pair = Pair(client=SessionLimits(window=10_000_000, streams=4))
    (large, larges), (small, smalls) = pair.ask(), pair.ask()
    pair.answer(larges, b"x" * 5_000_000)
    pair.answer(smalls, b"y")
    first = pair.server.data_to_send()
    assert len(first) < 1_200_000
    pair.client.receive_data(first, 0.0)
    assert small.received == b"y" and len(large.received) < 1_100_000
    assert pair.server.waiting


def test_as_many_streams_as_the_other_side_takes() -> None:
    pair = Pair(client=SessionLimits(streams=100), server=SessionLimits(streams=2))
    pair.ask()
    assert pair.client.room
    pair.ask()
    assert not pair.client.room


def test_a_connection_that_has_not_heard_of_the_other_side_has_no_room() -> None:
    assert not Session(limits=LIMITS, wake=lambda: None, now=0.0).room


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.CANCEL, Disconnected),
        (ErrorCode.REFUSED_STREAM, Unavailable),
        (ErrorCode.ENHANCE_YOUR_CALM, Overloaded),
        (99, Disconnected),
    ],
)
def test_a_reset_is_a_typed_error_for_the_other_side(code: int, kind: type[StatorError]) -> None:
    pair = Pair()
    here, there = pair.ask()
    there.reset(code)
    pair.run()
    assert type(here.told[-1]) is kind
    assert not pair.client.streams and not pair.server.streams
    here.reset(ErrorCode.CANCEL)  # harmless
    here.push(b"x")
    here.finish()
    pair.run()


def test_a_reset_that_crosses_data_leaves_nothing() -> None:
    pair = Pair()
    here, there = pair.ask()
    pair.answer(there, b"x" * 60_000)
    here.reset(ErrorCode.CANCEL)
    pair.run()
    assert here.received == b"" and isinstance(there.told[-1], Disconnected)
    again, theirs = pair.ask(b"next")
    pair.answer(theirs, b"x" * 200_000)
    pair.run()
    assert len(again.received) == 200_000


# -- goodbyes


def test_streams_go_on_behind_a_goaway_and_new_ones_are_not_taken() -> None:
    pair = Pair()
    here, there = pair.ask()
    late = Recorder()
    pair.server.drain("moving")
    pair.client.open(late, ASK)
    pair.run()
    assert pair.goaways == [Goaway(last=1, code=0, reason="moving")]
    assert isinstance(late.told[-1], Unavailable) and late.told[-1].retryable
    assert not pair.client.room and pair.client.spent
    assert len(pair.asked) == 1
    pair.answer(there, b"x" * 100_000)
    there.finish()
    here.finish()
    pair.run()
    assert len(here.received) == 100_000
    assert pair.client.judge(0.0) is pair.server.judge(0.0) is Verdict.IDLE


def test_the_end_of_the_connection_ends_its_streams() -> None:
    pair = Pair()
    here, there = pair.ask()
    pair.client.close("cut")
    pair.server.close("cut")
    for end in (here, there):
        assert isinstance(end.told[-1], Disconnected) and end.session is None


# -- time


def test_silence_is_answered_by_a_ping_and_then_by_the_end() -> None:
    pair = Pair()
    pair.ask()
    assert pair.client.judge(29.9) is Verdict.FINE
    pair.now = 29.9
    assert not pair.client.data_to_send()
    assert pair.client.judge(30.0) is Verdict.FINE
    ping = pair.client.data_to_send()
    assert len(ping) == 17
    assert pair.client.judge(39.9) is Verdict.FINE
    assert pair.client.judge(40.0) is Verdict.DEAD
    pair.server.receive_data(ping, 40.0)
    pair.client.receive_data(pair.server.data_to_send(), 40.0)
    assert pair.client.judge(40.1) is Verdict.FINE


def test_a_connection_without_streams_is_idle_after_a_while() -> None:
    pair = Pair()
    here, _ = pair.ask()
    assert pair.client.judge(20.0) is Verdict.FINE
    here.reset(ErrorCode.CANCEL)
    pair.run()
    assert pair.client.judge(109.0) is Verdict.FINE
    assert pair.client.judge(110.0) is Verdict.IDLE


def test_a_request_that_does_not_arrive_is_told_so() -> None:
    pair = Pair()
    _, first = pair.ask()
    pair.now = 10.0
    _, second = pair.ask()
    pair.server.has_arrived(second)
    pair.server.judge(29.0)
    assert "too slow" not in first.told
    pair.server.judge(30.0)
    pair.server.judge(50.0)
    assert first.told.count("too slow") == 1 and "too slow" not in second.told


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_stream_that_the_other_side_does_not_end_is_reset(side: str) -> None:
    pair = Pair()
    here, there = pair.ask()
    end, session, other = (here, pair.client, there) if side == "client" else (there, pair.server, here)
    if side == "server":
        pair.answer(there)
    end.finish()
    pair.run()
    session.judge(9.9)
    assert session.streams
    session.judge(10.0)
    assert not session.streams
    pair.run()
    assert isinstance(other.told[-1], Disconnected)


# -- what is too much


def rapid_resets(session: Session) -> Callable[[], None]:
    def once() -> None:
        exchange = Recorder()
        session.open(exchange, ASK)
        exchange.reset(ErrorCode.CANCEL)

    return once


def pings(session: Session) -> Callable[[], None]:
    return lambda: session._h2.ping(b"12345678")  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("flood", [rapid_resets, pings])
def test_a_flood_of_frames_that_carry_nothing_ends_the_connection(flood: Callable[[Session], Callable[[], None]]) -> None:
    pair = Pair(server=SessionLimits(idle_rate=100.0, idle_burst=500.0))
    once = flood(pair.client)

    def rounds(n: int) -> None:
        for _ in range(n):
            once()
            pair.server.receive_data(pair.client.data_to_send(), pair.now)

    rounds(490)
    pair.now = 2.0
    rounds(190)
    with pytest.raises(FrameViolation) as caught:
        rounds(30)
    assert caught.value.wire_code == ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n" * 3,
        PREFACE + b"\0\0\0\x01\x04\0\0\0\x01" * 3,
        PREFACE + b"\0\0\x06\x04\0\0\0\0\x01\0\x04\0\0\0\1",
        PREFACE + b"\0\0\x06\x04\0\0\0\0\0\0\x04\xff\xff\xff\xff",
        PREFACE + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x04\x01\x04\0\0\0\x01\xff\xff\xff\xff",
        PREFACE + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x01\0\0\0\0\0\x01x",
        PREFACE + b"\0\0\0\x04\0\0\0\0\0" + b"\0\0\x05\x00\x08\0\0\0\x01\xff1234",
    ],
)
def test_what_is_not_http2_is_one_kind_of_error(data: bytes) -> None:
    session = Session(limits=LIMITS, wake=lambda: None, now=0.0, accept=lambda fields: Recorder())
    with pytest.raises(FrameViolation):
        session.receive_data(data, 0.0)
    assert session.goodbye(ErrorCode.PROTOCOL_ERROR, "x").endswith(b"x")
