"""The worker's side of requests under everything at once: handlers that yield, raise, hang, ignore their cancellation or clean up for ever;
callers that stop, kill, vanish and do not read; a worker that drains, resumes, kills and closes; two slots and a queue of two.

Every request is answered exactly once, or its caller left; it is counted exactly once, as what happened; and at the end no slot, no place
in the queue and no task is taken.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from stator.errors import Overloaded, StatorError, Unavailable
from stator.protocol.envelope import IncomingRequest
from stator.protocol.ids import EndpointId
from stator.runtime.admission import Admission, AdmissionConfig
from stator.runtime.context import Context
from stator.runtime.meter import EndpointMeter
from stator.runtime.serving import Serving
from stator.testing.manual_loop import ManualLoop
from stator.transports.plane import RequestControl

SLOTS, QUEUE = 2, 2
LONG = 6.0
"""seconds: longer than clean-up may take"""


class Script:
    """What a request's handler is told to do, in order; it waits for the next word."""

    def __init__(self, *, stubborn: bool, lingers: bool, raises: bool) -> None:
        self.stubborn = stubborn
        """ignores its cancellation"""
        self.lingers = lingers
        """does not come to an end in its clean-up"""
        self.raises = raises
        """cannot even be called"""
        self.words: list[str] = []
        self.called = False
        self.over = False
        self._spoken = asyncio.Event()

    def say(self, word: str) -> None:
        self.words.append(word)
        self._spoken.set()

    def let_go(self) -> None:
        """End by itself, whatever it was told."""
        self.stubborn = self.lingers = False
        self.say("return")

    async def _word(self) -> str:
        while not self.words:
            self._spoken.clear()
            try:
                await self._spoken.wait()
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise
        return self.words.pop(0)

    async def run(self) -> AsyncIterator[Any]:
        try:
            while (word := await self._word()) != "return":
                match word:
                    case "yield":
                        yield "item"
                    case "raise":
                        raise ValueError("it broke")
                    case "exit":
                        raise SystemExit(3)
                    case _:
                        raise asyncio.CancelledError
        finally:
            self.over = True
            while self.lingers:
                self._spoken.clear()
                await self._spoken.wait()


class Reply:
    """One request as its plane has it: the responder, and what became of it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.control: RequestControl | None = None
        self.sent_items = 0
        self.sent_bytes = 0
        self.waiting = False
        self.accepted = False
        self.answers: list[str] = []
        """how it was answered; one entry, or none when its caller left"""
        self.left = False
        """its caller is gone"""
        self.full = False
        """its caller does not read"""
        self._room = asyncio.Event()

    def wait(self) -> None:
        assert not self.answers and not self.accepted and self.control is None
        self.waiting = True

    def start(self) -> None:
        assert self.waiting
        self.waiting = False

    def accept(self) -> None:
        assert not self.waiting and not self.accepted and not self.answers
        self.accepted = True

    def send(self, item: Any) -> bool:
        if self.left or self.answers:
            return False
        assert self.accepted
        self.sent_items += 1
        self.sent_bytes += 6
        return not self.full

    async def ready(self) -> None:
        await asyncio.sleep(0)
        while self.full and not self.left:
            self._room.clear()
            await self._room.wait()

    def refuse(self, error: StatorError) -> None:
        assert not self.waiting and not self.accepted
        self._answer("refused" if isinstance(error, Unavailable) else "error")  # also of one that was stopped before

    def end(self, error: StatorError | None = None) -> None:
        assert not self.waiting and self.accepted
        stopped = isinstance(self.control, Context) and self.control.is_stopped
        self._answer("cancelled" if stopped else "ok" if error is None else "error")

    def _answer(self, how: str) -> None:
        if not self.left:
            self.answers.append(how)

    # -- what the caller does

    def read(self, *, goes_on: bool) -> None:
        self.full = not goes_on
        self._room.set()

    def leave(self, how: str) -> None:
        """As planes do: nothing more is delivered, and the request is told."""
        if self.control is not None:
            self.left |= not self.answers
            self._room.set()
            self.control.unreachable() if how == "unreachable" else self.control.kill()

    @property
    def over(self) -> bool:
        return self.left or bool(self.answers)


ENDS = ["return", "return", "raise", "exit", "cancel itself"]
WORDS = ["yield"] * 4 + ENDS
CALLERS = ["stop", "kill", "unreachable", "read on", "read no more"]
WORKER = ["drain", "resume", "resume", "kill_all"]
OPENINGS = ["open"] * 6 + ["open stubborn", "open lingering", "open raising"]
EVENTS = OPENINGS * 2 + WORDS * 2 + CALLERS * 2 + WORKER + ["turn"] * 10 + ["pass time", "close"]


class ServingLife(RuleBasedStateMachine):
    """One `Serving` and its requests."""

    @initialize()
    def serve(self) -> None:
        self.loop = ManualLoop()
        self.replies: list[Reply] = []
        self.told: Counter[str] = Counter()
        """outcomes of requests that were answered at once"""
        self.loop.act(self._serve)

    def _serve(self) -> None:
        self.admission = Admission(AdmissionConfig(slots=SLOTS, queue=QUEUE))
        name = EndpointId("test", "backend", "generate")
        self.meter = EndpointMeter.unlisted(name, self.loop, self.admission)
        self.serving = Serving(self._generate, name=str(name), admission=self.admission, meter=self.meter)
        self.closing: list[asyncio.Task[None]] = []

    def _generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        request.called = True
        if request.raises:
            raise ValueError("no such model")
        return request.run()

    @rule(what=st.sampled_from(EVENTS), number=st.integers(0, 59))
    def happens(self, what: str, number: int) -> None:
        """One thing; `number` chooses the request."""
        live = [reply for reply in self.replies if not reply.script.over]
        if what.startswith("open"):
            self.loop.act(lambda: self.open(what))
        elif what == "turn":
            self.loop.turn()
        elif what == "pass time":
            self.loop.pass_time(LONG)
        elif what == "close":
            if number % 6 == 0:
                self.closing.append(self.loop.spawn(self.serving.aclose()))
        elif what in WORKER:
            self.loop.act(getattr(self.serving, what))
        elif live:
            self.loop.act(lambda: self.request(what, live[number % len(live)]))
        self.check_counts()

    def open(self, what: str) -> None:
        reply = Reply(Script(stubborn="stubborn" in what, lingers="lingering" in what, raises="raising" in what))
        free = self.admission.running < SLOTS or self.admission.queued < QUEUE
        try:
            reply.control = self.serving(IncomingRequest(id="r", body=reply.script), reply)
        except Overloaded:
            assert not free, "refused while there was room"
            self.told["refused"] += 1
        except Unavailable:
            self.told["refused"] += 1
        else:
            self.replies.append(reply)

    def request(self, what: str, reply: Reply) -> None:
        assert reply.control is not None
        match what:
            case "stop":
                reply.control.stop()
            case "kill" | "unreachable":
                reply.leave(what)
            case "read on" | "read no more":
                reply.read(goes_on=what == "read on")
            case _:
                reply.script.say(what)

    # -- what always holds

    def check_counts(self) -> None:
        meter, admission = self.meter, self.admission
        assert 0 <= admission.running <= SLOTS and admission.queued <= QUEUE
        assert meter.received == len(self.replies) + sum(self.told.values())
        counted = meter.ok + meter.error + meter.cancelled + meter.refused
        going_on = [reply for reply in self.replies if not reply.control.over]  # type: ignore[union-attr]
        assert meter.received == counted + len(going_on)
        assert sum(reply.waiting for reply in self.replies if not reply.left) == admission.queued
        assert len([reply for reply in going_on if not reply.waiting]) == admission.running
        assert all(len(reply.answers) <= 1 for reply in self.replies)

    # -- the end

    def teardown(self) -> None:
        if not hasattr(self, "serving"):
            return
        try:
            self._end()
        finally:
            self.loop.close()

    def _end(self) -> None:
        """Handlers end by themselves, callers read: there is a way out of every state."""
        for reply in self.replies:
            self.loop.act(lambda reply=reply: reply.read(goes_on=True))
            self.loop.act(reply.script.let_go)
        self.loop.settle()
        self.loop.pass_time(LONG)
        self.loop.finish(self.serving.idle())
        self.check_counts()
        assert self.serving.inflight == self.admission.running == self.admission.queued == 0
        assert all(task.done() for task in self.closing)
        self.loop.finish(self.serving.aclose())
        self.loop.act(lambda: self.open("open"))  # and takes nothing now
        assert self.serving.inflight == 0
        assert not asyncio.all_tasks(self.loop)
        assert not self.loop.failures
        for reply in self.replies:
            assert len(reply.answers) == (not reply.left)
        happened = self.told + Counter(next(iter(reply.answers), "cancelled") for reply in self.replies)
        meter = self.meter
        counted = Counter(ok=meter.ok, error=meter.error, cancelled=meter.cancelled, refused=meter.refused)
        assert +counted == +happened
        meter.update()
        assert meter._handler.inflight.value == 0


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Each broken handler is logged, and here thousands break."""
    logger = logging.getLogger("stator")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def run(*, examples: int, steps: int, always_the_same: bool) -> None:
    run_state_machine_as_test(
        ServingLife,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=always_the_same,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )


@pytest.mark.timeout(60)
def test_every_request_is_answered_and_counted_once() -> None:
    run(examples=250, steps=80, always_the_same=True)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_every_one_of_many_requests_is_answered_and_counted_once() -> None:
    run(examples=10_000, steps=150, always_the_same=False)


def life(*steps: str) -> ServingLife:
    """What hypothesis found once, step by step."""
    state = ServingLife()
    state.serve()
    for step in steps:
        state.happens(what=step, number=0)
    return state


@pytest.mark.parametrize(
    "steps",
    [
        ("close", "turn", "resume", "open"),  # a request taken after the end: its slot was never returned
        ("open", "kill_all", "kill_all"),  # refused twice
        ("open lingering", "turn", "close", "pass time"),  # ended when it was left behind, and when it came back
        ("open stubborn", "turn", "close", "pass time", "return"),
        ("open stubborn", "turn", "stop", "close", "pass time"),  # stopped by its caller: cancelled, not broken
    ],
)
def test_what_once_was_answered_twice_or_counted_wrong(steps: tuple[str, ...]) -> None:
    life(*steps).teardown()
