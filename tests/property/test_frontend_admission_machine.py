"""Whatever comes in whatever order: no place is given twice, none stays empty while somebody waits, nobody is refused while one is free."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from stator.frontend.admission import AdmissionQueue
from stator.frontend.admission_limits import AdmissionLimits
from stator.frontend.permit import Permit, PermitState, Priority
from stator.frontend.refusal import Refusal

pytestmark = pytest.mark.timeout(120)


@dataclass
class Stream:
    """A call on its way: it knows its worker from the moment one is chosen."""

    instance_id: int = 0


@dataclass
class Workers:
    """How many calls fit, who is busy, and how many of each worker's calls are known."""

    limits: list[int | None] = field(default_factory=lambda: [2, 2])
    busy: set[int] = field(default_factory=set)
    load: list[int] = field(default_factory=lambda: [0, 0])

    def room(self) -> int | None:
        total = 0
        for worker, limit in enumerate(self.limits):
            if worker in self.busy:
                continue
            if limit is None:
                return None
            total += max(0, limit - self.load[worker])
        return total

    def choose(self) -> int | None:
        """One that takes a call."""
        for worker, limit in enumerate(self.limits):
            if worker not in self.busy and (limit is None or self.load[worker] < limit):
                return worker
        return None


class AdmissionMachine(RuleBasedStateMachine):
    """Requests, workers and clients do what they like; after each step the queue is told what it would be told."""

    groups = Bundle("groups")

    @initialize(
        depth=st.integers(1, 12),
        wait=st.sampled_from([0.0, 0.5, 5.0]),
        short=st.sampled_from([0.0, 0.02, 1.0]),
        ageing=st.integers(0, 3),
        tenants=st.integers(1, 3),
    )
    def begin(self, depth: int, wait: float, short: float, ageing: int, tenants: int) -> None:
        self.limits = AdmissionLimits(depth=depth, wait=wait, target=short, ageing=ageing, tenants=tenants, timeout=10.0)
        self.queue = AdmissionQueue(self.limits)
        self.workers = Workers()
        self.now = 100.0
        self.untold = False
        """whether there may be room that the queue has not been told of"""
        self.alive: list[list[Permit]] = []
        self.at: dict[Permit, int] = {}
        """where each call is that a worker knows"""

    @property
    def permits(self) -> list[Permit]:
        return [permit for group in self.alive for permit in group]

    def of(self, *states: PermitState) -> list[Permit]:
        return [permit for permit in self.permits if permit.state in states]

    def pump(self) -> None:
        """What the queue is told of, it answers by giving away what is free, and no more."""
        free = self.free()
        granted = self.queue.pump(self.now, self.workers.room())
        assert free is None or granted <= max(free, 0), "let in although all workers are at their limit"
        self.untold = False

    def free(self) -> int | None:
        """Places that nobody has been given, by our own count; None: no limit."""
        room = self.workers.room()
        return None if room is None else room - self.unseen()

    def unseen(self) -> int:
        """Calls let in that no worker's load includes."""
        return sum(permit not in self.at for permit in self.of(PermitState.GRANTED))

    # -- what happens

    @rule(
        target=groups,
        tenant=st.sampled_from("abcde"),
        priority=st.sampled_from(Priority),
        calls=st.sampled_from([1, 1, 1, 2, 5]),
    )
    def arrive(self, tenant: str, priority: Priority, calls: int) -> list[Permit] | None:
        free, waiting = self.free(), self.queue.waiting
        capped = self.queue._cap is not None
        outcome = self.queue.offer(self.now, self.workers.room(), tenant=tenant, priority=priority, calls=calls)
        self.untold = False
        left = None if free is None else max(0, free - waiting)
        if isinstance(outcome, Refusal):
            assert capped or left == 0, "refused although a worker is free"
            assert outcome.text(self.limits)
            return None
        granted = sum(permit.state is PermitState.GRANTED for permit in outcome)
        if left is not None:
            assert granted <= left, "let in although all workers are at their limit"
        if not capped:
            assert granted == (calls if left is None else min(calls, left)), "made to wait although a worker is free"
        self.alive.append(outcome)
        return outcome

    @rule(data=st.data())
    def route(self, data: st.DataObject) -> None:
        """A worker is chosen for a call; perhaps the stream is entered already."""
        ready = [permit for permit in self.of(PermitState.GRANTED) if permit not in self.at]
        worker = self.workers.choose()
        if ready and worker is not None:
            permit = data.draw(st.sampled_from(ready))
            permit.stream = Stream(worker + 1)
            self.at[permit] = worker
            self.workers.load[worker] += 1
            if data.draw(st.booleans()):
                self.queue.routed(permit)

    @rule(data=st.data())
    def enter(self, data: st.DataObject) -> None:
        """A worker has taken the call it was chosen for."""
        known = [permit for permit in self.of(PermitState.GRANTED) if permit in self.at]
        if known:
            self.queue.routed(data.draw(st.sampled_from(known)))

    @rule(data=st.data(), seconds=st.floats(0, 3))
    def finish(self, data: st.DataObject, seconds: float) -> None:
        """A call ends, at its worker first."""
        running = self.of(PermitState.GRANTED, PermitState.ROUTED)
        if running:
            self.now += seconds
            self.leave(data.draw(st.sampled_from(running)))
            self.pump()

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """A worker refuses a call that was let in, since others have taken its places."""
        ready = [permit for permit in self.of(PermitState.GRANTED) if permit not in self.at]
        if ready:
            permit = data.draw(st.sampled_from(ready))
            if not self.queue.returned(permit, self.now):
                self.leave(permit)
            self.pump()

    @rule(group=consumes(groups))
    def cancel(self, group: list[Permit] | None) -> None:
        """A client goes away, whatever its request was doing."""
        if group is not None and any(group is each for each in self.alive):
            for permit in group:
                self.leave(permit)
            self.alive = [each for each in self.alive if each is not group]
            self.pump()

    @rule(worker=st.integers(0, 1), limit=st.none() | st.integers(0, 4))
    def resize(self, worker: int, limit: int | None) -> None:
        """A worker comes back with more or fewer places."""
        self.workers.limits[worker] = limit
        self.pump()

    @rule(worker=st.integers(0, 1))
    def toggle_busy(self, worker: int) -> None:
        """The monitor hears of a worker's load."""
        self.workers.busy ^= {worker}
        self.pump()

    @rule(worker=st.integers(0, 1))
    def forget_to_tell(self, worker: int) -> None:
        """A worker is free and nobody says so."""
        self.workers.busy -= {worker}
        self.untold = True

    @rule(seconds=st.floats(0.05, 12))
    def pass_time(self, seconds: float) -> None:
        """The wheel turns."""
        self.now += seconds
        self.untold = False
        for permit in self.queue.tick(self.now, self.workers.room()):
            assert permit.state is PermitState.OVER
            assert self.now - permit.group.since >= self.limits.timeout
        late = [permit for permit in self.of(PermitState.WAITING) if not permit.group.taken]
        assert all(self.now - permit.group.since < self.limits.timeout for permit in late)

    def leave(self, permit: Permit) -> None:
        worker = self.at.pop(permit, None)
        if worker is not None:
            self.workers.load[worker] -= 1
        self.queue.end(permit, self.now)
        self.queue.end(permit, self.now)

    # -- what is always true

    @invariant()
    def nobody_waits_beside_a_free_place(self) -> None:
        if not hasattr(self, "queue") or self.untold:
            return
        free = self.queue.free(self.now, self.workers.room())
        assert not self.queue.waiting or (free is not None and free <= 0)

    @invariant()
    def it_counts_right(self) -> None:
        if not hasattr(self, "queue"):
            return
        queue = self.queue
        several = {group[0].group for group in self.alive if len(group) > 1}
        assert queue.waiting == len(self.of(PermitState.WAITING)) == sum(map(queue.waiting_of, Priority))
        assert set(queue.all_waiting()) == set(self.of(PermitState.WAITING))
        assert queue.running == len(self.of(PermitState.GRANTED, PermitState.ROUTED))
        for priority in Priority:
            line = queue.line(priority)
            assert line.known <= self.limits.tenants + line.tenants
            # one request may exceed the queue on its own, and what workers refused comes back whatever waits
            extra = sum(permit.returns > 0 or permit.group in several for permit in line.permits())
            assert line.waiting <= self.limits.depth + extra

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        for group in list(self.alive):
            self.cancel(group)
        assert (self.queue.waiting, self.queue.running, len(self.queue._unrouted)) == (0, 0, 0)


AdmissionMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=50, deadline=None)
TestAdmissionMachine = AdmissionMachine.TestCase
