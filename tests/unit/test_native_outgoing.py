"""What leaves first, how much, and in which frames."""

from collections.abc import Callable

import pytest

from stator.errors import EngineError
from stator.protocol.native.frames import ACCEPT, END, ITEMS, LAST, MAX_PAYLOAD, MORE, OPEN, PING, frame
from stator.protocol.native.hello import Limits
from stator.protocol.native.outgoing import FLUSH_LIMIT, ITEM_OVERHEAD, Outgoing, RequestSender, Sender
from stator.testing.native_pair import Frame, NativePair, read_frames

MANY = 2**30


class Told(Sender):
    """A sender that counts what it is told."""

    def __init__(self, outgoing: Outgoing, number: int, credit: int = MANY) -> None:
        super().__init__(outgoing, number, credit)
        self.drains = 0
        self.credits = 0

    def drained(self) -> None:
        self.drains += 1

    def credited(self) -> None:
        self.credits += 1


class Woken:
    """An outgoing that counts its calls."""

    def __init__(self) -> None:
        self.wakes = 0
        self.hurries = 0
        self.outgoing = Outgoing(self.wake, self.hurry)

    def wake(self) -> None:
        self.wakes += 1

    def hurry(self) -> None:
        self.hurries += 1

    def flush(self) -> list[Frame]:
        return read_frames(self.outgoing.data_to_send())


@pytest.fixture
def woken() -> Woken:
    return Woken()


@pytest.fixture
def make(woken: Woken) -> Callable[[int], Told]:
    return lambda number: Told(woken.outgoing, number)


def items(frames: list[Frame]) -> list[bytes]:
    """The items in ITEMS frames of one stream, fragments joined."""
    return b"".join(each.payload for each in frames if each.kind == ITEMS).split(b"\n")[:-1]


def test_it_wakes_once_per_flush(woken: Woken, make: Callable[[int], Told]) -> None:
    make(1).push(b"1")
    make(3).push(b"2")
    woken.outgoing.control(frame(PING))
    assert woken.wakes == 1
    woken.flush()
    woken.outgoing.control(frame(PING))
    assert woken.wakes == 2


def test_much_to_send_is_sent_at_once(woken: Woken, make: Callable[[int], Told]) -> None:
    for _ in range(15):
        woken.outgoing.control(frame(PING))
    assert woken.hurries == 0
    woken.outgoing.control(frame(PING))
    assert woken.hurries == 1
    woken.flush()
    woken.outgoing.end_turn()
    for number in range(17):
        make(2 * number + 1).push(b"1")
    assert woken.hurries == 2


def test_what_comes_on_top_of_much_waits_for_more(woken: Woken, make: Callable[[int], Told]) -> None:
    waiting: list[int] = []

    def flush() -> None:
        waiting.append(len(woken.outgoing))
        woken.flush()

    woken.outgoing.hurry = flush
    for number in range(256):
        make(2 * number + 1).push(b"1")
    assert waiting == [16, 32, 64, 128]
    woken.outgoing.end_turn()
    woken.flush()
    for number in range(17):
        make(2 * number + 601).push(b"1")
    assert waiting[4:] == [16]


def test_control_frames_go_first(woken: Woken, make: Callable[[int], Told]) -> None:
    make(1).push(b"1")
    woken.outgoing.control(frame(PING, payload=b"12345678"))
    assert [each.kind for each in woken.flush()] == [PING, ITEMS]


def test_items_of_a_flush_share_a_frame(woken: Woken, make: Callable[[int], Told]) -> None:
    sender = make(5)
    assert [sender.push(data) for data in (b"1", b'"two"', b"[3]")] == [1, 2, 3]
    assert woken.flush() == [Frame(ITEMS, 0, 3, 5, b'1\n"two"\n[3]\n')]
    assert sender.drains == 1 and sender.waiting == 0
    assert woken.flush() == []


def test_each_item_is_charged_its_size_newline_and_overhead(woken: Woken) -> None:
    sender = Told(woken.outgoing, 1, credit=1000)
    sender.push(b"12345")
    assert sender.credit == 1000 - 6 - ITEM_OVERHEAD
    sender.push(b"x" * 2000)
    assert sender.credit < 0
    sender.grant(5000)
    assert sender.credit == 1000 - 6 - 2001 - 2 * ITEM_OVERHEAD + 5000
    assert sender.credits == 1


def test_streams_take_turns_one_frame_each(woken: Woken, make: Callable[[int], Told]) -> None:
    senders = [make(number) for number in (1, 3, 5)]
    for sender in senders:
        for _ in range(3):
            sender.push(b"x" * 40_000)
    assert [each.stream for each in woken.flush()] == [1, 3, 5] * 3


def test_one_flush_takes_at_most_a_mebibyte(woken: Woken, make: Callable[[int], Told]) -> None:
    sender = make(1)
    big = b"x" * (5 * FLUSH_LIMIT)
    sender.push(big)
    frames = woken.flush()
    size = sum(len(each.payload) for each in frames)
    assert FLUSH_LIMIT <= size < FLUSH_LIMIT + MAX_PAYLOAD
    assert woken.wakes == 2  # for the rest
    while part := woken.flush():
        assert sum(len(each.payload) for each in part) < FLUSH_LIMIT + MAX_PAYLOAD
        frames += part
    assert items(frames) == [big]


def test_control_frames_are_not_counted_and_never_wait(woken: Woken, make: Callable[[int], Told]) -> None:
    make(1).push(b"x" * 10_000_000)
    woken.flush()
    woken.outgoing.writable = False
    for _ in range(3):
        woken.outgoing.control(frame(PING, payload=b"12345678"))
        assert [each.kind for each in woken.flush()] == [PING]


def test_a_large_item_delays_nobody(woken: Woken, make: Callable[[int], Told]) -> None:
    make(1).push(b"x" * 10_000_000)
    woken.flush()
    small = make(3)
    small.push(b'"small"')
    frames = woken.flush()
    assert [each.stream for each in frames[:2]] == [1, 3]
    assert frames[1].payload == b'"small"\n'


@pytest.mark.parametrize("beside", [0, 1])
@pytest.mark.parametrize(
    "size",
    [0, 1, MAX_PAYLOAD - 2, MAX_PAYLOAD - 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 2 * MAX_PAYLOAD - 1, 2 * MAX_PAYLOAD, 200_000],
)
def test_an_item_above_a_frame_is_written_alone_in_full_fragments(
    woken: Woken, make: Callable[[int], Told], size: int, beside: int
) -> None:
    sender = make(1)
    sent = [b"0"] * beside + [b"x" * size] + [b"1"] * beside
    for data in sent:
        sender.push(data)
    frames = woken.flush()
    for each in frames:
        if each.flags & MORE:
            assert len(each.payload) == MAX_PAYLOAD and each.count == 0
        else:
            assert 0 < len(each.payload) <= MAX_PAYLOAD and each.count >= 1
    assert sum(each.count for each in frames) == len(sent)
    assert items(frames) == sent
    assert not sender.queued and sender.drains == 1


def test_a_frame_takes_as_many_whole_items_as_fit(woken: Woken, make: Callable[[int], Told]) -> None:
    sender = make(1)
    for _ in range(100):
        sender.push(b"x" * 999)
    frames = woken.flush()
    assert [each.count for each in frames] == [65, 35]
    assert [len(each.payload) for each in frames] == [65_000, 35_000]


def test_the_last_frame_says_that_it_is_the_last(woken: Woken, make: Callable[[int], Told]) -> None:
    sender = make(1)
    sender.push(b"1")
    sender.finish(b"")
    assert woken.flush() == [Frame(ITEMS, LAST, 1, 1, b"1\n")]
    assert woken.flush() == [] and not sender.queued


def test_a_large_item_is_followed_by_an_end_of_its_own(woken: Woken, make: Callable[[int], Told]) -> None:
    sender = make(1)
    sender.push(b"x" * 100_000)
    sender.finish(b"")
    frames = woken.flush()
    assert frames[-1] == Frame(END, 0, 0, 1, b"")
    assert not any(each.flags & LAST for each in frames)


def test_an_end_with_an_error_follows_the_items(woken: Woken, make: Callable[[int], Told]) -> None:
    sender = make(1)
    sender.push(b"1")
    sender.finish(b'{"code":"engine"}')
    assert woken.flush() == [Frame(ITEMS, 0, 1, 1, b"1\n"), Frame(END, 0, 0, 1, b'{"code":"engine"}')]


def test_an_end_alone(woken: Woken, make: Callable[[int], Told]) -> None:
    make(7).finish(b"")
    assert woken.flush() == [Frame(END, 0, 0, 7, b"")]


def accept(sender: Sender) -> None:
    sender.accepting = True
    sender.queued = True
    sender.outgoing.ready(sender)


def test_accept_leaves_alone_when_nothing_follows(woken: Woken, make: Callable[[int], Told]) -> None:
    sender = make(1)
    accept(sender)
    assert woken.flush() == [Frame(ACCEPT, 0, 0, 1, b"")]
    sender.push(b"1")
    assert [each.kind for each in woken.flush()] == [ITEMS]


@pytest.mark.parametrize("size", [1, 100_000])
def test_accept_is_implied_by_items(woken: Woken, make: Callable[[int], Told], size: int) -> None:
    sender = make(1)
    accept(sender)
    sender.push(b"x" * size)
    sender.finish(b"")
    assert ACCEPT not in [each.kind for each in woken.flush()]


def test_accept_is_implied_by_an_end(woken: Woken, make: Callable[[int], Told]) -> None:
    sender = make(1)
    accept(sender)
    sender.finish(b"")
    assert [each.kind for each in woken.flush()] == [END]


def test_dropping_forgets_everything_queued(woken: Woken, make: Callable[[int], Told]) -> None:
    victim, other = make(1), make(3)
    accept(victim)
    victim.push(b"1")
    victim.finish(b"")
    other.push(b"2")
    victim.drop()
    assert [each.stream for each in woken.flush()] == [3]
    victim.drop()
    assert woken.flush() == []


def test_dropping_in_the_middle_of_an_item(woken: Woken, make: Callable[[int], Told]) -> None:
    victim = make(1)
    victim.push(b"x" * 3_000_000)
    woken.flush()
    victim.drop()
    assert woken.flush() == [] and len(woken.outgoing) == 0


def test_a_paused_transport_gets_no_stream_data(woken: Woken, make: Callable[[int], Told]) -> None:
    sender = make(1)
    woken.outgoing.writable = False
    sender.push(b"1")
    assert woken.flush() == [] and sender.waiting == 1
    before = woken.wakes
    woken.outgoing.resume()
    assert woken.wakes == before + 1
    assert items(woken.flush()) == [b"1"]
    woken.outgoing.resume()
    assert woken.wakes == before + 1  # nothing to say


def test_an_item_can_be_taken_back_before_it_leaves(woken: Woken) -> None:
    sender = Told(woken.outgoing, 1, credit=1000)
    sender.push(b"keep")
    before = sender.credit
    sender.push(b"x" * 500)
    assert sender.take_back(above=500) == 0
    assert sender.take_back(above=499) == 500
    assert sender.credit == before
    assert items(woken.flush()) == [b"keep"]
    assert sender.take_back(above=0) == 0


def test_nothing_leaves_of_a_stream_whose_only_item_was_taken_back(woken: Woken, make: Callable[[int], Told]) -> None:
    sender = make(1)
    sender.push(b"x" * 500)
    sender.take_back(above=100)
    sender.finish(b'{"code":"engine"}')
    assert [each.kind for each in woken.flush()] == [END]


# -- requests


@pytest.mark.parametrize("size", [1, MAX_PAYLOAD - 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 2 * MAX_PAYLOAD, 200_000])
def test_a_long_request_leaves_in_full_fragments(woken: Woken, size: int) -> None:
    body = bytes(range(256)) * (size // 256 + 1)
    opening = min(size, 20)
    sender = RequestSender(9, body[:opening], body[opening:size])
    woken.outgoing.ready(sender)
    assert not sender.started
    frames = woken.flush()
    assert all(each.kind == OPEN and each.stream == 9 for each in frames)
    assert all(len(each.payload) == MAX_PAYLOAD for each in frames[:-1])
    assert [bool(each.flags & MORE) for each in frames] == [True] * (len(frames) - 1) + [False]
    assert b"".join(each.payload for each in frames) == body[:size]
    assert sender.started and not sender.queued


def test_a_request_that_left_holds_no_bytes(woken: Woken) -> None:
    sender = RequestSender(9, b"opening", b"x" * 200_000)
    woken.outgoing.ready(sender)
    woken.flush()
    assert len(sender._payload) == 0 and sender._opening == b""


def test_removing_a_request_that_waits(woken: Woken) -> None:
    sender = RequestSender(9, b"opening", b"x" * 200_000)
    assert woken.outgoing.remove(sender) is False
    woken.outgoing.ready(sender)
    assert woken.outgoing.remove(sender) is True
    assert woken.flush() == [] and not sender.started


def test_requests_and_items_take_turns(woken: Woken, make: Callable[[int], Told]) -> None:
    woken.outgoing.ready(RequestSender(9, b"opening", b"x" * 200_000))
    make(1).push(b"x" * 200_000)
    assert [each.stream for each in woken.flush()][:4] == [9, 1, 9, 1]


def test_an_item_above_the_callers_limit_fails_its_stream_and_no_other() -> None:
    pair = NativePair(window=64 * 1024, client_limits=Limits(item=100_000))
    _, receiver = pair.open()
    _, neighbour = pair.open()
    pair.settle()
    stream = pair.calls[0].stream
    stream.push(b"1")
    stream.push(b'"' + b"x" * 100_000 + b'"')
    with pytest.raises(EngineError, match="100002 bytes, the caller accepts 100000") as caught:
        stream.take_back_oversized()
    stream.end(caught.value)
    pair.calls[1].stream.push(b'"' + b"x" * 99_998 + b'"')
    pair.calls[1].stream.take_back_oversized()
    pair.calls[1].stream.end()
    pair.settle()
    assert list(receiver.items) == [1] and isinstance(receiver.error, EngineError)
    assert len(neighbour.items[0]) == 99_998 and neighbour.error is None
