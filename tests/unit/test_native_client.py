"""The dialling end without a socket: what it writes, what it refuses, what it keeps."""

from struct import unpack
from typing import Any

import msgspec
import pytest

from stator.errors import (
    Cancelled,
    Disconnected,
    Overloaded,
    PeerProtocolError,
    StatorError,
    StreamIncomplete,
    Unavailable,
    UsageError,
)
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.native.frames import (
    ACCEPT,
    CREDIT,
    END,
    GOAWAY,
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
from stator.protocol.native.hello import Goaway, Limits
from stator.protocol.native.problem import encode_error
from stator.protocol.stream import Phase, Receiver
from stator.testing.native_pair import Frame, NativePair, read_frames

WINDOW = 16 * 1024


def envelope(**changes: Any) -> RequestEnvelope:
    return RequestEnvelope(**{"id": "r1", "payload": b"{}", **changes})


def said(pair: NativePair) -> list[Frame]:
    """What the client writes next."""
    return read_frames(pair.client.outgoing.data_to_send())


def tell(pair: NativePair, *frames: bytes) -> None:
    """Frames of a worker of our own making."""
    pair.client.receive_data(b"".join(frames), 0.0)


# -- OPEN


def test_the_layout_of_open_is_the_documented_one() -> None:
    pair = NativePair(window=WINDOW)
    pair.client.open(
        "7b/generate",
        envelope(payload=b'{"a":1}', metadata={"m": "ü"}, headers={"traceparent": "t"}, deadline=2.5),
        Receiver(),
    )
    (opened,) = said(pair)
    assert (opened.kind, opened.flags, opened.count, opened.stream) == (OPEN, 0, 0, 1)
    credit, size = unpack(">IH", opened.payload[:6])
    assert credit == WINDOW
    assert msgspec.json.decode(opened.payload[6 : 6 + size]) == ["7b/generate", "r1", {"m": "ü"}, {"traceparent": "t"}, 2.5]
    assert opened.payload[6 + size :] == b'{"a":1}'


def test_the_request_reaches_its_sink_as_it_was_sent() -> None:
    pair = NativePair()
    _, receiver = pair.open({"prompt": "x" * 100_000}, id="long")
    pair.settle()
    request = pair.calls[0].request
    assert request.id == "long" and request.body == {"prompt": "x" * 100_000}
    assert receiver.phase is Phase.ACCEPT


def test_ids_are_odd_count_up_and_wrap() -> None:
    pair = NativePair()
    assert [pair.open()[0].number for _ in range(3)] == [1, 3, 5]
    pair.client._last = 2**32 - 3
    assert [pair.open()[0].number for _ in range(3)] == [2**32 - 1, 7, 9]


def test_a_killed_id_is_not_used_before_its_end() -> None:
    pair = NativePair()
    link, _ = pair.open()
    pair.settle()
    link.kill()
    pair.client._last = 2**32 - 1
    assert pair.open()[0].number == 3
    pair.settle()
    pair.client._last = 2**32 - 1
    assert pair.open()[0].number == 1


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"payload": b" " * 1001}, "has 1001 bytes, the instance accepts 1000"),
        ({"metadata": {"m": "x" * 65_000}}, "allowed are 65000"),
        ({"id": "x" * 65_001}, "allowed are 65000"),
        ({"metadata": {"m": "\ud800"}}, "cannot be written"),
        ({"headers": {"h": object()}}, "cannot be written"),
    ],
)
def test_a_request_that_cannot_be_sent_is_the_callers_mistake(bad: dict[str, Any], match: str) -> None:
    pair = NativePair(server_limits=Limits(request=1000))
    with pytest.raises(UsageError, match=match):
        pair.client.open("1/generate", envelope(**bad), Receiver())
    assert pair.client.open_streams == 0 and pair.client_budget.out == 0 and said(pair) == []


def test_more_streams_than_the_worker_takes_are_not_sent() -> None:
    pair = NativePair(server_limits=Limits(streams=3))
    links = [pair.open()[0] for _ in range(3)]
    pair.settle()
    with pytest.raises(Overloaded, match="all 3 streams"):
        pair.open()
    links[0].kill()  # its id is taken until the END
    with pytest.raises(Overloaded):
        pair.open()
    pair.settle()
    pair.open()


def test_requests_wait_for_a_paused_transport_and_are_withdrawn_without_a_trace() -> None:
    pair = NativePair()
    pair.client.outgoing.writable = False
    kept, _ = pair.open(1)
    killed, _ = pair.open(2)
    stopped, receiver = pair.open(3)
    assert said(pair) == []
    killed.kill()
    stopped.stop()
    assert receiver.ended and receiver.error is None
    pair.client.outgoing.resume()
    assert [(each.kind, each.stream) for each in said(pair)] == [(OPEN, kept.number)]
    assert pair.client.killed == set() and pair.client.open_streams == 1


@pytest.mark.parametrize("how", ["kill", "stop", "forget"])
def test_a_request_that_has_begun_to_leave_is_killed_and_nothing_more_of_it_leaves(how: str) -> None:
    pair = NativePair()
    link, receiver = pair.open("x" * 3_000_000)
    pair.up.load()
    pair.up.carry()
    assert pair.server.open_streams == 1
    if how == "forget":
        pair.client.refuse_unaccepted(1, "left")
    else:
        getattr(link, how)()
    pair.settle()
    assert pair.calls == [] and pair.up.frames[-1].kind == KILL
    assert receiver.ended is (how != "kill")
    assert pair.server.open_streams == pair.client.open_streams == 0 and not pair.client.killed
    assert pair.server_budget.out == pair.client_budget.out == 0


def test_a_large_request_refused_while_it_arrives_is_cut_short() -> None:
    pair = NativePair(server_total=200_000)
    _, receiver = pair.open("x" * 3_000_000)
    for wire in (pair.up, pair.down):
        wire.load()
        wire.carry()
    pair.settle()
    assert isinstance(receiver.error, Overloaded)
    assert sum(len(each.payload) for each in pair.up.frames) < 2_000_000
    assert [each.kind for each in pair.down.frames].count(REFUSE) == 1
    assert END not in [each.kind for each in pair.down.frames]
    assert pair.server.open_streams == 0 and pair.server_budget.out == 0


# -- items


def started(window: int = WINDOW, **receiver: Any) -> tuple[NativePair, Receiver]:
    pair = NativePair(window=window)
    _, got = pair.open(receiver=Receiver(instance=1, **receiver))
    said(pair)
    return pair, got


def test_items_become_values() -> None:
    pair, receiver = started()
    tell(pair, frame(ITEMS, 1, b'{"a":1}\nnull\n"x"\n', count=3))
    assert list(receiver.items) == [{"a": 1}, None, "x"] and receiver.phase is Phase.ITEMS


def test_items_are_decoded_to_the_callers_type() -> None:
    class Token(msgspec.Struct):
        id: int

    pair, receiver = started(item_type=Token)
    tell(pair, frame(ITEMS, 1, b'{"id":1}\n{"id":2}\n', count=2))
    assert list(receiver.items) == [Token(1), Token(2)]


@pytest.mark.parametrize("last", [0, LAST])
def test_items_of_another_type_end_their_stream_only(last: int) -> None:
    pair, receiver = started(item_type=int)
    _, neighbour = pair.open()
    said(pair)
    tell(pair, frame(ITEMS, 1, b'"text"\n', count=1, flags=last), frame(ITEMS, 3, b"1\n", count=1))
    assert isinstance(receiver.error, PeerProtocolError) and list(neighbour.items) == [1]
    assert [(each.kind, each.stream) for each in said(pair)] == [(KILL, 1)]
    if not last:
        assert pair.client.killed == {1}
        tell(pair, frame(END, 1, b"{}"))
    assert pair.client.killed == set()


def test_a_null_in_fragments_is_an_item() -> None:
    pair, receiver = started()
    tell(pair, frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE), frame(ITEMS, 1, b"null\n", count=1))
    assert list(receiver.items) == [None]


@pytest.mark.parametrize(
    "frames",
    [
        [frame(ITEMS, 1, b"1\n2\n", count=1)],
        [frame(ITEMS, 1, b"1\n", count=2)],
        [frame(ITEMS, 1, b"", count=1)],
        [frame(ITEMS, 1, b"1\n", count=0)],
        [frame(ITEMS, 1, b"{\n", count=1)],
        [frame(ITEMS, 1, b"\xff\n", count=1)],
        [frame(ITEMS, 1, b"[" * MAX_PAYLOAD, count=1)],
        [frame(ITEMS, 1, b"1\n", flags=MORE)],
        [frame(ITEMS, 1, b"", flags=MORE)],
        [frame(ITEMS, 1, b"x" * MAX_PAYLOAD, flags=MORE, count=1)],
        [frame(ITEMS, 1, b"x" * MAX_PAYLOAD, flags=MORE | LAST)],
        [frame(ITEMS, 1, b"x" * MAX_PAYLOAD, flags=MORE), frame(ITEMS, 1, b"1\n", count=2)],
        [frame(ITEMS, 1, b"x" * MAX_PAYLOAD, flags=MORE), frame(ITEMS, 1, b"1\n", count=0)],
        [frame(ITEMS, 1, b"x" * MAX_PAYLOAD, flags=MORE), frame(ITEMS, 1, b"1\n", count=1)],
        [frame(ITEMS, 1, b"x" * MAX_PAYLOAD, flags=MORE), frame(END, 1)],
        [frame(OPEN, 1)],
        [frame(STOP, 1)],
        [frame(KILL, 3)],
        [frame(PING, 1, b"12345678")],
        [frame(GOAWAY, 1)],
        [frame(ITEMS, 0, b"1\n", count=1)],
        [frame(END, 0)],
        [frame(PING, 0, b"1234567")],
        [frame(99, 1, flags=0x80)],
        [frame(99, 3, flags=0x80)],
        [frame(99, 0, flags=0x80)],
    ],
    ids=lambda frames: repr(b"".join(frames)[:20]),
)
def test_broken_frames_break_the_connection(frames: list[bytes]) -> None:
    pair, _ = started()
    with pytest.raises(PeerProtocolError):
        tell(pair, *frames)


@pytest.mark.parametrize(
    "ignored",
    [
        frame(99, 1),
        frame(99, 0),
        frame(99, 77, b"payload"),
        frame(ITEMS, 77, b"not json", count=5),
        frame(END, 77),
        frame(REFUSE, 77, b"{"),
        frame(ACCEPT, 77),
        frame(CREDIT, 77, b""),
        frame(CREDIT, 1, b"xxxxx"),
        frame(PONG, 0, b"whatever"),
        frame(ACCEPT, 1, b"payload", flags=0x7E),
    ],
    ids=repr,
)
def test_what_may_come_is_ignored(ignored: bytes) -> None:
    pair, receiver = started()
    tell(pair, ignored, frame(ITEMS, 1, b"1\n", count=1, flags=LAST))
    assert list(receiver.items) == [1] and receiver.ended and receiver.error is None


def test_a_ping_is_answered() -> None:
    pair, _ = started()
    tell(pair, frame(PING, 0, b"abcdefgh"))
    assert said(pair) == [Frame(PONG, 0, 0, 0, b"abcdefgh")]


def test_pings_of_a_worker_that_does_not_read_pile_up_no_answers() -> None:
    pair, _ = started()
    pair.client.outgoing.writable = False
    tell(pair, *[frame(PING, 0, b"abcdefgh")] * 10_000)
    assert len(said(pair)) == 64
    pair.client.outgoing.resume()
    tell(pair, frame(PING, 0, b"abcdefgh"))
    assert len(said(pair)) == 1


# -- credit


def grants(pair: NativePair) -> list[int]:
    return [unpack(">I", each.payload)[0] for each in said(pair) if each.kind == CREDIT]


def test_credit_comes_back_when_items_are_taken_half_a_window_at_a_time() -> None:
    pair, receiver = started()
    link = pair.client.streams[1]
    payload = b'"' + b"x" * 2996 + b'"\n'
    for _ in range(2):
        tell(pair, frame(ITEMS, 1, payload, count=1))
        receiver.items.clear()
        link.taken()
        assert grants(pair) == []
    tell(pair, frame(ITEMS, 1, payload, count=1))
    assert grants(pair) == []  # not taken yet
    receiver.items.clear()
    link.taken()
    assert grants(pair) == [3 * (2999 + 64)]


def test_a_slow_reader_holds_its_window_and_one_item_however_large_items_are() -> None:
    pair = NativePair(window=WINDOW)
    _, receiver = pair.open()
    pair.settle()
    stream = pair.calls[0].stream
    for _ in range(50):
        if stream.credit <= 0:
            break
        stream.push(b'"' + b"x" * 65_600 + b'"')  # a fragment and a little more
        pair.settle()
    assert len(receiver.items) == 1
    assert stream.credit <= 0


@pytest.mark.parametrize("size", [WINDOW - 70, WINDOW, 64 * 1024, 1_000_000])
def test_no_item_size_stops_a_stream_for_good(size: int) -> None:
    pair = NativePair(window=WINDOW, record=False)
    link, receiver = pair.open()
    pair.settle()
    stream = pair.calls[0].stream
    for _ in range(20):
        assert stream.credit > 0
        stream.push(b'"' + b"x" * size + b'"')
        pair.settle()
        assert len(receiver.items) == 1
        receiver.items.clear()
        link.taken()
        pair.settle()


def test_more_than_the_window_breaks_the_connection() -> None:
    pair, _ = started()
    full = frame(ITEMS, 1, b'"' + b"x" * 60_000 + b'"\n', count=1)
    tell(pair, full)  # started under credit
    with pytest.raises(PeerProtocolError, match="into a window of 16384"):
        for _ in range(3):
            tell(pair, full)


def test_an_item_in_fragments_begun_without_credit_breaks_the_connection() -> None:
    pair, _ = started()
    whole = [frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE), frame(ITEMS, 1, b"1\n", count=1)]
    tell(pair, *whole)
    with pytest.raises(PeerProtocolError, match="began an item without credit"):
        tell(pair, whole[0])


def test_fragments_that_never_end_are_bounded() -> None:
    pair = NativePair(window=WINDOW, client_limits=Limits(item=1_000_000))
    pair.open()
    said(pair)
    fragment = frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE)
    with pytest.raises(PeerProtocolError, match="larger than 1000000 bytes"):
        for number in range(100):
            assert number < 16
            tell(pair, fragment)


def test_the_first_fragment_of_the_first_item_is_an_acceptance() -> None:
    pair, receiver = started()
    tell(pair, frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE))
    assert receiver.phase is Phase.FIRST_ITEM and not receiver.delivered


# -- ends


@pytest.mark.parametrize("kind", [END, REFUSE])
def test_an_error_ends_the_stream(kind: int) -> None:
    pair, receiver = started()
    tell(pair, frame(kind, 1, encode_error(Unavailable("draining"))))
    assert isinstance(receiver.error, Unavailable) and receiver.error.instance == 1
    assert pair.client.open_streams == 0 and pair.client_budget.out == 0


@pytest.mark.parametrize("bad", [b"{", b"null", b"\xff", b"[" * 50_000])
@pytest.mark.parametrize("kind", [END, REFUSE])
def test_an_error_that_cannot_be_read_still_ends_the_stream(kind: int, bad: bytes) -> None:
    pair, receiver = started()
    tell(pair, frame(kind, 1, bad))
    assert type(receiver.error) is StatorError


def test_what_arrives_after_a_kill_is_dropped() -> None:
    pair, receiver = started()
    pair.client.streams[1].kill()
    receiver.finish(Cancelled("by us"))
    tell(pair, frame(ITEMS, 1, b"1\n", count=1), frame(ACCEPT, 1), frame(END, 1))
    assert not receiver.items and isinstance(receiver.error, Cancelled)
    assert pair.client.killed == set()


def test_killing_twice_says_it_once() -> None:
    pair, _ = started()
    link = pair.client.streams[1]
    link.kill()
    link.kill()
    link.stop()
    assert [each.kind for each in said(pair) if each.kind == KILL] == [KILL]


def test_a_lost_connection_cuts_every_stream() -> None:
    pair, first = started()
    _, second = pair.open()
    said(pair)
    tell(pair, frame(ITEMS, 1, b"1\n", count=1))
    pair.client.close("gone")
    assert isinstance(first.error, StreamIncomplete) and list(first.items) == [1]
    assert isinstance(second.error, Disconnected) and not isinstance(second.error, StreamIncomplete)
    assert pair.client.open_streams == 0 and pair.client_budget.out == 0


def test_an_instance_that_left_fails_what_it_has_not_accepted() -> None:
    pair, accepted = started()
    _, waiting = pair.open()
    elsewhere = Receiver(instance=2)
    pair.open(receiver=elsewhere)
    said(pair)
    tell(pair, frame(ACCEPT, 1))
    pair.client.refuse_unaccepted(1, "left")
    assert not accepted.ended and isinstance(waiting.error, Disconnected) and not elsewhere.ended
    assert [(each.kind, each.stream) for each in said(pair)] == [(KILL, 3)]


# -- GOAWAY


def test_a_draining_worker_finishes_what_is_open() -> None:
    pair, receiver = started()
    tell(pair, frame(GOAWAY, payload=Goaway(last=1, reason="draining").encode()), frame(ITEMS, 1, b"1\n", count=1))
    assert pair.away == 1 and list(receiver.items) == [1] and not receiver.ended


@pytest.mark.parametrize("code", ["protocol", "overloaded", "timeout", "from_the_future"])
def test_any_other_goaway_cuts_the_streams_and_is_no_draining(code: str) -> None:
    pair, receiver = started()
    tell(pair, frame(GOAWAY, payload=Goaway(code=code, reason="bad frame").encode()))
    assert isinstance(receiver.error, Disconnected) and "bad frame" in receiver.error.message
    assert pair.away == 0
