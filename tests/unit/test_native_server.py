"""The answering end without a socket: what it takes, what it refuses, what it answers."""

from struct import pack
from typing import Any

import msgspec
import pytest

from stator.errors import EngineError, Overloaded, PeerProtocolError, StatorError, Unavailable
from stator.protocol.native.frames import (
    ACCEPT,
    CREDIT,
    CRITICAL,
    END,
    GOAWAY,
    HELLO,
    ITEMS,
    KILL,
    LAST,
    MAX_PAYLOAD,
    MORE,
    OPEN,
    PING,
    PONG,
    REFUSE,
    STOP,
    frame,
)
from stator.protocol.native.hello import Goaway, Hello, Limits
from stator.protocol.native.problem import decode_error
from stator.testing.native_pair import CLIENT_PROCESS, Frame, NativePair, read_frames

HEAD: list[Any] = ["1/generate", "r1", {}, {}, None]


def opening(number: int = 1, *, head: Any = None, payload: bytes = b"{}", credit: int = 1000, flags: int = 0) -> bytes:
    written = head if isinstance(head, bytes) else msgspec.json.encode(HEAD if head is None else head)
    return frame(OPEN, number, pack(">IH", credit, len(written)) + written + payload, flags=flags)


class Worker:
    """A server session and what it says to a client of our own making."""

    def __init__(self, *, greet: bool = True, **options: Any) -> None:
        self.pair = NativePair(greet=False, **options)
        self.session = self.pair.server
        self.session.outgoing.data_to_send()
        if greet:
            self.tell(frame(HELLO, payload=Hello(process=CLIENT_PROCESS, role="client").encode(), flags=CRITICAL))

    @property
    def calls(self) -> list[Any]:
        return self.pair.calls

    def tell(self, *frames: bytes) -> None:
        self.session.receive_data(b"".join(frames), 0.0)

    def said(self) -> list[Frame]:
        return read_frames(self.session.outgoing.data_to_send())

    def error(self) -> StatorError:
        """The error of the only frame it says next."""
        (answer,) = self.said()
        assert answer.kind in (REFUSE, END)
        return decode_error(answer.payload)


def test_a_request_is_taken_and_answered() -> None:
    worker = Worker()
    worker.tell(opening(payload=b'{"prompt":"hi"}', head=["7/generate", "r9", {"m": "1"}, {"h": "2"}, 1.5]))
    (call,) = worker.calls
    request = call.request
    assert (request.id, request.body, request.metadata, request.headers, request.deadline) == (
        "r9",
        {"prompt": "hi"},
        {"m": "1"},
        {"h": "2"},
        1.5,
    )
    call.stream.accept()
    call.stream.push(b"1")
    call.stream.end()
    assert worker.said() == [Frame(ITEMS, LAST, 1, 1, b"1\n")]
    assert worker.session.open_streams == 0


def test_accept_alone_is_said() -> None:
    worker = Worker()
    worker.tell(opening())
    worker.calls[0].stream.accept()
    assert [each.kind for each in worker.said()] == [ACCEPT]


@pytest.mark.parametrize("limit", [MAX_PAYLOAD, 200_000])
def test_a_request_in_fragments(limit: int) -> None:
    worker = Worker()
    body = opening(payload=msgspec.json.encode("x" * limit))[12:]
    pieces = [body[at : at + MAX_PAYLOAD] for at in range(0, len(body), MAX_PAYLOAD)]
    for piece in pieces[:-1]:
        worker.tell(frame(OPEN, 1, piece, flags=MORE))
        assert worker.calls == [] and worker.session.open_streams == 1
    assert worker.pair.server_budget.out == len(body) - len(pieces[-1])
    worker.tell(frame(OPEN, 1, pieces[-1]))
    assert worker.calls[0].request.body == "x" * limit
    assert worker.pair.server_budget.out == 0


def test_the_last_fragment_may_be_empty() -> None:
    worker = Worker()
    body = opening(payload=b"0" + b" " * 70_000)[12:]
    worker.tell(frame(OPEN, 1, body[:MAX_PAYLOAD], flags=MORE), frame(OPEN, 1, b""))
    assert worker.calls[0].request.body == 0


FULL = frame(OPEN, 1, opening(payload=b" " * MAX_PAYLOAD)[12 : 12 + MAX_PAYLOAD], flags=MORE)


@pytest.mark.parametrize(
    "frames",
    [
        [frame(OPEN, 0, opening()[12:])],
        [frame(OPEN, 2, opening()[12:])],
        [opening(), opening()],
        [opening(), FULL],
        [frame(OPEN, 1, b"")],
        [frame(OPEN, 1, b"12345")],
        [frame(OPEN, 1, pack(">IH", 1, 60_000) + b"[]")],
        [opening(credit=0)],
        [opening(head=b"")],
        [opening(head=b"{")],
        [opening(head=b"\xff")],
        [opening(head=b"[" * 60_000)],
        [opening(head={})],
        [opening(head=[])],
        [opening(head=HEAD[:4])],
        [opening(head=[*HEAD, None])],
        [opening(head=[1, *HEAD[1:]])],
        [opening(head=["p", "i", {"a": 1}, {}, None])],
        [opening(head=["p", "i", [], {}, None])],
        [opening(head=["p", "i", {}, {}, "soon"])],
        [opening(flags=MORE)],
        [frame(OPEN, 1, b"", flags=MORE)],
        [frame(OPEN, 1, b"x" * (MAX_PAYLOAD - 1), flags=MORE)],
        [FULL, frame(OPEN, 1, b"x", flags=MORE)],
        [frame(CREDIT, 1, b"")],
        [frame(CREDIT, 77, b"123")],
        [frame(CREDIT, 1, b"12345")],
        [frame(ACCEPT, 1)],
        [frame(REFUSE, 1)],
        [frame(PING, 1, b"12345678")],
        [frame(HELLO, 1)],
        [frame(HELLO, 0)],
        [frame(PING, 0, b"")],
        [frame(PING, 0, b"123456789")],
        [frame(STOP, 0)],
        [frame(CREDIT, 0, b"1234")],
        [frame(14, 0, flags=CRITICAL)],
        [frame(255, 1, flags=CRITICAL)],
        [frame(0, 5, flags=CRITICAL)],
    ],
    ids=lambda frames: repr(b"".join(frames)[:40]),
)
def test_broken_frames_break_the_connection(frames: list[bytes]) -> None:
    worker = Worker()
    with pytest.raises(PeerProtocolError):
        worker.tell(*frames)


@pytest.mark.parametrize(
    "ignored",
    [
        frame(15, 0),
        frame(200, 1, b"payload"),
        frame(0, 77),
        frame(STOP, 77),
        frame(KILL, 77),
        frame(CREDIT, 77, b"1234"),
        frame(ITEMS, 1, b"{", count=9),
        frame(END, 1, b"{"),
        frame(PONG, 0, b""),
        frame(STOP, 1, b"payload", flags=0x7C),
    ],
    ids=repr,
)
def test_what_may_come_is_ignored(ignored: bytes) -> None:
    worker = Worker()
    worker.tell(opening(), ignored, opening(3))
    assert len(worker.calls) == 2


def test_a_ping_is_answered() -> None:
    worker = Worker()
    worker.tell(frame(PING, 0, b"abcdefgh"))
    assert worker.said() == [Frame(PONG, 0, 0, 0, b"abcdefgh")]


def test_nothing_is_taken_before_hello() -> None:
    for early in (opening(), frame(PING, 0, b"12345678"), frame(99, 0)):
        with pytest.raises(PeerProtocolError, match="first frame must be HELLO"):
            Worker(greet=False).tell(early)


def test_another_worker_is_no_client() -> None:
    with pytest.raises(PeerProtocolError, match="both ends"):
        Worker(greet=False).tell(frame(HELLO, payload=Hello(process="b" * 32, role="worker").encode()))


@pytest.mark.parametrize("bad", [b" ", b"{", b"\xff", b'"\\ud800"', b"[" * 50_000, b"9" * 5000, b"1 2"])
def test_a_value_that_is_not_json_is_refused_alone(bad: bytes) -> None:
    worker = Worker()
    worker.tell(opening(payload=bad), opening(3))
    assert len(worker.calls) == 1
    assert isinstance(worker.error(), PeerProtocolError)
    assert worker.session.open_streams == 1


def test_an_unknown_endpoint_is_refused() -> None:
    worker = Worker()
    worker.tell(opening(head=["unknown", "r", {}, {}, None]))
    error = worker.error()
    assert isinstance(error, Unavailable) and "unknown endpoint 'unknown'" in error.message


def test_a_sink_may_refuse() -> None:
    worker = Worker()

    def refuse(request: Any) -> None:
        raise Overloaded("full")

    worker.pair.refusing = refuse
    worker.tell(opening())
    assert isinstance(worker.error(), Overloaded) and worker.session.open_streams == 0


def test_a_sink_that_breaks_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker()

    def breaks(request: Any) -> None:
        raise KeyError("surprise")

    worker.tell(opening())
    worker.pair.refusing = breaks
    worker.tell(opening(3))
    error = worker.error()
    assert error.code == "internal" and "KeyError" in error.message
    assert "request r1 could not be taken" in caplog.text
    assert worker.session.open_streams == 1


def test_more_streams_than_announced_break_the_connection() -> None:
    worker = Worker(server_limits=Limits(streams=3))
    worker.tell(*[opening(number) for number in (1, 3, 5)])
    with pytest.raises(PeerProtocolError, match="more than 3 streams"):
        worker.tell(opening(7))


def test_arriving_requests_count_as_streams() -> None:
    worker = Worker(server_limits=Limits(streams=3))
    worker.tell(*[frame(OPEN, number, FULL[12:], flags=MORE) for number in (1, 3, 5)])
    with pytest.raises(PeerProtocolError, match="more than 3 streams"):
        worker.tell(frame(OPEN, 7, FULL[12:], flags=MORE))


def test_fragments_that_never_end_are_bounded() -> None:
    worker = Worker(server_limits=Limits(request=1_000_000))
    with pytest.raises(PeerProtocolError, match="larger than 1000000 bytes"):
        for number in range(100):
            assert number < 20
            worker.tell(FULL)
    worker.session.close()
    assert worker.pair.server_budget.out == 0 and worker.session.open_streams == 0


# -- credit


def test_credit_is_added_up() -> None:
    worker = Worker()
    worker.tell(opening(credit=100))
    stream = worker.calls[0].stream
    assert stream.credit == 100
    worker.tell(frame(CREDIT, 1, pack(">I", 50)), frame(CREDIT, 1, pack(">I", 0)))
    assert stream.credit == 150


def test_credit_has_an_end() -> None:
    worker = Worker()
    worker.tell(opening(credit=2**32 - 1))
    worker.calls[0].stream.push(b"x" * 1000)
    worker.tell(frame(CREDIT, 1, pack(">I", 1065)))
    with pytest.raises(PeerProtocolError, match="4294967296 bytes in all"):
        worker.tell(frame(CREDIT, 1, pack(">I", 1)))


# -- stop, kill, ends


def test_stop_reaches_the_handler() -> None:
    worker = Worker()
    worker.tell(opening(), frame(STOP, 1), frame(STOP, 1))
    (call,) = worker.calls
    assert call.stopped and not call.killed
    call.stream.push(b"1")
    call.stream.end()
    assert worker.said() == [Frame(ITEMS, LAST, 1, 1, b"1\n")]


def test_kill_is_answered_by_one_end_and_nothing_else() -> None:
    worker = Worker()
    worker.tell(opening())
    (call,) = worker.calls
    call.stream.accept()
    call.stream.push(b"1")
    worker.tell(frame(KILL, 1), frame(KILL, 1))
    assert call.killed == 1
    call.stream.end()
    call.stream.refuse(Unavailable("late"))
    assert worker.error().code == "cancelled"
    assert worker.said() == [] and worker.session.open_streams == 0


def test_a_kill_that_crosses_the_end_is_not_answered() -> None:
    worker = Worker()
    worker.tell(opening())
    worker.calls[0].stream.end(EngineError("x"))
    worker.tell(frame(KILL, 1))
    assert [each.kind for each in worker.said()] == [END]
    assert worker.calls[0].killed == 0


def test_a_kill_of_an_arriving_request_is_answered() -> None:
    worker = Worker()
    worker.tell(FULL, frame(KILL, 1))
    assert worker.error().code == "cancelled"
    assert worker.session.open_streams == 0 and worker.pair.server_budget.out == 0
    worker.tell(opening(1))
    assert len(worker.calls) == 1


def test_a_kill_of_a_refused_arriving_request_is_not_answered() -> None:
    worker = Worker(server_total=100_000)
    worker.tell(FULL, FULL)
    assert isinstance(worker.error(), Overloaded)
    worker.tell(FULL, frame(KILL, 1))
    assert worker.said() == []
    assert worker.session.open_streams == 0 and worker.pair.server_budget.out == 0


def test_the_rest_of_a_refused_request_may_come_as_well() -> None:
    worker = Worker(server_total=100_000)
    worker.tell(FULL, FULL, FULL, frame(OPEN, 1, b"end"))
    assert isinstance(worker.error(), Overloaded)
    assert worker.calls == [] and worker.session.open_streams == 0


def test_a_lost_connection_tells_every_handler() -> None:
    worker = Worker()
    worker.tell(opening(1), opening(3), frame(OPEN, 5, FULL[12:], flags=MORE))
    worker.session.close()
    assert [call.killed for call in worker.calls] == [1, 1]
    assert worker.session.open_streams == 0 and worker.pair.server_budget.out == 0
    for call in worker.calls:
        call.stream.accept()
        call.stream.end()
        call.stream.refuse(Unavailable("late"))
    assert worker.said() == []


def test_draining_refuses_later_requests_and_finishes_the_others() -> None:
    worker = Worker()
    worker.tell(opening(5))
    worker.session.drain()
    worker.session.drain()
    (goaway,) = worker.said()
    assert goaway.kind == GOAWAY
    assert msgspec.json.decode(goaway.payload) == {"last": 5, "code": "unavailable", "reason": "draining"}
    worker.tell(opening(7))
    assert isinstance(worker.error(), Unavailable)
    worker.calls[0].stream.end()
    assert [each.stream for each in worker.said()] == [5]


def test_a_clients_goaway_is_remembered() -> None:
    worker = Worker()
    worker.tell(frame(GOAWAY, payload=Goaway(code="protocol").encode()))
    assert worker.session.gone is not None
