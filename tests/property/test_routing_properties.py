"""Routing under any sequence of news: fairness, preference, and counts that add up."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stator.errors import Overloaded, Unavailable
from stator.protocol.ids import EndpointId
from stator.routing import (
    ANYWHERE,
    Availability,
    Candidate,
    DeviceWeighted,
    LeastLoaded,
    Occupancy,
    Policy,
    PowerOfTwo,
    RoundRobin,
    RouteRequest,
    RoutingConfig,
    UniformRandom,
)

ENDPOINT = EndpointId("demo", "backend", "generate")
IDS = st.integers(min_value=1, max_value=8)
POLICIES: list[Policy] = [RoundRobin(), UniformRandom(), LeastLoaded(), PowerOfTwo(), DeviceWeighted()]


@given(st.lists(st.tuples(st.sets(IDS, min_size=1), st.integers(min_value=1, max_value=40)), min_size=1, max_size=8))
def test_round_robin_is_fair_between_any_two_changes(phases: list[tuple[set[int], int]]) -> None:
    policy, random, occupancy = RoundRobin(), Random(0), Occupancy()
    availability = Availability(ENDPOINT)
    for ids, requests in phases:
        availability.update(occupancy.update(dict.fromkeys(sorted(ids), "")))
        counts = Counter(dict.fromkeys(ids, 0))
        for _ in range(requests):
            counts[policy.choose(availability.free(0.0), ANYWHERE, random).instance_id] += 1
        assert set(counts) == ids
        assert max(counts.values()) - min(counts.values()) <= 1


@given(
    st.lists(st.tuples(st.integers(min_value=0, max_value=9), st.sampled_from(["cpu", "cuda"])), min_size=1, max_size=12),
    st.sampled_from(POLICIES),
    st.randoms(use_true_random=False),
)
def test_a_choice_is_one_of_the_candidates(facts: list[tuple[int, str]], policy: Policy, random: Random) -> None:
    free = [Candidate(instance_id=n, load=load, device_type=device) for n, (load, device) in enumerate(facts)]
    choice = policy.choose(free, ANYWHERE, random)
    assert any(choice is candidate for candidate in free)
    if policy.name == "least_loaded":
        assert choice.load == min(candidate.load for candidate in free)
    if policy.name == "power_of_two" and len(free) > 1:
        assert choice.load <= sorted(candidate.load for candidate in free)[-2]


@given(
    st.lists(st.tuples(IDS, st.floats(min_value=0, max_value=4)), min_size=1, max_size=20),
    st.integers(min_value=1, max_value=8),
)
def test_all_inhibited_means_the_earliest_ending(failures: list[tuple[int, float]], count: int) -> None:
    availability = Availability(ENDPOINT)
    availability.update(Occupancy().update(dict.fromkeys(range(1, count + 1), "")))
    for instance_id, when in sorted(failures, key=lambda failure: failure[1]):
        availability.mark_inhibited(instance_id, when)
    for instance_id in range(1, count + 1):
        availability.mark_inhibited(instance_id, 4.0)
    ends = {row.instance_id: row.until or 0.0 for row in availability.explain(4.0)}
    (used,) = availability.free(4.0)
    assert ends[used.instance_id] == min(ends.values())


class Marks(RuleBasedStateMachine):
    """Marks set in any order, and loads up to any limits, against a plain model; asked through a part that sees some instances only."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.whole = Availability(ENDPOINT, RoutingConfig(overloaded_for=5.0))
        self.availability = self.whole.part()
        self.occupancy = Occupancy()
        self.policy: Policy = RoundRobin()
        self.allowed: set[int] | None = None
        self.ids: list[int] = []
        self.candidates: tuple[Candidate, ...] = ()
        self.inhibited: dict[int, tuple[float, float]] = {}
        self.overloaded: dict[int, float] = {}
        self.suspect: set[int] = set()
        self.draining: set[int] = set()
        self.busy: set[int] = set()

    @rule(ids=st.lists(IDS, unique=True))
    def discovery(self, ids: list[int]) -> None:
        self.candidates = self.occupancy.update(dict.fromkeys(ids, ""))
        self.whole.update(self.candidates)
        for gone in set(self.ids) - set(ids):
            self.inhibited.pop(gone, None)
            self.overloaded.pop(gone, None)
            self.suspect.discard(gone)
            self.draining.discard(gone)
        self.ids = ids

    @rule(seconds=st.floats(min_value=0, max_value=30))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(instance_id=IDS)
    def fails(self, instance_id: int) -> None:
        self.availability.mark_inhibited(instance_id, self.now)
        until, penalty = self.inhibited.get(instance_id, (0.0, 0.0))
        if instance_id in self.ids and self.now >= until:
            penalty = min(60.0, penalty * 2) if penalty else 5.0
            self.inhibited[instance_id] = (self.now + penalty, penalty)

    @rule(instance_id=IDS)
    def succeeds(self, instance_id: int) -> None:
        self.availability.mark_success(instance_id)
        self.inhibited.pop(instance_id, None)
        self.suspect.discard(instance_id)

    @rule(instance_id=IDS)
    def refuses(self, instance_id: int) -> None:
        self.availability.mark_overloaded(instance_id, self.now)
        if instance_id in self.ids:
            self.overloaded[instance_id] = self.now + 5.0

    @rule(instance_id=IDS, silent=st.booleans())
    def is_silent(self, instance_id: int, silent: bool) -> None:
        if silent:
            self.availability.mark_suspect(instance_id)
            self.suspect |= {instance_id} & set(self.ids)
        else:
            self.availability.clear_suspect(instance_id)
            self.suspect.discard(instance_id)

    @rule(instance_id=IDS)
    def drains(self, instance_id: int) -> None:
        self.availability.mark_draining(instance_id)
        self.draining |= {instance_id} & set(self.ids)

    @rule(ids=st.sets(IDS))
    def load_report(self, ids: set[int]) -> None:
        self.availability.set_busy(dict.fromkeys(ids, "load report"))
        self.busy = ids

    @rule(allowed=st.none() | st.sets(IDS))
    def cards_are_read(self, allowed: set[int] | None) -> None:
        self.availability.restrict_to(allowed)
        self.allowed = allowed

    @rule(carried=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 1, 2, None])), min_size=8, max_size=8))
    def requests_run(self, carried: list[tuple[int, int | None]]) -> None:
        for candidate, (load, limit) in zip(self.candidates, carried, strict=False):
            candidate.load, candidate.limit = load, limit

    @rule(policy=st.sampled_from([RoundRobin, UniformRandom, LeastLoaded, PowerOfTwo, DeviceWeighted]))
    def a_policy_is_used(self, policy: Callable[[], Policy]) -> None:
        self.policy = policy()

    @rule(excluded=st.sets(IDS))
    def a_retry_goes_where_it_should(self, excluded: set[int]) -> None:
        self.check(excluded)

    @invariant()
    def a_request_goes_where_it_should(self) -> None:
        if hasattr(self, "ids"):
            self.check(set())

    def check(self, excluded: set[int]) -> None:
        ours = [n for n in self.ids if self.allowed is None or n in self.allowed]
        overloaded = [n for n in ours if self.now < self.overloaded.get(n, 0.0)]
        full = [n for n in ours if n not in self.draining and (n in self.busy or n in overloaded)]
        refused = [n for n in full if n not in self.busy and n not in excluded]
        open_ = [n for n in ours if n not in self.draining and n not in full and n not in excluded]
        until = {n: self.inhibited[n][0] for n in open_ if self.now < self.inhibited.get(n, (0.0, 0.0))[0]}
        free = [n for n in open_ if n not in until and n not in self.suspect]
        suspects = [n for n in open_ if n not in until and n in self.suspect]
        request = RouteRequest(excluded=excluded) if excluded else ANYWHERE
        if not open_ and refused:
            (candidate,) = self.availability.free(self.now, request)
            assert self.overloaded[candidate.instance_id] == min(self.overloaded[n] for n in refused)
            assert candidate.instance_id in refused
        elif not open_:
            with_room = {each.instance_id for each in self.candidates if each.has_room}
            well = set(ours) - self.draining - self.suspect - set(full) - {n for n in ours if self.is_inhibited(n)}
            with pytest.raises(Overloaded if full or well - with_room else Unavailable):
                self.availability.free(self.now, request)
        else:
            usable = [candidate.instance_id for candidate in self.availability.free(self.now, request)]
            if free or suspects:
                assert usable == (free or suspects)
            else:
                assert len(usable) == 1 and until[usable[0]] == min(until.values())
        self.check_choice(request, free, suspects, list(until), refused)

    def is_inhibited(self, instance_id: int) -> bool:
        return self.now < self.inhibited.get(instance_id, (0.0, 0.0))[0]

    def check_choice(
        self, request: RouteRequest, free: list[int], suspects: list[int], inhibited: list[int], refused: list[int]
    ) -> None:
        """Never a busy or full one, never a refusal while somebody free has room."""
        groups = [free, refused] if free else [suspects, inhibited, refused]
        with_room = [{each.instance_id for each in self.candidates if each.has_room} & set(group) for group in groups]
        allowed = next((group for group in with_room if group), None)
        if allowed is None:
            with pytest.raises((Overloaded, Unavailable)):
                self.availability.choose(self.policy, self.now, request, Random(0))
        else:
            assert self.availability.choose(self.policy, self.now, request, Random(0)).instance_id in allowed
        if request is ANYWHERE:
            room = self.availability.room(self.now)
            assert room != 0 or not with_room[0], "where somebody is free, there is room"
            assert (self.availability.pressure(self.now) == "") == (room != 0)


class Counts(RuleBasedStateMachine):
    """Requests that begin and end in any order while instances come and go."""

    @initialize()
    def begin(self) -> None:
        self.occupancy = Occupancy()
        self.candidates: tuple[Candidate, ...] = ()
        self.running: list[Candidate] = []

    @rule(ids=st.lists(IDS, unique=True))
    def discovery(self, ids: list[int]) -> None:
        self.candidates = self.occupancy.update(dict.fromkeys(ids, "cpu"))

    @rule(data=st.data())
    def a_request_begins(self, data: st.DataObject) -> None:
        if self.candidates:
            candidate = data.draw(st.sampled_from(self.candidates))
            self.occupancy.acquire(candidate)
            self.running.append(candidate)

    @rule(data=st.data())
    def a_request_ends(self, data: st.DataObject) -> None:
        if self.running:
            candidate = self.running.pop(data.draw(st.integers(min_value=0, max_value=len(self.running) - 1)))
            self.occupancy.release(candidate)

    @rule()
    def somebody_releases_twice(self) -> None:
        idle = [candidate for candidate in self.candidates if candidate.load == 0]
        for candidate in idle:
            self.occupancy.release(candidate)

    @invariant()
    def counts_add_up(self) -> None:
        if hasattr(self, "running"):
            for candidate in (*self.candidates, *self.running):
                assert candidate.load == sum(candidate is other for other in self.running) >= 0
            assert self.occupancy.total == sum(candidate.load for candidate in self.candidates)


TestMarks = Marks.TestCase
TestMarks.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestCounts = Counts.TestCase
TestCounts.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@given(st.integers(min_value=1, max_value=8), st.randoms(use_true_random=False))
def test_least_loaded_keeps_loads_within_one(count: int, random: Random) -> None:
    occupancy = Occupancy()
    free = occupancy.update(dict.fromkeys(range(count), ""))
    for _ in range(50):
        occupancy.acquire(LeastLoaded().choose(free, ANYWHERE, random))
        loads = sorted(candidate.load for candidate in free)
        assert all(b - a <= 1 for a, b in pairwise(loads))
