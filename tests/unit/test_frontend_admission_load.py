"""Four simulated workers under more load than they can bear, in virtual time.

Who gets in is served fast, the others are told at once, no worker idles, and no tenant is robbed.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import count
from random import Random

import pytest

from stator.frontend.admission import AdmissionQueue
from stator.frontend.admission_limits import AdmissionLimits
from stator.frontend.permit import Permit, PermitState, Priority
from stator.frontend.refusal import Refusal

pytestmark = pytest.mark.timeout(120)

FIRST_TOKEN = 0.05
"""seconds from the start of a call to its first token"""
TICK = 0.1


class Simulation:
    """Four workers with `slots` each; a call takes `seconds` on average, evenly spread or exponentially."""

    def __init__(self, *, slots: int = 16, seconds: float = 1.0, exponential: bool = False, seed: int = 1) -> None:
        self.queue = AdmissionQueue(AdmissionLimits())
        self.now = 0.0
        self.limits = [slots] * 4
        self.capacity = 4 * slots / seconds
        self._random = Random(seed)
        self._seconds = seconds
        self._exponential = exponential
        self._loads = [0] * 4
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self.forget()
        self._at(TICK, self._tick)

    def forget(self) -> None:
        """Measure from now on."""
        self._since = self._worked_until = self.now
        self._worked = 0.0
        self.first_tokens: dict[str, list[float]] = {}
        self.offered = Counter[str]()
        self.done = Counter[str]()
        self.refused = Counter[str]()
        self.late = 0
        """refusals that did not come at once"""

    def throughput(self) -> float:
        """Work done, as part of what the workers had at the start could do."""
        self._work()
        return self._worked / (self.now - self._since) / (self.capacity * self._seconds)

    def _work(self) -> None:
        self._worked += sum(self._loads) * (self.now - self._worked_until)
        self._worked_until = self.now

    def p99(self, tenant: str = "") -> float:
        """Seconds from arrival to the first token."""
        times = sorted(self.first_tokens[tenant])
        return times[int(len(times) * 0.99)]

    # -- load

    def run(self, seconds: float, loads: Mapping[str, float]) -> None:
        """Poisson arrivals for so long; `loads` is by tenant, 1.0 for the capacity."""
        end = self.now + seconds
        for tenant, load in loads.items():
            self._arrive_later(tenant, load * self.capacity, end)
        while self._events and self._events[0][0] <= end:
            self.now, _, act = heapq.heappop(self._events)
            self._work()
            act()
        self.now = end

    def arrive(self, tenant: str = "", priority: Priority = Priority.NORMAL) -> bool:
        """One request; whether it was taken."""
        self.offered[tenant] += 1
        outcome = self.queue.offer(self.now, self._room(), tenant=tenant, priority=priority)
        if isinstance(outcome, Refusal):
            self.refused[tenant] += 1
            return False
        (permit,) = outcome
        permit.wake = lambda: self._start(permit)
        if permit.state is PermitState.GRANTED:
            self._start(permit)
        return True

    def _arrive_later(self, tenant: str, rate: float, end: float) -> None:
        def arrive() -> None:
            self.arrive(tenant)
            self._arrive_later(tenant, rate, end)

        at = self.now + self._random.expovariate(rate)
        if at < end:
            self._at(at, arrive)

    # -- workers

    def _room(self) -> int:
        return sum(max(0, limit - load) for limit, load in zip(self.limits, self._loads, strict=True))

    def _start(self, permit: Permit) -> None:
        if permit.state is not PermitState.GRANTED:
            self.refused[permit.group.tenant] += 1
            self.late += 1
            return
        worker = max(range(4), key=lambda worker: self.limits[worker] - self._loads[worker])
        assert self._loads[worker] < self.limits[worker], "let in although all are over the limit"
        self._loads[worker] += 1
        self.queue.routed(permit)
        self.first_tokens.setdefault(permit.group.tenant, []).append(self.now - permit.group.since + FIRST_TOKEN)
        random = self._random
        spread = random.expovariate(1.0) if self._exponential else random.uniform(0.8, 1.2)
        self._at(self.now + self._seconds * spread, lambda: self._end(permit, worker))

    def _end(self, permit: Permit, worker: int) -> None:
        self._loads[worker] -= 1
        self.done[permit.group.tenant] += 1
        self.queue.end(permit, self.now)
        self.queue.pump(self.now, self._room())

    def _tick(self) -> None:
        for permit in self.queue.tick(self.now, self._room()):
            assert permit.wake is not None
            permit.wake()
        self._at(self.now + TICK, self._tick)

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))


@pytest.mark.parametrize("exponential", [False, True], ids=["even", "exponential"])
@pytest.mark.parametrize("slots", [4, 16, 64])
@pytest.mark.parametrize("overload", [2.0, 5.0])
def test_under_overload_the_accepted_are_served_fast_and_workers_stay_busy(
    overload: float, slots: int, exponential: bool
) -> None:
    simulation = Simulation(slots=slots, exponential=exponential)
    few = 0.1 if slots == 4 else 0.05  # places so few make long waits at 0.8 already
    simulation.run(10, {"": 0.8})
    simulation.forget()
    simulation.run(60, {"": 0.8})
    usual = simulation.p99()
    assert simulation.refused[""] < few * simulation.offered[""]
    simulation.forget()
    simulation.run(60, {"": overload})
    assert simulation.p99() <= 2 * max(usual, 2 * FIRST_TOKEN), "from the first moment of the overload on"
    assert 0.95 <= simulation.throughput() <= 1.05
    assert simulation.late == 0, "all refusals come at once"
    simulation.run(3, {"": 0.8})
    simulation.forget()
    simulation.run(60, {"": 0.8})
    assert simulation.p99() <= 2 * usual, "and it is over when it is over"
    assert simulation.refused[""] < few * simulation.offered[""]


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5])
@pytest.mark.parametrize("slots", [4, 16])
def test_a_flooding_tenant_takes_nothing_from_another_within_its_share(slots: int, share: float) -> None:
    alone = Simulation(slots=slots, exponential=True)
    alone.run(60, {"quiet": share})
    both = Simulation(slots=slots, exponential=True)
    both.run(20, {"quiet": share, "loud": 5.0})
    both.forget()
    both.run(60, {"quiet": share, "loud": 5.0})
    kept = (both.done["quiet"] / both.offered["quiet"]) / (alone.done["quiet"] / alone.offered["quiet"])
    assert kept >= 0.9
    assert both.throughput() >= 0.95, "the other one has what is left"
    assert both.p99("quiet") <= 2 * alone.p99("quiet") + 0.5


def test_two_that_flood_have_half_each_and_a_third_a_third() -> None:
    simulation = Simulation()
    simulation.run(20, {"a": 2.0, "b": 5.0})
    simulation.forget()
    simulation.run(40, {"a": 2.0, "b": 5.0})
    total = sum(simulation.done.values())
    assert simulation.done["a"] / total == pytest.approx(0.5, abs=0.03)
    simulation.run(10, {"a": 2.0, "b": 5.0, "c": 1.0})
    simulation.forget()
    simulation.run(40, {"a": 2.0, "b": 5.0, "c": 1.0})
    total = sum(simulation.done.values())
    assert all(simulation.done[tenant] / total == pytest.approx(1 / 3, abs=0.03) for tenant in "abc")


def test_what_one_tenant_leaves_the_others_may_have() -> None:
    simulation = Simulation()
    simulation.run(10, {"a": 0.1, "b": 0.8})
    simulation.forget()
    simulation.run(60, {"a": 0.1, "b": 0.8})
    assert simulation.done["b"] / simulation.offered["b"] > 0.95


def test_a_burst_is_absorbed() -> None:
    simulation = Simulation(exponential=True)
    simulation.run(20, {"": 0.5})
    simulation.forget()
    taken = sum(simulation.arrive() for _ in range(55))
    assert taken == 55, "about half of the places were free, and half a second's worth may wait"
    simulation.run(5, {"": 0.5})
    assert simulation.refused[""] == 0, "the queue became shorter from then on"
    simulation.forget()
    simulation.run(10, {"": 0.5})
    assert simulation.refused[""] == 0


def test_from_a_cold_start_into_five_times_the_capacity() -> None:
    simulation = Simulation()
    simulation.run(5, {"": 5.0})
    assert simulation.late == 0
    simulation.forget()
    simulation.run(60, {"": 5.0})
    assert simulation.p99() <= 4 * FIRST_TOKEN
    assert simulation.throughput() >= 0.95


def test_more_workers_are_used_at_once_and_fewer_are_not_flooded() -> None:
    simulation = Simulation()
    simulation.run(20, {"": 2.0})
    simulation.limits = [32] * 4
    simulation.run(3, {"": 2.0})
    simulation.forget()
    simulation.run(20, {"": 2.0})
    assert simulation.throughput() >= 1.7, "twice the places, but the load is no more than that"
    simulation.limits = [8] * 4
    simulation.run(5, {"": 2.0})
    simulation.forget()
    simulation.run(20, {"": 2.0})
    assert 0.46 <= simulation.throughput() <= 0.52
    assert simulation.p99() <= 8 * FIRST_TOKEN
