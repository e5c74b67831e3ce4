"""A client session and a server session over a byte pipe, whatever is done in whatever order, in whatever chunks.

The model: every stream knows what its handler sent and what its reader took. After each step what arrived is a prefix of what was sent and
no stream holds more than its window and one item; at the end every OPEN had exactly one answer and nothing is left on either side.
"""

from typing import Any

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from stator.errors import Cancelled, EngineError, Overloaded, PeerProtocolError, StatorError, Unavailable
from stator.protocol.native import client as client_module
from stator.protocol.native.client import ClientStream
from stator.protocol.native.frames import END, ITEMS, KILL, LAST, MORE, OPEN, REFUSE
from stator.protocol.native.hello import Limits
from stator.protocol.native.outgoing import ITEM_OVERHEAD
from stator.protocol.stream import Receiver
from stator.testing.native_pair import Call, NativePair

WINDOW = 16 * 1024
MOST_STREAMS = 6
ALL_IDS = client_module._MAX_STREAM
FEW_IDS = 7
"""four ids for three streams, so that they come round while some are in use"""
REQUEST_SPACE = 250_000
"""bytes of arriving requests the worker has space for"""
CHUNKS = st.sampled_from([1, 3, 11, 12, 13, 500, 65_548, 200_000, None])
LUCK = st.integers(0, 5)
"""ends are rarer than what they end"""
SIZES = st.sampled_from([0, 30, 100, 1000, 9000, 65_534, 65_535, 65_536, 65_537, 131_071, 131_072, 131_073, 150_000])
"""bytes of an item or a request; a frame holds 65 536, newline included"""


class Stream:
    """One request of the model."""

    def __init__(self, id: str, link: ClientStream, receiver: Receiver, *, typed: bool) -> None:
        self.id = id
        self.link = link
        self.receiver = receiver
        self.typed = typed
        self.window = link._window
        self.call: Call | None = None
        self.sent: list[Any] = []
        self.taken: list[Any] = []
        self.outcome: StatorError | str | None = "open"
        """how the handler ended it"""
        self.left = False
        """killed or withdrawn by its reader"""
        self.biggest = 0

    def unread(self) -> int:
        return sum(len(msgspec.json.encode(item)) + 1 + ITEM_OVERHEAD for item in self.receiver.items)


class Sessions(RuleBasedStateMachine):
    streams = Bundle("streams")

    @initialize(before_wrap=st.integers(0, 5), few_ids=st.booleans())
    def connect(self, before_wrap: int, few_ids: bool) -> None:
        client_module._MAX_STREAM = FEW_IDS if few_ids else ALL_IDS
        self.most = 3 if few_ids else MOST_STREAMS
        self.pair = NativePair(window=WINDOW, server_limits=Limits(streams=self.most), server_total=REQUEST_SPACE)
        self.pair.client._last = client_module._MAX_STREAM - 2 * before_wrap
        self.all: list[Stream] = []

    def of(self, call: Call) -> Stream:
        return next(each for each in self.all if each.id == call.request.id)

    def live(self, stream: Stream) -> Call | None:
        """Its call, if the handler may still answer it."""
        if stream.call is None:
            stream.call = next((call for call in self.pair.calls if call.request.id == stream.id), None)
        return stream.call if stream.call is not None and not stream.call.stream.dead else None

    # -- the caller

    @rule(target=streams, size=SIZES, typed=st.sampled_from([False] * 7 + [True]))
    def open(self, size: int, typed: bool) -> Any:
        client = self.pair.client
        full = len(client.streams) + len(client.killed) >= self.most
        receiver = Receiver(instance=1, item_type=int if typed else Any)
        id = f"r{len(self.all)}"
        try:
            link, _ = self.pair.open("x" * size, receiver=receiver, id=id)
        except Overloaded:
            assert full
            return multiple()
        assert not full
        assert link.number & 1 and 0 < link.number < 2**32
        stream = Stream(id, link, receiver, typed=typed)
        self.all.append(stream)
        return stream

    @rule(stream=streams, luck=LUCK)
    def kill(self, stream: Stream, luck: int) -> None:
        if not luck and not stream.receiver.ended:
            stream.link.kill()
            stream.receiver.finish(Cancelled("by the reader"))
            stream.left = True

    @rule(stream=streams, luck=LUCK)
    def stop(self, stream: Stream, luck: int) -> None:
        if not luck and not stream.receiver.ended:
            stream.link.stop()
            stream.left = stream.receiver.ended  # it had not left yet

    @rule(stream=streams)
    def take(self, stream: Stream) -> None:
        items = stream.receiver.items
        stream.taken.extend(items)
        items.clear()
        if not stream.receiver.ended:
            stream.link.taken()

    @rule(luck=LUCK)
    def leave_discovery(self, luck: int) -> None:
        if luck:
            return
        waiting = [each for each in self.all if not each.receiver.ended]
        self.pair.client.refuse_unaccepted(1, "left discovery")
        for stream in waiting:
            stream.left |= stream.receiver.ended

    # -- the handler

    @rule(stream=streams)
    def accept(self, stream: Stream) -> None:
        if (call := self.live(stream)) is not None and not stream.sent:
            call.stream.accept()

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=70))
    def send_everywhere(self, sizes: list[int]) -> None:
        self.pair.settle()
        for stream in self.all:
            self.send(stream, sizes)

    @rule(stream=streams, sizes=st.lists(SIZES, min_size=1, max_size=70))
    def send(self, stream: Stream, sizes: list[int]) -> None:
        call = self.live(stream)
        for size in sizes:
            if call is None or call.stream.dead or call.stream.credit <= 0:
                break
            item = [stream.id, len(stream.sent), ""]
            item[2] = "x" * max(0, size - len(msgspec.json.encode(item)))
            data = msgspec.json.encode(item)
            call.stream.push(data)
            stream.sent.append(item)
            stream.biggest = max(stream.biggest, len(data) + 1 + ITEM_OVERHEAD)

    @rule(stream=streams, fails=st.booleans(), luck=st.booleans(), last=st.lists(SIZES, max_size=2))
    def end(self, stream: Stream, fails: bool, luck: bool, last: list[int]) -> None:
        if not luck:
            self.send(stream, last)
        if not luck and (call := self.live(stream)) is not None:
            stream.outcome = EngineError("it broke", kind="Unknown") if fails else None
            call.stream.end(stream.outcome)

    @rule(stream=streams, luck=LUCK)
    def refuse(self, stream: Stream, luck: int) -> None:
        call = self.live(stream)
        if not luck and call is not None and not stream.sent and not call.stream.accepting:
            stream.outcome = Unavailable("not now")
            call.stream.refuse(stream.outcome)

    # -- the network

    @rule(most=CHUNKS)
    def up(self, most: int | None) -> None:
        self.pair.up.load()
        self.pair.up.carry(most)

    @rule(most=CHUNKS)
    def down(self, most: int | None) -> None:
        self.pair.down.load()
        self.pair.down.carry(most)

    @rule()
    def both(self) -> None:
        self.pair.settle()

    @precondition(lambda self: self.pair.client.outgoing.writable)
    @rule()
    def pause_client(self) -> None:
        self.pair.client.outgoing.writable = False

    @precondition(lambda self: self.pair.server.outgoing.writable)
    @rule()
    def pause_server(self) -> None:
        self.pair.server.outgoing.writable = False

    @rule()
    def resume(self) -> None:
        self.pair.client.outgoing.resume()
        self.pair.server.outgoing.resume()

    # -- what always holds

    @invariant()
    def arrived_is_a_prefix_of_sent(self) -> None:
        for stream in self.all:
            got = stream.taken + list(stream.receiver.items)
            assert got == stream.sent[: len(got)]

    @invariant()
    def no_stream_holds_more_than_window_and_one_item(self) -> None:
        for stream in self.all:
            assert stream.unread() < stream.window + max(stream.biggest, 1)

    @invariant()
    def the_budget_is_what_open_streams_hold(self) -> None:
        if hasattr(self, "pair"):
            held = sum(each._window for each in self.pair.client.streams.values())
            assert self.pair.client_budget.out == held

    # -- the end

    def teardown(self) -> None:
        client_module._MAX_STREAM = ALL_IDS
        if not hasattr(self, "pair"):
            return
        pair = self.pair
        self.resume()
        pair.settle()
        self.credit_is_conserved()
        for stream in self.all:
            if (call := self.live(stream)) is not None:
                stream.outcome = None
                call.stream.end()
        pair.settle()
        for stream in self.all:
            self.check_outcome(stream)
        self.one_answer_each()
        assert not pair.client.streams and not pair.client.killed
        assert pair.client.open_streams == pair.server.open_streams == 0
        assert pair.client_budget.out == pair.server_budget.out == 0
        assert len(pair.client.outgoing) == len(pair.server.outgoing) == len(pair.up) == len(pair.down) == 0
        assert pair.client._reader.buffered == pair.server._reader.buffered == 0

    def credit_is_conserved(self) -> None:
        """With nothing on the way, what the sender may send and what the reader holds make up the window."""
        for link in self.pair.client.streams.values():
            sender = self.pair.server.streams[link.number]
            assert sender.credit + link._unread + link._uncredited == link._window

    def check_outcome(self, stream: Stream) -> None:
        receiver = stream.receiver
        assert receiver.ended
        if stream.left:
            return
        got = stream.taken + list(receiver.items)
        if stream.call is None:
            assert isinstance(receiver.error, Overloaded)
        elif stream.typed and stream.sent:
            assert isinstance(receiver.error, PeerProtocolError) and not got
        elif stream.outcome is None:
            assert receiver.error is None and got == stream.sent
        else:
            assert isinstance(stream.outcome, StatorError)
            assert type(receiver.error) is type(stream.outcome) and got == stream.sent

    def one_answer_each(self) -> None:
        opened: dict[int, int] = {}
        arriving: set[int] = set()
        for each in self.pair.up.frames:
            if each.kind == OPEN:
                if each.stream not in arriving:
                    opened[each.stream] = opened.get(each.stream, 0) + 1
                (arriving.add if each.flags & MORE else arriving.discard)(each.stream)
            elif each.kind == KILL:
                arriving.discard(each.stream)
        answered: dict[int, int] = {}
        for each in self.pair.down.frames:
            if each.kind in (REFUSE, END) or (each.kind == ITEMS and each.flags & LAST):
                answered[each.stream] = answered.get(each.stream, 0) + 1
        assert not arriving
        assert answered == opened


TestSessions = Sessions.TestCase
TestSessions.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
