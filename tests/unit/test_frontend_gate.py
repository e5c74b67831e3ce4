"""The queue in real life: it hears of places, keeps time, and wakes whom it must. Decided on a manual clock."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from stator.errors import StatorError, Unavailable
from stator.frontend.admission_limits import AdmissionLimits
from stator.frontend.admission_metrics import AdmissionMetrics
from stator.frontend.admissions import Admissions
from stator.frontend.caller import Caller
from stator.frontend.gate import Admission
from stator.frontend.permit import Priority
from stator.llm.served import ServedModel
from stator.tasks import DeadlineWheel
from stator.telemetry import MetricSet
from stator.testing.fake_models import FakeEngine, FakeModels
from stator.testing.frontend_kit import page_sample
from stator.testing.manual_clock import ManualClock

pytestmark = pytest.mark.timeout(20)

ANYBODY = Caller("", Priority.NORMAL)


class Refused(StatorError):
    """What the frontend would answer."""


class Bench:
    """A frontend's gates over one fake engine."""

    def __init__(self, places: int | None, limits: AdmissionLimits) -> None:
        self.clock = ManualClock()
        self.wheel = DeadlineWheel(asyncio.get_running_loop(), now=self.clock.monotonic)
        self.models = FakeModels()
        self.engine = self.models.add("m", FakeEngine(places=places))
        self.page = MetricSet()
        self.admissions = Admissions(
            limits,
            metrics=AdmissionMetrics(self.page),
            now=self.clock.monotonic,
            wheel=lambda: self.wheel,
            refuse=lambda model, text, wait: Refused(f"{model}: {text} / {wait:g}"),
        )

    @property
    def served(self) -> ServedModel:
        served = self.models.get("m")
        assert served is not None
        return served

    def enter(self, calls: int = 1) -> Admission:
        return self.admissions.enter(self.served, ANYBODY, calls=calls)

    def run(self, calls: int = 1) -> Admission:
        """A request whose calls run at workers."""
        admission = self.enter(calls)
        for index in range(calls):
            self.route(admission, index)
        return admission

    def route(self, admission: Admission, index: int = 0) -> None:
        assert is_granted(admission, index)
        admission.routed(index)
        self.engine.running += 1

    def leave_worker(self) -> None:
        """A call ends at its worker; nobody is told."""
        self.engine.running -= 1

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds, self.wheel)

    def sample(self, name: str, **labels: str) -> float:
        self.admissions.show()
        return page_sample(self.page.exposition().decode(), name, model="m", **labels)


def is_granted(admission: Admission, index: int = 0) -> bool:
    """Whether a call may be made without any waiting."""
    turn = admission.turn(index)
    try:
        turn.send(None)
    except StopIteration:
        return True
    turn.close()
    return False


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench(2, AdmissionLimits())
    yield bench
    bench.admissions.aclose()
    bench.wheel.close()


async def turns(number: int = 3) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_with_room_nothing_is_awaited_armed_or_subscribed(bench: Bench) -> None:
    admission = bench.run()
    assert len(bench.wheel) == 0
    assert bench.engine.listeners == []
    assert admission.waited == 0.0
    admission.close()
    admission.close()


async def test_the_end_of_a_call_wakes_the_next(bench: Bench) -> None:
    first, _ = bench.run(), bench.run()
    waits = bench.enter()
    turn = asyncio.ensure_future(waits.turn(0))
    await turns()
    assert not turn.done()
    assert bench.sample("stator_frontend_waiting_calls", priority="normal") == 1
    bench.pass_time(0.25)
    bench.leave_worker()
    first.ended(0)
    await turns()
    assert turn.done()
    assert waits.waited == pytest.approx(0.25)
    assert bench.sample("stator_frontend_waiting_calls", priority="normal") == 0
    assert bench.sample("stator_frontend_queue_wait_seconds_count", priority="normal") == 1
    assert bench.sample("stator_frontend_queue_wait_seconds_sum", priority="normal") == pytest.approx(0.25)


async def test_the_engine_wakes_who_waits_and_is_listened_to_only_then(bench: Bench) -> None:
    bench.run(2)
    turn = asyncio.ensure_future(bench.enter().turn(0))
    await turns()
    assert len(bench.engine.listeners) == 1
    bench.engine.resize(3)
    await turns()
    assert turn.done()
    bench.pass_time(0.3)
    assert bench.engine.listeners == []
    assert len(bench.wheel) == 0


async def test_a_place_nobody_tells_of_is_found_soon(bench: Bench) -> None:
    bench.run(2)
    turn = asyncio.ensure_future(bench.enter().turn(0))
    await turns()
    bench.leave_worker()
    bench.pass_time(0.25)
    await turns()
    assert turn.done()


async def test_who_waits_too_long_is_refused_and_told_what_it_was() -> None:
    bench = Bench(1, AdmissionLimits(timeout=3.0))
    bench.run()
    waits = bench.enter()
    turn = asyncio.ensure_future(waits.turn(0))
    await turns()
    bench.pass_time(2.5)
    await turns()
    assert not turn.done()
    bench.pass_time(0.8)
    with pytest.raises(Refused, match=r"m: 1 of 1 places taken; .*http.queue_timeout = 3 s"):
        await turn
    assert bench.sample("stator_frontend_refusals_total", reason="timeout") == 1
    assert bench.sample("stator_frontend_waiting_calls", priority="normal") == 0
    waits.close()
    bench.admissions.aclose()
    bench.wheel.close()


async def test_who_leaves_gives_its_place_to_the_next_even_in_the_turn_it_got_it(bench: Bench) -> None:
    first, _ = bench.run(), bench.run()
    leaves, stays = bench.enter(), bench.enter()
    leaving = asyncio.ensure_future(leaves.turn(0))
    staying = asyncio.ensure_future(stays.turn(0))
    await turns()
    bench.leave_worker()
    first.ended(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    leaves.close()
    await turns()
    assert staying.done()


async def test_waiting_requests_fail_when_the_last_worker_leaves(bench: Bench) -> None:
    bench.run(2)
    turn = asyncio.ensure_future(bench.enter().turn(0))
    await turns()
    bench.models.remove("m")
    bench.pass_time(0.25)
    await turns()
    with pytest.raises(Unavailable, match="'m'"):
        await turn


async def test_without_a_worker_the_engine_says_what_there_is_to_say(bench: Bench) -> None:
    bench.engine.resize(0)
    gone = bench.models.add("gone", FakeEngine(places=0), instances=[])
    admission = bench.admissions.enter(bench.models.get("gone"), ANYBODY, calls=1)  # type: ignore[arg-type]  # it is there
    assert is_granted(admission)
    assert gone.listeners == []


async def test_draining_refuses_who_waits_and_who_would_have_to(bench: Bench) -> None:
    bench.run()
    many = bench.enter(2)
    bench.route(many)
    turn = asyncio.ensure_future(bench.enter().turn(0))
    rest = asyncio.ensure_future(many.turn(1))
    await turns()
    bench.admissions.dismiss(lambda: Unavailable("draining"))
    with pytest.raises(Unavailable, match="draining"):
        await turn
    with pytest.raises(Unavailable, match="draining"):
        bench.enter()
    assert not rest.done(), "it belongs to a request that runs"
    bench.engine.resize(3)
    await turns()
    assert rest.done()
    bench.engine.resize(9)
    assert is_granted(bench.enter()), "there is room"


async def test_a_call_that_a_worker_refused_has_another_turn(bench: Bench) -> None:
    admission = bench.enter()
    for _ in range(3):
        await asyncio.wait_for(admission.turn(0), 1)
        assert admission.returned(0)
        assert not is_granted(admission)
        bench.pass_time(0.2)
    assert not admission.returned(0)
    assert "a worker refused it" in str(admission.refused_by_worker())
    assert bench.sample("stator_frontend_refusals_total", reason="worker") == 1


async def test_without_a_queue_everybody_may_pass_and_workers_refuse() -> None:
    bench = Bench(1, AdmissionLimits(depth=0))
    admissions = [bench.enter() for _ in range(5)]
    assert all(is_granted(admission) for admission in admissions)
    assert not admissions[0].returned(0)
    assert len(bench.wheel) == 0


async def test_refusals_are_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(1, AdmissionLimits())
    bench.run()
    for _ in range(40):
        try:
            bench.enter()
        except Refused as error:
            assert "1 of 1 places taken" in str(error)
    lines = [record.message for record in caplog.records if "requests refused" in record.message]
    assert len(lines) == 1
    bench.pass_time(11.0)
    for _ in range(40):
        try:
            bench.enter()
        except Refused:
            continue
    lines = [record.message for record in caplog.records if "requests refused" in record.message]
    assert len(lines) > 1
    assert sum(int(line.split(": ")[1].split()[0]) for line in lines) > 20
    bench.admissions.aclose()
    bench.wheel.close()


async def test_gates_of_engines_that_are_gone_are_dropped(bench: Bench) -> None:
    bench.run()
    for _ in range(5):
        bench.models.add("other", FakeEngine())
        served = bench.models.get("other")
        assert served is not None
        bench.admissions.enter(served, ANYBODY, calls=1).close()
        bench.models.remove("other")
    assert len(bench.admissions) == 2, "the one that runs, and the last one"
