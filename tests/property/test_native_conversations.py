"""Bidirectional requests over a byte pipe, whatever both ends do in whatever order, in whatever chunks.

The model: what the handler got is a prefix of what the caller put, what the caller got is a prefix of what the handler sent, each
direction holds at most its window and one item, and at the end nothing is left on either side.
"""

from typing import Any

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from stator.errors import Cancelled
from stator.protocol.native.client import ClientStream
from stator.protocol.native.hello import Limits
from stator.protocol.native.incoming import Incoming
from stator.protocol.native.outgoing import ITEM_OVERHEAD, Sender
from stator.protocol.stream import Receiver
from stator.testing.native_pair import Call, NativePair

WINDOW = 16 * 1024
MOST_STREAMS = 5
CHUNKS = st.sampled_from([1, 3, 11, 12, 13, 500, 65_548, 200_000, None])
LUCK = st.integers(0, 5)
"""ends are rarer than what they end"""
SIZES = st.lists(st.sampled_from([0, 30, 1000, 9000, 65_535, 65_536, 131_073]), min_size=1, max_size=40)


class Way:
    """One direction of a conversation."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.got: list[Any] = []
        self.biggest = 0

    def send(self, sender: Sender, sizes: list[int]) -> None:
        for size in sizes:
            if sender.credit <= 0:
                return
            item = [len(self.sent), "x" * size]
            data = msgspec.json.encode(item)
            sender.push(data)
            self.sent.append(item)
            self.biggest = max(self.biggest, len(data) + 1 + ITEM_OVERHEAD)

    def take(self, receiver: Receiver, incoming: Incoming | None) -> None:
        self.got.extend(receiver.items)
        receiver.items.clear()
        if incoming is not None:
            incoming.taken()

    def check(self, receiver: Receiver | None, window: int) -> None:
        waiting = list(receiver.items) if receiver is not None else []
        arrived = self.got + waiting
        assert arrived == self.sent[: len(arrived)]
        unread = sum(len(msgspec.json.encode(item)) + 1 + ITEM_OVERHEAD for item in waiting)
        assert unread < window + max(self.biggest, 1)


class Talk:
    """One conversation of the model."""

    def __init__(self, id: str, link: ClientStream) -> None:
        self.id = id
        self.link = link
        self.window = link._window
        self.call: Call | None = None
        self.inputs = Way()
        self.answer = Way()
        self.accepted = False
        self.input_ended = False
        self.cut_short = False
        """stopped, killed or answered before all inputs had to arrive"""
        self.killed = False

    @property
    def body(self) -> Receiver | None:
        return None if self.call is None else self.call.request.body


class Conversations(RuleBasedStateMachine):
    talks = Bundle("talks")

    @initialize()
    def connect(self) -> None:
        self.pair = NativePair(window=WINDOW, server_limits=Limits(streams=MOST_STREAMS))
        self.pair.server.budget._most = WINDOW
        self.all: list[Talk] = []

    def live(self, talk: Talk) -> Call | None:
        if talk.call is None:
            talk.call = next((call for call in self.pair.calls if call.request.id == talk.id), None)
        return talk.call if talk.call is not None and not talk.call.stream.dead else None

    # -- the caller

    @precondition(lambda self: len(self.pair.client.streams) + len(self.pair.client.killed) < MOST_STREAMS)
    @rule(target=talks)
    def converse(self) -> Talk:
        id = f"r{len(self.all)}"
        talk = Talk(id, self.pair.converse(id=id))
        self.all.append(talk)
        return talk

    @rule(talk=talks, sizes=SIZES)
    def put(self, talk: Talk, sizes: list[int]) -> None:
        sender = talk.link.sender
        assert sender is not None
        if not sender.over:
            talk.inputs.send(sender, sizes)

    @rule(talk=talks, luck=LUCK, sizes=SIZES)
    def end_input(self, talk: Talk, luck: int, sizes: list[int]) -> None:
        sender = talk.link.sender
        assert sender is not None
        if not luck and not sender.over:
            talk.inputs.send(sender, sizes[:2])
            sender.end()
            talk.input_ended = True

    @rule(talk=talks)
    def take(self, talk: Talk) -> None:
        talk.answer.take(talk.link.receiver, None if talk.link.receiver.ended else talk.link)

    @rule(talk=talks, luck=LUCK)
    def stop(self, talk: Talk, luck: int) -> None:
        if not luck and not talk.link.receiver.ended:
            talk.link.stop()
            talk.cut_short = True
            talk.killed |= talk.link.receiver.ended  # it had not left yet

    @rule(talk=talks, luck=LUCK)
    def kill(self, talk: Talk, luck: int) -> None:
        if not luck and not talk.link.receiver.ended:
            talk.link.kill()
            talk.link.receiver.finish(Cancelled("by the caller"))
            talk.cut_short = talk.killed = True

    # -- the handler

    @rule(talk=talks)
    def accept(self, talk: Talk) -> None:
        if (call := self.live(talk)) is not None and not talk.accepted:
            talk.accepted = True
            call.stream.accept()

    @rule(sizes=SIZES)
    def answer_everywhere(self, sizes: list[int]) -> None:
        self.pair.settle()
        for talk in self.all:
            self.accept(talk)
            self.answer(talk, sizes)

    @rule(talk=talks, sizes=SIZES)
    def answer(self, talk: Talk, sizes: list[int]) -> None:
        if talk.accepted and (call := self.live(talk)) is not None:
            talk.answer.send(call.stream, sizes)

    @rule(talk=talks)
    def take_inputs(self, talk: Talk) -> None:
        if self.live(talk) is not None and talk.body is not None and talk.call is not None:
            talk.inputs.take(talk.body, talk.call.stream.inputs)

    @rule(talk=talks, luck=LUCK)
    def end(self, talk: Talk, luck: int) -> None:
        if not luck and talk.accepted and (call := self.live(talk)) is not None:
            talk.cut_short = True
            call.stream.end()

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

    @rule(client=st.booleans(), server=st.booleans())
    def pause(self, client: bool, server: bool) -> None:
        for session, wanted in ((self.pair.client, client), (self.pair.server, server)):
            if wanted:
                session.outgoing.writable = False
            else:
                session.outgoing.resume()

    # -- what always holds

    @invariant()
    def both_ways_are_prefixes_and_bounded(self) -> None:
        for talk in self.all if hasattr(self, "all") else ():
            self.live(talk)
            talk.inputs.check(talk.body, WINDOW)
            talk.answer.check(talk.link.receiver, talk.window)

    @invariant()
    def budgets_are_what_open_streams_hold(self) -> None:
        if hasattr(self, "pair"):
            assert self.pair.client_budget.out == sum(each._window for each in self.pair.client.streams.values())
            readers = [stream.inputs for stream in self.pair.server.streams.values()]
            assert self.pair.server_budget.out == sum(each._window for each in readers if each is not None)

    # -- the end

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        pair = self.pair
        self.pause(client=False, server=False)
        pair.settle()
        self.credit_is_conserved()
        for talk in self.all:
            self.inputs_have_arrived(talk)
            if (call := self.live(talk)) is not None:
                call.stream.end()
        pair.settle()
        for talk in self.all:
            receiver, sender = talk.link.receiver, talk.link.sender
            assert receiver.ended
            assert talk.killed or receiver.error is None
            assert sender is not None and sender.over and not sender.queued
            assert talk.body is None or talk.body.ended
            if not talk.killed:
                assert talk.answer.got + list(receiver.items) == talk.answer.sent
        assert not pair.client.streams and not pair.client.killed
        assert pair.client.open_streams == pair.server.open_streams == 0
        assert pair.client_budget.out == pair.server_budget.out == 0
        assert len(pair.client.outgoing) == len(pair.server.outgoing) == len(pair.up) == len(pair.down) == 0
        assert pair.client._reader.buffered == pair.server._reader.buffered == 0

    def inputs_have_arrived(self, talk: Talk) -> None:
        """Nothing is on the way: what was put is there, and so is its end; a handler is told of no other end."""
        if talk.cut_short or self.live(talk) is None or talk.body is None:
            return
        assert talk.inputs.got + list(talk.body.items) == talk.inputs.sent
        assert talk.body.ended == talk.input_ended
        assert talk.body.error is None

    def credit_is_conserved(self) -> None:
        for link in self.pair.client.streams.values():
            stream = self.pair.server.streams[link.number]
            assert stream.credit + link._unread + link._uncredited == link._window
            reader, sender = stream.inputs, link.sender
            if reader is not None and sender is not None and not sender.over:
                assert sender.credit + reader._unread + reader._uncredited == reader._window


TestConversations = Conversations.TestCase
TestConversations.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
