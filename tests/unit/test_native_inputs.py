"""Bidirectional requests on the native plane: inputs under credit, their end, and what ends them (`docs/native-plane.md §5, §6, §7`)."""

from struct import pack
from typing import Any

import pytest

from stator.errors import Cancelled, Disconnected, EngineError, PeerProtocolError, UsageError
from stator.protocol.native.client import ClientStream
from stator.protocol.native.frames import CREDIT, END, ITEMS, KILL, LAST, MAX_PAYLOAD, MORE, OPEN, STOP, frame
from stator.protocol.native.hello import Limits
from stator.protocol.native.inputs import InputReader, InputSender
from stator.protocol.native.outgoing import ITEM_OVERHEAD
from stator.protocol.stream import Receiver
from stator.testing.native_pair import Call, NativePair

WINDOW = 256 * 1024


class Talk:
    """One conversation between two sessions; accepted unless told otherwise."""

    def __init__(self, *, accept: bool = True, **options: Any) -> None:
        self.pair = NativePair(**options)
        self.link: ClientStream = self.pair.converse()
        self.pair.settle()
        self.call: Call = self.pair.calls[0]
        if accept:
            self.call.stream.accept()
            self.pair.settle()

    @property
    def sender(self) -> InputSender:
        assert self.link.sender is not None
        return self.link.sender

    @property
    def inputs(self) -> Receiver:
        body = self.call.request.body
        assert isinstance(body, Receiver)
        return body

    @property
    def reader(self) -> InputReader:
        assert self.call.stream.inputs is not None
        return self.call.stream.inputs

    def take(self) -> list[Any]:
        taken = list(self.inputs.items)
        self.inputs.items.clear()
        self.reader.taken()
        return taken

    def tell(self, *frames: bytes) -> None:
        """The client's bytes, written by hand."""
        self.pair.server.receive_data(b"".join(frames), 0.0)


def test_an_open_without_value_has_inputs() -> None:
    talk = Talk(accept=False)
    assert talk.call.request.streams_in
    assert talk.call.request.size == 0
    (opened,) = (each for each in talk.pair.up.frames if each.kind == OPEN)
    assert opened.flags == 0


def test_a_request_with_a_value_has_none() -> None:
    pair = NativePair()
    stream, _ = pair.open(None)
    pair.settle()
    assert not pair.calls[0].request.streams_in
    assert pair.calls[0].stream.inputs is None
    assert stream.sender is None


def test_credit_comes_when_the_handler_was_called() -> None:
    talk = Talk(accept=False)
    assert talk.sender.credit == 0
    assert talk.pair.server_budget.out == 0
    talk.call.stream.accept()
    talk.pair.settle()
    assert talk.sender.credit == WINDOW
    assert talk.pair.server_budget.out == WINDOW


def test_inputs_arrive_in_order_and_their_end_is_on_the_last_frame() -> None:
    talk = Talk()
    for number in range(5):
        talk.sender.put(number)
    talk.sender.end()
    talk.sender.end()
    talk.pair.settle()
    assert talk.take() == [0, 1, 2, 3, 4]
    assert talk.inputs.ended
    assert talk.inputs.error is None
    assert [(each.kind, each.flags) for each in talk.pair.up.frames[2:]] == [(ITEMS, LAST)]
    assert not talk.link.receiver.ended
    assert talk.call.killed == 0


def test_an_end_of_its_own() -> None:
    talk = Talk()
    talk.sender.end()
    talk.pair.settle()
    assert [(each.kind, each.payload) for each in talk.pair.up.frames[2:]] == [(END, b"")]
    assert talk.inputs.ended


@pytest.mark.parametrize("size", [65_534, 65_535, 65_536, 200_000])
def test_a_large_input_travels_in_pieces(size: int) -> None:
    talk = Talk()
    talk.sender.put("x" * size)
    talk.sender.end()
    talk.pair.settle()
    assert talk.take() == ["x" * size]
    assert talk.inputs.ended


def test_credit_is_returned_when_inputs_are_taken() -> None:
    talk = Talk()
    text = "x" * 1000
    cost = 1000 + 2 + 1 + ITEM_OVERHEAD
    sent = 0
    while talk.sender.credit > 0:
        talk.sender.put(text)
        sent += 1
    talk.pair.settle()
    assert sent == WINDOW // cost + 1
    assert talk.sender.credit <= 0
    assert len(talk.take()) == sent
    talk.pair.settle()
    assert talk.sender.credit == WINDOW


def test_the_answer_goes_on_behind_the_end_of_the_inputs() -> None:
    talk = Talk()
    talk.sender.end()
    talk.pair.settle()
    talk.call.stream.push(b"1")
    talk.call.stream.end()
    talk.pair.settle()
    assert list(talk.link.receiver.items) == [1]
    assert talk.link.receiver.ended
    assert talk.pair.server_budget.out == talk.pair.client_budget.out == 0


def test_the_end_of_the_answer_ends_the_inputs_on_both_sides() -> None:
    talk = Talk()
    inputs = talk.inputs
    talk.sender.put("x" * 100_000)
    talk.pair.up.load()
    talk.call.stream.end()
    sender = talk.sender
    sender.put("more")
    talk.pair.settle()
    assert sender.over
    assert not sender.waiting
    assert not sender.queued
    assert isinstance(inputs.error, Cancelled)
    assert talk.pair.server_budget.out == 0
    assert talk.pair.client.open_streams == talk.pair.server.open_streams == 0
    talk.pair.open(1)  # the connection goes on
    talk.pair.settle()
    assert len(talk.pair.calls) == 2


def test_stop_drops_what_has_not_left_and_ends_the_inputs() -> None:
    talk = Talk()
    talk.sender.put(1)
    talk.pair.settle()
    talk.sender.put("x" * 200_000)
    talk.pair.client.outgoing.writable = False
    talk.link.stop()
    talk.pair.client.outgoing.resume()
    talk.pair.settle()
    assert talk.call.stopped
    assert talk.call.killed == 0
    assert talk.take() == [1]
    assert talk.inputs.ended
    assert talk.inputs.error is None
    assert talk.sender.over
    talk.sender.end()
    talk.pair.settle()
    assert [each.kind for each in talk.pair.up.frames[2:]] == [ITEMS, STOP]
    talk.call.stream.end()
    talk.pair.settle()
    assert talk.link.receiver.ended
    assert talk.link.receiver.error is None


def test_inputs_behind_a_stop_are_dropped() -> None:
    talk = Talk()
    talk.tell(frame(STOP, 1), frame(ITEMS, 1, b"1\n", count=1), frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE), frame(END, 1))
    assert not talk.inputs.items
    assert talk.inputs.error is None


def test_kill_ends_the_inputs_with_an_error() -> None:
    talk = Talk()
    inputs, sender = talk.inputs, talk.sender
    sender.put("x" * 200_000)
    talk.link.kill()
    talk.pair.settle()
    assert talk.call.killed == 1
    assert isinstance(inputs.error, Cancelled)
    assert sender.over
    assert talk.pair.server_budget.out == talk.pair.client_budget.out == 0
    assert not talk.pair.client.killed


def test_an_end_with_an_error_is_a_kill() -> None:
    talk = Talk()
    inputs = talk.inputs
    talk.tell(frame(END, 1, b'{"code":"internal"}'))
    assert talk.call.killed == 1
    assert isinstance(inputs.error, Cancelled)


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_connection_that_ends(side: str) -> None:
    talk = Talk()
    inputs, sender = talk.inputs, talk.sender
    sender.put(1)
    if side == "client":
        talk.pair.client.close("cut")
        assert sender.over
        assert isinstance(talk.link.receiver.error, Disconnected)
        assert talk.pair.client_budget.out == 0
    else:
        talk.pair.server.close()
        assert talk.call.killed == 1
        assert inputs.ended
        assert talk.pair.server_budget.out == 0


def test_a_refused_request_holds_nothing() -> None:
    pair = NativePair()

    def refuse(request: Any) -> None:
        raise EngineError("not bidirectional", kind="InvalidArgument")

    pair.refusing = refuse
    link = pair.converse()
    pair.settle()
    assert isinstance(link.receiver.error, EngineError)
    assert link.sender is not None
    assert link.sender.over
    assert pair.server_budget.out == pair.client_budget.out == 0


def test_a_stop_of_an_open_that_waits_withdraws_it() -> None:
    pair = NativePair()
    pair.client.outgoing.writable = False
    link = pair.converse()
    link.stop()
    assert link.receiver.ended
    assert link.receiver.error is None
    assert link.sender is not None
    assert link.sender.over
    pair.client.outgoing.resume()
    pair.settle()
    assert not pair.calls
    assert not pair.client.killed


def test_an_open_that_waited_is_still_bidirectional() -> None:
    pair = NativePair()
    pair.client.outgoing.writable = False
    pair.converse()
    pair.client.outgoing.resume()
    pair.settle()
    assert pair.calls[0].request.streams_in


def test_an_input_that_cannot_be_sent_is_not() -> None:
    talk = Talk(server_limits=Limits(item=100_000))
    with pytest.raises(EngineError):
        talk.sender.put(object())
    with pytest.raises(UsageError, match="accepts 100000"):
        talk.sender.put("x" * 100_000)
    talk.sender.put("fits")
    talk.sender.end()
    talk.pair.settle()
    assert talk.take() == ["fits"]


BREACHES = {
    "no json": (frame(ITEMS, 1, b"{\n", count=1), "is not JSON"),
    "wrong count": (frame(ITEMS, 1, b"1\n", count=2), "announces 2 items and holds 1"),
    "short fragment": (frame(ITEMS, 1, b"1", flags=MORE), "a fragment of an item has 1 bytes"),
    "inputs behind their end": (frame(END, 1) + frame(ITEMS, 1, b"1\n", count=1), "behind their end"),
    "inputs behind the last": (frame(ITEMS, 1, b"1\n", count=1, flags=LAST) * 2, "behind their end"),
    "two ends": (frame(END, 1) * 2, "ended twice"),
    "end in mid-item": (frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE) + frame(END, 1), "in the middle of one"),
    "more than the window": (frame(ITEMS, 1, b" " * 65_000 + b"1\n", count=1) * 20, "into a window"),
    "input without credit": (
        (frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE) + frame(ITEMS, 1, b"1\n", count=1)) * 9,
        "without credit",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_what_a_worker_does_not_take(name: str) -> None:
    broken, reason = BREACHES[name]
    talk = Talk()
    with pytest.raises(PeerProtocolError, match=reason):
        talk.tell(broken)


def test_inputs_for_a_unary_stream_are_ignored() -> None:
    pair = NativePair()
    pair.open(1)
    pair.settle()
    pair.server.receive_data(frame(ITEMS, 1, b"1\n", count=1) + frame(END, 1) + frame(ITEMS, 99, b"{"), 0.0)
    assert not pair.calls[0].killed


@pytest.mark.parametrize(
    ("payload", "reason"), [(b"123", "CREDIT has 3 bytes"), (b"\xff" * 4, "was granted")], ids=["short", "too much"]
)
def test_credit_that_no_client_takes(payload: bytes, reason: str) -> None:
    talk = Talk()
    with pytest.raises(PeerProtocolError, match=reason):
        talk.pair.client.receive_data(frame(CREDIT, 1, payload), 0.0)


def test_credit_for_a_unary_stream_is_ignored() -> None:
    pair = NativePair()
    pair.open(1)
    pair.client.receive_data(frame(CREDIT, 1, pack(">I", 5)), 0.0)


def test_kill_behind_the_end_of_the_inputs() -> None:
    talk = Talk()
    talk.sender.end()
    talk.pair.settle()
    talk.link.kill()
    talk.pair.settle()
    assert talk.call.killed == 1
    assert [each.kind for each in talk.pair.up.frames[-1:]] == [KILL]
