"""Who goes on, who waits and who is refused, case by case; the property tests have the rest."""

import pytest

from stator.frontend.admission import AdmissionQueue
from stator.frontend.admission_limits import AdmissionLimits
from stator.frontend.permit import Permit, PermitState, Priority
from stator.frontend.refusal import Refusal


class Stream:
    instance_id = 7


class Bench:
    """A queue before so many places; calls are routed as soon as they are let in, and take `seconds`."""

    def __init__(self, places: int | None, *, seconds: float = 1.0, known: bool = True, **limits: float) -> None:
        self.queue = AdmissionQueue(AdmissionLimits(**limits))  # type: ignore[arg-type]  # depth, ageing and tenants are whole
        self.places = places
        self.now = 100.0
        self.running: list[Permit] = []
        self.waiting: list[Permit] = []
        if known:
            self.learn(seconds)

    def learn(self, seconds: float) -> None:
        """Calls took so long lately."""
        for _ in range(400):
            self.queue.rate.ended(seconds, self.now)

    @property
    def room(self) -> int | None:
        return None if self.places is None else self.places - len(self.running)

    def ask(self, tenant: str = "", priority: Priority = Priority.NORMAL, calls: int = 1) -> list[Permit] | Refusal:
        outcome = self.queue.offer(self.now, self.room, tenant=tenant, priority=priority, calls=calls)
        if isinstance(outcome, list):
            self.waiting += outcome
            self.route()
        return outcome

    def must(self, tenant: str = "", priority: Priority = Priority.NORMAL, calls: int = 1) -> list[Permit]:
        outcome = self.ask(tenant, priority, calls)
        assert isinstance(outcome, list), outcome
        return outcome

    def stand(self, tenant: str = "") -> Refusal:
        """Time passes and the queue becomes longer, until somebody is refused."""
        for _ in range(20):
            self.now += 0.025
            if isinstance(outcome := self.ask(tenant), Refusal):
                return outcome
        raise AssertionError("nobody was refused")

    def refused(self, tenant: str = "", priority: Priority = Priority.NORMAL, calls: int = 1) -> Refusal:
        outcome = self.ask(tenant, priority, calls)
        assert isinstance(outcome, Refusal)
        return outcome

    def route(self) -> list[Permit]:
        """Send what was let in; what that was."""
        let_in = [permit for permit in self.waiting if permit.state is PermitState.GRANTED]
        for permit in let_in:
            permit.stream = Stream()
            self.queue.routed(permit)
        self.running += let_in
        self.waiting = [permit for permit in self.waiting if permit.state is PermitState.WAITING]
        return let_in

    def end(self, permit: Permit | None = None) -> list[Permit]:
        """A call ends; who is let in."""
        permit = permit or self.running[0]
        self.running.remove(permit)
        self.queue.end(permit, self.now)
        self.queue.pump(self.now, self.room)
        return self.route()

    def tick(self, seconds: float) -> list[Permit]:
        self.now += seconds
        late = self.queue.tick(self.now, self.room)
        self.route()
        return late


# -- places


def test_without_a_limit_nobody_waits() -> None:
    bench = Bench(None)
    for _ in range(1000):
        bench.must(calls=3)
    assert (bench.queue.waiting, bench.queue.running) == (0, 3000)


def test_calls_on_their_way_count_against_the_room_once() -> None:
    queue = AdmissionQueue(AdmissionLimits())
    first = queue.offer(0.0, 2)
    second = queue.offer(0.0, 2)
    third = queue.offer(0.0, 2)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert isinstance(third, list)
    states = [permits[0].state for permits in (first, second, third)]
    assert states == [PermitState.GRANTED, PermitState.GRANTED, PermitState.WAITING], "room() cannot know of them yet"
    first[0].stream = Stream()  # a worker was chosen: room() says 1 from now on
    assert queue.free(0.0, 1) == 0
    queue.routed(first[0])
    assert queue.free(0.0, 1) == 0
    first[0].stream = None
    assert queue.free(0.0, 1) == 0, "it was routed: the worker's load has it"


def test_a_call_that_looks_for_another_worker_counts_again() -> None:
    queue = AdmissionQueue(AdmissionLimits())
    (permit,) = queue.offer(0.0, 2)  # type: ignore[misc]  # there is room
    stream = permit.stream = Stream()
    assert queue.free(0.0, 1) == 1
    stream.instance_id = 0
    assert queue.free(0.0, 2) == 1


def test_a_request_of_several_calls_begins_with_those_that_fit() -> None:
    bench = Bench(3)
    permits = bench.must(calls=8)
    assert [permit.state for permit in permits] == [PermitState.ROUTED] * 3 + [PermitState.WAITING] * 5
    assert bench.end() == [permits[3]]
    assert bench.end() == [permits[4]]


def test_a_free_place_nobody_told_of_is_found_by_the_next_request() -> None:
    bench = Bench(1)
    bench.must()
    (waits,) = bench.must()
    bench.places = 3
    (comes,) = bench.must()
    assert (waits.state, comes.state) == (PermitState.ROUTED, PermitState.ROUTED)
    assert bench.queue.waiting == 0


def test_who_goes_away_frees_its_place_whatever_it_did() -> None:
    bench = Bench(1)
    (runs,) = bench.must()
    (gives_up,) = bench.must()
    (stays,) = bench.must()
    bench.queue.end(gives_up, bench.now)
    bench.queue.end(gives_up, bench.now)
    assert bench.queue.waiting == 1
    assert bench.end(runs) == [stays]
    bench.end()
    assert (bench.queue.waiting, bench.queue.running, bench.queue.free(bench.now, 1)) == (0, 0, 1)


# -- order


def test_higher_classes_go_first_and_lower_ones_in_a_while() -> None:
    bench = Bench(1, seconds=0.01, wait=0, target=0, ageing=4)
    bench.must()
    low = bench.must(priority=Priority.LOW)[0]
    normal = bench.must(priority=Priority.NORMAL)[0]
    for _ in range(9):
        bench.must(priority=Priority.HIGH)
    order = [bench.end()[0].group.priority.label for _ in range(11)]
    assert order[:4] == ["high"] * 4
    assert order.index("normal") <= 6
    assert order.index("low") <= 6
    assert (low.state, normal.state) == (PermitState.OVER, PermitState.OVER)


def test_without_ageing_a_lower_class_waits_for_all_others() -> None:
    bench = Bench(1, seconds=0.01, wait=0, target=0, ageing=0)
    bench.must()
    bench.must(priority=Priority.LOW)
    for _ in range(30):
        bench.must(priority=Priority.HIGH)
    order = [bench.end()[0].group.priority for _ in range(31)]
    assert order == [Priority.HIGH] * 30 + [Priority.LOW]


def test_a_lower_class_is_not_shut_out_at_the_door_either() -> None:
    """A class above it that is always full must not make its wait look endless."""
    bench = Bench(64, ageing=8)
    for _ in range(64):
        bench.must(priority=Priority.HIGH)
    while not isinstance(bench.ask(priority=Priority.HIGH), Refusal):
        pass
    assert bench.must(priority=Priority.LOW)[0].state is PermitState.WAITING


# -- refusing


def test_a_burst_waits_and_what_would_wait_too_long_is_refused_at_once() -> None:
    bench = Bench(64, seconds=1.0, wait=0.5)
    for _ in range(64):
        bench.must()
    taken = 0
    while isinstance(outcome := bench.ask(), list):
        taken += 1
    assert 31 <= taken <= 33, "half a second at 64 places a second"
    assert outcome.reason == "wait"
    assert outcome.wait == pytest.approx(0.5, rel=0.1)
    assert "0.5 s" in outcome.text(bench.queue.limits)


def test_of_a_queue_that_stands_only_the_first_places_are_given() -> None:
    bench = Bench(64, seconds=1.0, wait=0.5, target=0.02, burst=0.1)
    for _ in range(64 + 10):
        bench.must()
    assert bench.stand().reason == "overload"
    assert 0.15 < bench.now - 100.0 < 0.25
    while bench.queue.waiting:
        bench.end()
    bench.learn(1.0)
    while bench.queue.free(bench.now, bench.room):
        bench.must()
    assert bench.must()[0].state is PermitState.WAITING, "one may wait, so that no place stays empty"
    assert bench.refused().reason == "overload", "it is not over yet"
    bench.now += 0.6
    bench.end()
    assert bench.must(), "nobody was refused for half a second"
    assert bench.must(), "so that a burst may come again"


def test_a_tenant_within_its_share_is_not_refused_for_the_overload_of_another() -> None:
    bench = Bench(64, seconds=1.0)
    bench.must("quiet")
    for _ in range(63 + 10):
        bench.must("loud")
    assert bench.stand("loud").reason == "overload"
    (quiet,) = bench.must("quiet")
    assert bench.end() == [quiet], "and is next"


def test_one_tenant_cannot_fill_the_queue() -> None:
    bench = Bench(1, wait=0, target=0, depth=10, timeout=1e9)
    bench.must()
    for _ in range(5):
        bench.must("loud")
    refusal = bench.refused("loud")
    assert (refusal.reason, refusal.waiting, refusal.held) == ("queue", 5, 5)
    assert "http.queue = 10" in refusal.text(bench.queue.limits)
    for _ in range(3):
        bench.must("other")
    assert bench.refused("other").reason == "queue"
    bench.must("third")


def test_the_queue_is_bounded() -> None:
    bench = Bench(1, wait=0, target=0, depth=10, timeout=1e9)
    bench.must()
    for number in range(10):
        bench.must(str(number))
    assert bench.refused("x").reason == "queue"
    assert bench.queue.waiting == 10
    assert bench.must(priority=Priority.HIGH), "each class has its own"


def test_before_anything_is_known_few_may_wait() -> None:
    bench = Bench(64, known=False)
    for _ in range(64 + 16):
        bench.must()
    refusal = bench.refused()
    assert (refusal.reason, refusal.wait) == ("wait", 0.0)
    assert "unknown" in refusal.text(bench.queue.limits)


def test_slow_workers_have_a_queue_too() -> None:
    bench = Bench(2, seconds=4.0, timeout=10.0)
    bench.must()
    bench.must()
    for _ in range(4):
        bench.must()
    refusal = bench.refused()
    assert (refusal.reason, refusal.wait) == ("wait", 10.0)


def test_nobody_waits_for_what_cannot_come_in_time() -> None:
    bench = Bench(2, seconds=12.0, timeout=10.0)
    bench.must()
    bench.must()
    bench.must()
    refusal = bench.refused()
    assert (refusal.reason, refusal.wait) == ("timeout", 12.0)


def test_where_all_are_busy_with_others_a_few_wait_for_news() -> None:
    bench = Bench(0)
    for _ in range(4):
        bench.must()
    assert bench.refused().reason == "wait"
    bench.places = 3
    bench.tick(0.1)
    assert len(bench.running) == 3


def test_who_waited_too_long_is_told() -> None:
    bench = Bench(1, known=False, timeout=10.0)
    bench.must()
    (waits,) = bench.must()
    assert bench.tick(9.9) == []
    (later,) = bench.must()
    assert bench.tick(0.2) == [waits]
    assert waits.state is PermitState.OVER
    assert bench.end() == [later]


def test_calls_of_a_request_that_has_begun_are_not_refused_for_waiting() -> None:
    bench = Bench(1, known=False, timeout=10.0)
    _, second = bench.must(calls=2)
    assert bench.tick(60.0) == []
    assert second.state is PermitState.WAITING
    assert bench.tick(250.0) == [second], "but not for ever"


# -- workers that refuse what was let in


def test_what_a_worker_refused_waits_again_before_the_others() -> None:
    bench = Bench(None)
    (runs,) = bench.must()
    queue = bench.queue
    (permit,) = queue.offer(bench.now, None)  # type: ignore[misc]  # there is no limit
    assert queue.returned(permit, bench.now)
    (comes,) = queue.offer(bench.now, None)  # type: ignore[misc]
    assert (permit.state, comes.state) == (PermitState.WAITING, PermitState.WAITING), "no more fit than run now"
    bench.waiting += [permit, comes]
    assert bench.end(runs) == [permit]


def test_where_nothing_runs_it_is_tried_again_with_the_next_tick() -> None:
    queue = AdmissionQueue(AdmissionLimits())
    (permit,) = queue.offer(0.0, None)  # type: ignore[misc]
    assert queue.returned(permit, 0.0)
    assert queue.pump(0.0, None) == 0
    queue.tick(0.1, None)
    assert permit.state is PermitState.GRANTED


def test_it_is_not_tried_for_ever() -> None:
    queue = AdmissionQueue(AdmissionLimits(timeout=10.0))
    (permit,) = queue.offer(0.0, None)  # type: ignore[misc]
    tries = 0
    while queue.returned(permit, 0.1 * tries):
        tries += 1
        queue.tick(0.1 * tries, None)
    assert tries == 3
    (late,) = queue.offer(0.0, None)  # type: ignore[misc]
    queue.tick(5.0, None)
    assert not queue.returned(late, 10.0)


def test_what_a_worker_said_is_forgotten_after_a_while() -> None:
    bench = Bench(None)
    queue = bench.queue
    bench.must()
    (permit,) = queue.offer(bench.now, None)  # type: ignore[misc]
    assert queue.returned(permit, bench.now)
    assert queue.free(bench.now, None) == 0
    assert queue.free(bench.now + 2.1, None) is None


def test_dismissing_spares_what_has_begun_unless_told_otherwise() -> None:
    bench = Bench(1, known=False)
    _, more = bench.must(calls=2)
    (waits,) = bench.must()
    assert bench.queue.dismiss(begun=False) == [waits]
    assert bench.queue.dismiss(begun=True) == [more]
    assert bench.queue.waiting == 0
