"""Who may go to the workers of one model now, who waits, and who is refused: decided without a clock, a loop or a socket.

    offer ─▶ granted ─▶ routed ─▶ over          a place is free and nobody waits
       └──▶ waiting ─▶ granted …                 all are taken, and it will not be long
       └──▶ Refusal                              all are taken, and it would be

**Room** is what the workers still take (`TokenEngine.room`), None for no limit. It knows calls that a worker was chosen for; calls let in
that are not that far count against it here, so that each place is given once (`Permit.counted` is the border between the two). A call of a
request is let in alone: a request of eight calls with three places begins with three, and the others follow.

**Order**: higher classes first; a class passed over `ageing` times is next all the same, so that a lower class gets one place in
`ageing` + 1 at least. Within a class it is fair between tenants (`FairLine`).

**Refusing early**: the wait of a newcomer is predicted from its place in that order and from how fast places come free (`ServiceRate`).
More than `queue_wait` seconds are too many. A queue that stood above `queue_target` seconds for `queue_burst` seconds and does not become
shorter is no burst: from then on only who need not wait longer than the target is taken, until that has refused nobody for a while. That
is the idea of CoDel (RFC 8289), at the door instead of at the exit, so that refusals come at once. Two exceptions: tenants within their
share are held to `queue_wait` only, since it is not they who overload; and a few calls may always wait, lest places stay empty.
"""

from collections.abc import Iterable, Sequence

from stator.frontend.admission_limits import AdmissionLimits
from stator.frontend.fair_line import FairLine
from stator.frontend.overload import Overload
from stator.frontend.permit import CallGroup, Permit, PermitState, Priority
from stator.frontend.refusal import Reason, Refusal
from stator.frontend.service_rate import ServiceRate

__all__ = ["AdmissionQueue"]

_WAITING, _GRANTED, _ROUTED, _OVER = PermitState  # class attributes of an enum are slow to come by
_SLACK = 16
"""calls that run, times calls that may wait whatever the target: a place must not stay empty for want of a request"""
_FEW = 4
"""calls that may wait whatever the target, at most"""
_STARTED_PATIENCE = 300.0
"""seconds that further calls of a request wait once one of its calls was taken: as long as a first item may take elsewhere"""
_RETURNS = 3
"""how often a call that a worker refused may wait again"""
_CAP_LIFE = 2.0
"""seconds for which a worker's refusal says how many calls fit"""


class _Class:
    """One priority class: its line, its overload, and how often others went first."""

    __slots__ = ("line", "overload", "passed")

    def __init__(self, limits: AdmissionLimits) -> None:
        self.line = FairLine(limits.tenants)
        self.overload = Overload(limits.burst)
        self.passed = 0


class AdmissionQueue:
    """The queue of one model. `room` is always the workers' own answer of this moment; `now` is in monotonic seconds.

    Each permit of an accepted request must be brought to its `end` exactly once, whatever becomes of it.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.running = 0
        """calls granted and not over"""
        self.rate = ServiceRate()
        self._classes = tuple(_Class(limits) for _ in Priority)
        self._waiting = 0
        self._waiting_since = 0.0
        self._unrouted: set[Permit] = set()
        self._cap: int | None = None
        self._cap_until = 0.0

    @property
    def waiting(self) -> int:
        """Calls that wait, of all classes."""
        return self._waiting

    def waiting_of(self, priority: Priority) -> int:
        """Calls of one class that wait."""
        return self._classes[priority].line.waiting

    def line(self, priority: Priority) -> FairLine:
        """Those of one class, for people and tests."""
        return self._classes[priority].line

    def free(self, now: float, room: int | None) -> int | None:
        """Places that nobody has been given; None: no limit. Negative when a limit went down."""
        free = None if room is None else room - self._pending()
        if self._cap is None or now >= self._cap_until:
            return free
        left = self._cap - self.running
        return left if free is None else min(left, free)

    def _pending(self) -> int:
        """Calls let in that `room` does not know of."""
        if not self._unrouted:
            return 0
        return sum(not permit.counted for permit in self._unrouted)

    # -- a request comes

    def offer(
        self, now: float, room: int | None, *, tenant: str = "", priority: Priority = Priority.NORMAL, calls: int = 1
    ) -> list[Permit] | Refusal:
        """Take a request, or say why not. The permits of its calls, in order, are granted now, or wait."""
        if self._waiting:
            self.pump(now, room)
        own = self._classes[priority]
        group = CallGroup(tenant, priority, now)
        permits = [Permit(group)] if calls == 1 else [Permit(group) for _ in range(calls)]
        at_once = 0
        if not self._waiting:
            free = self.free(now, room)
            at_once = calls if free is None else min(calls, max(free, 0))
        if at_once:
            if room is not None:
                own.line.charge(tenant, at_once)
            for permit in permits[:at_once]:
                self._grant(permit, now)
        elif (refusal := self._refusal(own, tenant, priority, calls, now)) is not None:
            return refusal
        for permit in permits[at_once:]:
            self._wait(own, permit, now)
        return permits

    def _refusal(self, own: _Class, tenant: str, priority: Priority, calls: int, now: float) -> Refusal | None:
        """Why a request that cannot go on now may not wait either."""
        limits, line = self.limits, own.line
        held = line.held(tenant)
        # A place is left for one more tenant, so that nobody alone can fill the queue.
        share = max(1, limits.depth // (line.tenants + (not held) + 1))
        counted = min(calls, share)
        interval = self._interval(now)
        position = line.position(tenant)
        wait = 0.0 if interval is None else self._before(priority, position) * interval
        reason: Reason | None = None
        if held + counted > share or line.waiting + counted > limits.depth:
            reason = "queue"
        elif wait > limits.timeout:
            reason = "timeout"
        elif interval is None:
            reason = "wait" if position > max(self._few(), self.running // 4) else None
        else:
            reason = self._too_long(own, tenant, position, wait, interval, now)
        return reason and Refusal(reason=reason, wait=wait, waiting=line.waiting, held=held)

    def _too_long(self, own: _Class, tenant: str, position: int, wait: float, interval: float, now: float) -> Reason | None:
        """Whether `wait` is too long as things stand."""
        limits, line, overload = self.limits, own.line, own.overload
        few = max(self._few(), int(limits.target / interval) if interval else limits.depth)
        overloaded = False
        if line.waiting < few:
            overload.short()
        elif limits.target:
            overloaded = overload.standing(line.waiting, now, interval)
        if position <= few:
            return None
        if overloaded and not line.is_owed(tenant):
            overload.refused_for_it(now, interval)
            return "overload"
        if limits.wait and wait > limits.wait:
            overload.refused()
            return "wait"
        return None

    def _few(self) -> int:
        """How many calls may wait whatever the target."""
        return max(1, min(_FEW, _SLACK // max(1, self.running)))

    def _interval(self, now: float) -> float | None:
        return self.rate.interval(self.running, since=self._waiting_since if self._waiting else now, now=now)

    def _before(self, priority: Priority, position: int) -> int:
        """How many places must come free until the one at `position` of its class has one."""
        ageing = self.limits.ageing
        places = position + sum(each.line.waiting for each in self._classes[:priority])
        if ageing:
            places = min(places, (ageing + 1) * position)
            places += sum(min(each.line.waiting, places // ageing) for each in self._classes[priority + 1 :])
        return places

    def _wait(self, own: _Class, permit: Permit, now: float) -> None:
        own.line.add(permit)
        if not self._waiting:
            self._waiting_since = now
        self._waiting += 1

    # -- places come free

    def pump(self, now: float, room: int | None) -> int:
        """Let in as many as there are places for; how many that were."""
        free = self.free(now, room) if self._waiting else 0
        granted = 0
        while self._waiting and (free is None or granted < free):
            own = self._next()
            permit = own.line.take()
            self._waiting -= 1
            self._grant(permit, now)
            granted += 1
            if not own.line.waiting:
                own.overload.short()
            if permit.wake is not None:
                permit.wake()
        return granted

    def _next(self) -> _Class:
        """The class whose turn it is."""
        waiting = [each for each in self._classes if each.line.waiting]
        chosen = waiting[0]
        if len(waiting) > 1:
            if self.limits.ageing:
                aged = max(waiting[1:], key=lambda each: each.passed)
                if aged.passed >= self.limits.ageing:
                    chosen = aged
            for each in waiting[waiting.index(chosen) + 1 :]:
                each.passed += 1
        chosen.passed = 0
        return chosen

    def _grant(self, permit: Permit, now: float) -> None:
        permit.state = _GRANTED
        permit.granted_at = now
        permit.stream = None
        self.running += 1
        self._unrouted.add(permit)

    # -- what becomes of a call

    def routed(self, permit: Permit) -> None:
        """A worker took the call."""
        if permit.state is _GRANTED:
            permit.state = _ROUTED
            permit.group.taken += 1
            self._unrouted.discard(permit)

    def returned(self, permit: Permit, now: float) -> bool:
        """A worker refused a call that was let in: no more fit than run now. Whether it waits again, first of its tenant: not too often.

        Nothing may have been delivered of it.
        """
        group, limits = permit.group, self.limits
        if permit.returns >= _RETURNS or now - group.since >= limits.timeout:
            return False
        group.taken -= permit.state is _ROUTED
        permit.returns += 1
        permit.state = _WAITING
        self._unrouted.discard(permit)
        self.running -= 1
        self._cap, self._cap_until = self.running, now + _CAP_LIFE
        if not self._waiting:
            self._waiting_since = now
        self._waiting += 1
        self._classes[group.priority].line.put_back(permit)
        return True

    def end(self, permit: Permit, now: float) -> None:
        """The call is over, or was given up at whatever stage. Idempotent."""
        state, permit.state = permit.state, _OVER
        permit.stream = None
        if state is _WAITING:
            own = self._classes[permit.group.priority]
            own.line.remove(permit)
            self._waiting -= 1
            if not own.line.waiting:
                own.overload.short()
        elif state is not _OVER:
            self.running -= 1
            self._unrouted.discard(permit)
            if state is _ROUTED:
                self.rate.ended(now - permit.granted_at, now)

    # -- time passes

    def tick(self, now: float, room: int | None) -> list[Permit]:
        """To be called now and then while calls wait: lets in whom it can. Who waited too long is the answer, and waits no longer."""
        if self._cap is not None:  # what workers refused once they may take again: try with one more, or a few
            self._cap += 1 + self._cap // 64
        self.pump(now, room)
        return self._give_up(permit for permit in self.all_waiting() if self._is_late(permit, now))

    def dismiss(self, *, begun: bool) -> list[Permit]:
        """Nobody waits any longer, except, unless `begun`, further calls of requests that have one running. Who did wait."""
        return self._give_up(permit for permit in self.all_waiting() if begun or not permit.group.taken)

    def all_waiting(self) -> Sequence[Permit]:
        """The permits that wait, class by class."""
        return [permit for each in self._classes for permit in each.line.permits()]

    def _is_late(self, permit: Permit, now: float) -> bool:
        patience = _STARTED_PATIENCE if permit.group.taken else self.limits.timeout
        return now - permit.group.since >= patience

    def _give_up(self, permits: Iterable[Permit]) -> list[Permit]:
        given_up = list(permits)
        for permit in given_up:
            self.end(permit, permit.group.since)
        return given_up
