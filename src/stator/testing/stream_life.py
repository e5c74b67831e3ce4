"""What a request's life means, whatever carries it: the model that every plane is held to, whatever is done in whatever order.

A `Story` is one request as its caller has it, a `Call` the same request as its worker has it. Both write down what they did and what they
were told; `Story.check` and `Call.check` say, once nothing moves any more, whether that can be the two ends of one request:

- the answer that was read is the beginning of the answer that was sent, and all of it before a clean end; nothing after the end
- one end at each side; a caller's error is the worker's, or the caller's own kill, or follows from a cut
- a worker is told `stop` or `kill` only if its caller did that, or was cut off
- inputs likewise, the other way round; their end is no cancellation
- while both sides read, nobody waits for leave to send
"""

import asyncio
from typing import Any

from stator.errors import (
    Cancelled,
    Disconnected,
    EngineError,
    Overloaded,
    PeerProtocolError,
    StatorError,
    StreamIncomplete,
    Timeout,
)
from stator.protocol.envelope import IncomingRequest
from stator.transports.inbox import Inbox, Patience, PhaseLimits
from stator.transports.inputs import DuplexInbox
from stator.transports.plane import Responder

__all__ = ["CALL_HOME", "Call", "Story", "worker_error"]

CALL_HOME = 60.0
"""seconds that a caller waits for its worker's call; a call that is cut before it says for whom it is looks like none"""

PATIENT = Patience(
    PhaseLimits(connect=None, accept=None, call_home=CALL_HOME, prologue=None, first_item=None, items=None, input=None)
)


class _Counted(Inbox):
    """An inbox that counts its ends."""

    ends = 0

    def changed(self) -> None:
        if self.ended:
            self.ends += 1
        super().changed()


class _CountedDuplex(DuplexInbox):
    """Likewise."""

    ends = 0

    def changed(self) -> None:
        if self.ended:
            self.ends += 1
        super().changed()


class Story:
    """One request, as its caller has it. Its methods start what a caller would do; the loop's turns do it."""

    def __init__(
        self, id: str, loop: asyncio.AbstractEventLoop, wheel: Any, *, instance: int, talks: bool, typed: bool
    ) -> None:
        self.id = id
        self.talks = talks
        """it sends inputs"""
        self.typed = typed
        """it reads numbers, where the worker sends something else"""
        self.refusing: StatorError | None = None
        """what its worker says at once"""
        self.queueing = False
        """its worker lets it wait for a slot first"""
        kind = _CountedDuplex if talks else _Counted
        self.inbox: Any = kind(wheel=wheel, patience=PATIENT, instance=instance, item_type=int if typed else Any)
        self.call: Call | None = None
        self.read: list[Any] = []
        self.raised: StatorError | None = None
        """what reading raised"""
        self.finished = False
        """reading said that there is no more"""
        self.stopped = False
        self.killed = False
        """by its caller, before anything else ended it"""
        self.cut = False
        """a connection of its broke"""
        self.inputs: list[Any] = []
        self.inputs_over = False
        """its caller said that there are no more"""
        self._loop = loop
        self._reading: asyncio.Task[None] | None = None
        self._leave: asyncio.Task[None] | None = None
        self._room = False

    # -- what a caller does

    def go(self, opening: Any) -> None:
        """Begin: `opening` is the plane's `open`."""
        self._open = self._loop.create_task(self._opened(opening))

    async def _opened(self, opening: Any) -> None:
        try:
            await opening
        except StatorError as error:
            self.inbox.finish(error)
        if self.inbox.ended and self.talks:
            self.inputs_over = True

    def take(self) -> None:
        """Read what there is, or wait for more."""
        if (self._reading is None or self._reading.done()) and not self.finished and self.raised is None:
            self._reading = self._loop.create_task(self._read())

    async def _read(self) -> None:
        try:
            if await self.inbox.more():
                self.read.extend(self.inbox.items)
                self.inbox.items.clear()
            else:
                self.finished = True
        except StatorError as error:
            self.raised = error

    @property
    def ended(self) -> bool:
        """Whether its outcome is decided."""
        return self.inbox.ended

    def stop(self) -> None:
        self.stopped |= not self.ended
        self.inbox.stop()

    def kill(self) -> None:
        self.killed |= not self.ended
        self.inbox.kill()

    def say(self, value: Any) -> None:
        """Send an input if that is allowed, else wait for leave."""
        if not self.talks or self.inputs_over:
            return
        sender = self.inbox.sender
        if self._room and not sender.over:
            self._room = sender.send(value)
            self.inputs.append(value)
        elif self._leave is None or self._leave.done():
            self._leave = self._loop.create_task(self._wait_for_room())

    async def _wait_for_room(self) -> None:
        await self.inbox.ready()
        self._room = not self.inbox.sender.over

    def end_inputs(self) -> None:
        if self.talks and not self.inputs_over and self._opened_by_now:
            self.inputs_over = not self.inbox.sender.over
            self.inbox.sender.end()

    @property
    def _opened_by_now(self) -> bool:
        return self._open.done()

    # -- what must hold

    @property
    def arrived(self) -> list[Any]:
        """What was read or waits to be."""
        return [*self.read, *self.inbox.items]

    def check_now(self) -> None:
        """What holds at any time."""
        arrived = self.arrived
        sent = self.call.sent if self.call is not None else []
        assert arrived == sent[: len(arrived)]
        assert self.inbox.ends == self.ended
        if self.call is not None:
            self.call.check_now()

    @property
    def progress(self) -> tuple[int, int]:
        """Items read and inputs heard; grows as long as something flows."""
        return len(self.read), len(self.call.heard) if self.call is not None else 0

    def check_flow(self) -> None:
        """What holds once both sides have read all they can get and nothing moves any more, while the request goes on."""
        call = self.call
        if self.cut:
            return
        if self.ended:
            assert call is None or call.over or call.waiting, f"the worker of {self.id} goes on for nobody"
            return
        assert call is not None, f"{self.id} has not reached its worker"
        if call.accepted and not call.over:
            assert self.arrived == call.sent
            assert call.may_send_soon, "all was read, and the handler may send nothing"
            if self.talks and not self.stopped:
                assert call.heard == self.inputs and call.heard_all == self.inputs_over
                assert self._leave is None or self._leave.done(), "all was heard, and the caller may send nothing"

    def check(self) -> None:
        """What holds once nothing moves any more and the request is over."""
        assert self.ended, f"{self.id} has no end"
        assert self._open.done() and (self._leave is None or self._leave.done())
        assert self.finished or self.raised is self.inbox.error is not None
        if self.call is not None:
            self.call.check()
        error, call = self.inbox.error, self.call
        if self.killed:
            assert isinstance(error, Cancelled)
        elif error is None:
            self._check_clean_end()
        elif isinstance(error, Disconnected):
            assert self.cut
            assert isinstance(error, StreamIncomplete) == bool(self.arrived)
        elif isinstance(error, Timeout):
            assert self.cut and error.phase == "call home"
        elif isinstance(error, PeerProtocolError):
            assert self.typed and not self.arrived and call is not None and call.sent
        elif isinstance(error, Overloaded):
            assert self.refusing is not None and call is None and not self.arrived
        else:
            assert call is not None and call.outcome is not None and self.arrived == call.sent
            assert (type(error), error.message) == (type(call.outcome), call.outcome.message)
            assert call.refused == (not call.accepted)

    def _check_clean_end(self) -> None:
        call = self.call
        if call is not None and call.over and not call.killed:
            whole = self.arrived == call.sent and call.outcome is None
            assert whole or (self.stopped and self.cut)
        else:  # it was never handled, or its end was cut off after a stop
            assert self.stopped
            assert self.cut or call is None or not call.sent


class Call:
    """One request, as its worker has it; the `RequestControl` of its plane."""

    def __init__(self, story: Story, request: IncomingRequest, responder: Responder, loop: asyncio.AbstractEventLoop) -> None:
        self.story = story
        self.responder = responder
        self.sent: list[Any] = []
        self.waiting = False
        self.accepted = False
        self.refused = False
        self.outcome: StatorError | None = None
        """how its handler ended it"""
        self.ended = False
        """its handler ended it, or it was refused"""
        self.stopped = False
        self.killed = False
        """before its handler ended it"""
        self.heard: list[Any] = []
        self.heard_all = False
        self.hearing_failed: StatorError | None = None
        self._body = request.body
        self._loop = loop
        self._room = True
        self._ready: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None
        if story.queueing:
            self.waiting = True
            responder.wait()

    @property
    def over(self) -> bool:
        return self.ended or self.killed

    # -- what the plane tells

    def stop(self) -> None:
        self.stopped = True
        if self.story.talks:
            self._body.finish()

    def kill(self) -> None:
        self.killed |= not self.ended
        if self.story.talks:
            self._body.finish(Cancelled("killed by the caller"))

    def unreachable(self) -> None:
        self.kill()

    # -- what a worker does

    def start(self) -> None:
        if self.waiting:
            self.waiting = False
            if not self.killed:
                self.responder.start()

    def accept(self) -> None:
        if not (self.over or self.waiting or self.accepted):
            self.accepted = True
            self.responder.accept()

    def refuse(self, error: StatorError) -> None:
        if not (self.over or self.waiting or self.accepted):
            self.ended = self.refused = True
            self.outcome = error
            self.responder.refuse(error)

    def send(self, value: Any) -> None:
        """Send an item if that is allowed, else wait for leave."""
        if not self.accepted or self.over:
            return
        if self._room:
            before = self.responder.sent_items
            self._room = self.responder.send(value)
            if self.responder.sent_items > before:
                self.sent.append(value)
            else:  # the plane knows that the request is over, this side is about to be told
                assert not self._room
        elif self._ready is None or self._ready.done():
            self._ready = self._loop.create_task(self._wait_for_room())

    @property
    def may_send_soon(self) -> bool:
        """Whether it is not kept waiting."""
        return self._ready is None or self._ready.done()

    async def _wait_for_room(self) -> None:
        await self.responder.ready()
        self._room = True

    def end(self, error: StatorError | None = None) -> None:
        if self.accepted and not self.over:
            self.ended = True
            self.outcome = error
            self.responder.end(error)

    def hear(self) -> None:
        """Read an input."""
        wants = self.story.talks and self.accepted and not self.heard_all and self.hearing_failed is None
        if wants and (self._hearing is None or self._hearing.done()):
            self._hearing = self._loop.create_task(self._hear())

    async def _hear(self) -> None:
        try:
            self.heard.append(await anext(self._body))
        except StopAsyncIteration:
            self.heard_all = True
        except StatorError as error:
            self.hearing_failed = error

    # -- what must hold

    def check_now(self) -> None:
        """What holds at any time."""
        story = self.story
        if self.stopped:
            assert story.stopped
        if self.killed:
            assert story.killed or story.cut or story.typed or story.stopped
        if story.talks:
            heard = [*self.heard, *self._body.items]
            assert heard == story.inputs[: len(heard)]
            if self._body.ended and self._body.error is None and not self.stopped:
                assert story.inputs_over and heard == story.inputs
            if self._body.ended and self._body.error is not None:
                assert self.over

    def check(self) -> None:
        """What holds once nothing moves any more and the request is over."""
        assert self.over, f"the worker of {self.story.id} does not know its end"
        assert self.may_send_soon, "a handler waits for leave to send"
        if self.story.talks:
            assert self._body.ended
            assert self._hearing is None or self._hearing.done(), "a handler waits for an input"


def worker_error() -> EngineError:
    """What handlers of the model fail with."""
    return EngineError("it broke", kind="Unknown")
