"""The queue in front of one model's workers, brought to life: it hears of places, keeps time, and wakes who waits."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from stator.errors import Unavailable
from stator.frontend.admission import AdmissionQueue
from stator.frontend.admission_limits import AdmissionLimits
from stator.frontend.admission_metrics import AdmissionMetrics
from stator.frontend.caller import Caller
from stator.frontend.permit import Permit, PermitState
from stator.frontend.refusal import Refusal
from stator.llm.served import ServedModel, TokenStream
from stator.tasks import DeadlineWheel, Timed

__all__ = ["Admission", "Gate"]

logger = logging.getLogger(__name__)

_WAITING, _GRANTED, _, _OVER = PermitState
_TICK = 0.1
"""seconds; while somebody waits it is looked this often whether a place came free that nobody told of"""
_QUIET = 10.0
"""seconds between two lines of the log that say that requests are refused"""

Refuse = Callable[[str, str, float], Exception]
"""makes the answer to a request that is refused: the model, what is in the way, and how many seconds later it may be better"""


class Gate:
    """Admission for one engine. `refuse` makes the errors that requests are refused with; with `limits.depth` 0 everybody may pass.

    `closing` is set once nobody may wait any more; it makes what those are told who would have to.
    """

    def __init__(
        self,
        served: ServedModel,
        limits: AdmissionLimits,
        *,
        metrics: AdmissionMetrics,
        now: Callable[[], float],
        wheel: DeadlineWheel,
        refuse: Refuse,
    ) -> None:
        self.queue = AdmissionQueue(limits)
        self.closing: Callable[[], Exception] | None = None
        self.slot: set[Timed] | None = None
        self._served = served
        self._limits = limits
        self._metrics = metrics
        self._now = now
        self._wheel = wheel
        self._refuse = refuse
        self._unsubscribe: Callable[[], None] | None = None
        self._off = limits.depth == 0
        self._refused = 0
        self._said_at = float("-inf")

    @property
    def model(self) -> str:
        """The name of the model."""
        return self._served.name

    @property
    def is_deserted(self) -> bool:
        """Whether there is no worker."""
        return not self._served.instances()

    @property
    def idle(self) -> bool:
        """Whether no call waits or runs."""
        return not (self.queue.waiting or self.queue.running)

    def enter(self, caller: Caller, calls: int) -> "Admission":
        """Let a request of so many calls in, or let it wait. Raises what `refuse` makes, and `closing`. Never waits itself.

        Without any worker everybody may pass: the engine says what there is to say.
        """
        queue, now = self.queue, self._now()
        tenant = caller.tenant if self._limits.tenants else ""
        outcome = queue.offer(now, self._room(), tenant=tenant, priority=caller.priority, calls=calls)
        if isinstance(outcome, Refusal):
            raise self._refusal(outcome)
        if queue.waiting:
            if self.closing is not None and outcome[0].state is _WAITING:
                self.close(outcome)
                raise self.closing()
            self._watch()
        return Admission(self, outcome)

    def close(self, permits: list[Permit]) -> None:
        """All calls of a request are over."""
        for permit in permits:
            if permit.state is not _OVER:
                self.ended(permit)

    def dismiss(self, error: Callable[[], Exception]) -> None:
        """No request waits any more to begin: those who do are refused, and who comes later if it would have to."""
        self.closing = error
        self._tell(self.queue.dismiss(begun=False), error)

    def forget(self) -> None:
        """Stop listening."""
        self._wheel.disarm(self)
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    # -- of one call

    async def granted(self, permit: Permit) -> None:
        """Wait until the call may be made; at once if it may. Raises why it may not. Cancelled: as before."""
        if permit.state is _WAITING:
            waiter = asyncio.get_running_loop().create_future()
            permit.wake = partial(_resolve, waiter)
            try:
                await waiter
            finally:
                permit.wake = None
            if permit.refusal is None:
                self._metrics.waited(self.model, permit.group.priority, permit.granted_at - permit.group.since)
        if permit.refusal is not None:
            raise permit.refusal

    def returned(self, permit: Permit) -> bool:
        """A worker refused the call; whether it waits again."""
        if self._off or self.closing is not None or not self.queue.returned(permit, self._now()):
            return False
        self._watch()
        return True

    def refused_by_worker(self) -> Exception:
        """What a request is told that had its turn and that no worker took."""
        return self._refusal(Refusal(reason="worker"))

    def ended(self, permit: Permit) -> None:
        """The call is over."""
        self.queue.end(permit, self._now())
        self.pump()

    def pump(self) -> None:
        """There may be room."""
        if self.queue.waiting:
            self.queue.pump(self._now(), self._room())

    # -- while somebody waits

    def _watch(self) -> None:
        if self.slot is None:
            self._wheel.arm(self, self._wheel.now() + _TICK)
        if self._unsubscribe is None:
            self._unsubscribe = self._served.engine.on_room(self.pump)

    def expire(self, now: float) -> float:
        """Asked by the wheel, whose clock need not be ours."""
        queue, ours = self.queue, self._now()
        if self.is_deserted:
            self._tell(queue.dismiss(begun=True), lambda: Unavailable(f"the last worker of {self.model!r} left"))
        for permit in queue.tick(ours, self._room()):
            refusal = Refusal(reason="timeout", wait=ours - permit.group.since, waiting=queue.waiting_of(permit.group.priority))
            self._tell([permit], partial(self._refusal, refusal))
        if queue.waiting:
            return now + _TICK
        self.forget()
        return 0.0

    def _room(self) -> int | None:
        if self._off:
            return None
        room = self._served.engine.room()
        return room if room is None or room > 0 or not self.is_deserted else None

    def _tell(self, permits: list[Permit], error: Callable[[], Exception]) -> None:
        for permit in permits:
            permit.refusal = error()
            if permit.wake is not None:
                permit.wake()

    # -- refusing

    def _refusal(self, refusal: Refusal) -> Exception:
        self._metrics.refused(self.model, refusal.reason)
        self._refused += 1
        reason = refusal.text(self._limits)
        pressure = self._served.engine.pressure()
        text = f"{pressure}; {reason}" if pressure else reason
        self._say(text)
        return self._refuse(self.model, text, 0.0 if refusal.reason == "timeout" else refusal.wait)  # that was for nothing

    def _say(self, text: str) -> None:
        now = self._now()
        if now - self._said_at >= _QUIET:
            logger.warning("model %s: %d requests refused, the last one since %s", self.model, self._refused, text)
            self._said_at, self._refused = now, 0


class Admission:
    """What a request got from its gate: the right to make its calls, one by one, at once or in a while. `close` it in the end."""

    __slots__ = ("_gate", "_permits")

    def __init__(self, gate: Gate, permits: list[Permit]) -> None:
        self._gate = gate
        self._permits = permits

    @property
    def waited(self) -> float:
        """Seconds from the request's arrival here until its first call was let in; 0.0 until then."""
        first = self._permits[0]
        return max(0.0, first.granted_at - first.group.since)

    async def turn(self, index: int) -> None:
        """Return when call `index` may be made. Raises why it may not. Cancelled: it still waits, or may go."""
        permit = self._permits[index]
        if permit.state is not _GRANTED:
            await self._gate.granted(permit)

    def sending(self, index: int, stream: TokenStream) -> None:
        """The call is being made with `stream`."""
        self._permits[index].stream = stream

    def routed(self, index: int) -> None:
        """A worker took it."""
        self._gate.queue.routed(self._permits[index])

    def returned(self, index: int) -> bool:
        """A worker refused it; whether it waits for another `turn`."""
        return self._gate.returned(self._permits[index])

    def refused_by_worker(self) -> Exception:
        """What the request is told when a worker refused it for good."""
        return self._gate.refused_by_worker()

    def ended(self, index: int) -> None:
        """It is over."""
        self._gate.ended(self._permits[index])

    def close(self) -> None:
        """The request is over: whatever it has left is given back. Idempotent."""
        self._gate.close(self._permits)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
