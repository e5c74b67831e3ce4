"""A canary of an endpoint on a manual clock: what makes it sick, what keeps it quiet, what it leaves behind."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from stator.errors import Overloaded, StreamIncomplete
from stator.health import Activity, Canary, EndpointChange, EndpointState, HealthConfig, Probe, SystemHealth, canary_outcomes
from stator.protocol.annotated import Annotated
from stator.tasks import DeadlineWheel, Scope
from stator.telemetry import MetricSet
from stator.testing.manual_clock import ManualClock

pytestmark = pytest.mark.timeout(60)

PAYLOAD = {"token_ids": [1], "_HEALTH_CHECK": True}
CONFIG = HealthConfig(canary=True, canary_wait=10.0, canary_timeout=3.0, canary_busy_limit=60.0)
READY, SICK, STARTING = EndpointState.READY, EndpointState.SICK, EndpointState.STARTING


class Untimed:
    """A loop for the wheel whose timers never fire: the test ticks."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> "Untimed":
        return self

    def cancel(self) -> None: ...


class Bench:
    """An endpoint whose answer the test decides, its canary, and time in steps of a second."""

    def __init__(self, answer: Probe, **options: Any) -> None:
        self.answer = answer
        self.calls: list[tuple[Any, str]] = []
        self.clock = ManualClock()
        self.health = SystemHealth(clock=self.clock, canary=True)
        target = self.health.add("generate", payload=PAYLOAD)
        assert target is not None
        activity = self.health.activity("generate")
        assert activity is not None
        self.activity: Activity = activity
        self.changes: list[EndpointChange] = []
        self.health.subscribe(self.changes.append)
        self.wheel = DeadlineWheel(Untimed(), now=self.clock.monotonic, resolution=1.0)  # type: ignore[arg-type]  # all it uses
        self.scope = Scope("canaries", close_timeout=0.05)
        self.outcomes = canary_outcomes(MetricSet())
        options = {"config": CONFIG, "outcomes": self.outcomes, **options}
        self.canary = Canary(target, health=self.health, probe=self.probe, wheel=self.wheel, scope=self.scope, **options)

    def probe(self, payload: Any, context_id: str) -> AsyncIterator[Any]:
        self.calls.append((payload, context_id))
        return self.answer(payload, context_id)

    async def __aenter__(self) -> "Bench":
        self.canary.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.canary.stop()
        await self.scope.aclose()
        self.wheel.close()

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    async def seconds(self, count: int) -> None:
        for _ in range(count):
            self.clock.advance(1.0, self.wheel)
            if self.scope:
                await self.settle()

    @property
    def state(self) -> EndpointState | None:
        return self.health.state("generate")

    def counted(self) -> dict[str, float]:
        return {outcome: counter.value for (_, outcome), counter in self.outcomes.series()}


async def good(payload: Any, context_id: str) -> AsyncIterator[Any]:
    yield {"token_ids": [5]}
    await asyncio.sleep(0)
    yield {"token_ids": [], "finish_reason": "length"}


async def hanging(payload: Any, context_id: str) -> AsyncIterator[Any]:
    yield {"token_ids": [5]}
    await asyncio.Event().wait()


async def raising(payload: Any, context_id: str) -> AsyncIterator[Any]:
    yield {"token_ids": [5]}
    raise RuntimeError("engine down")


async def cut(payload: Any, context_id: str) -> AsyncIterator[Any]:
    yield {"token_ids": [5]}
    raise StreamIncomplete("no sentinel")


async def error_item(payload: Any, context_id: str) -> AsyncIterator[Any]:
    yield {"token_ids": [5]}
    yield Annotated(event="error", comment=["engine down"])


async def empty(payload: Any, context_id: str) -> AsyncIterator[Any]:
    return
    yield


async def endless(payload: Any, context_id: str) -> AsyncIterator[Any]:
    while True:
        yield {"token_ids": [5]}


async def leaving(payload: Any, context_id: str) -> AsyncIterator[Any]:
    raise SystemExit(3)
    yield


async def cancelling(payload: Any, context_id: str) -> AsyncIterator[Any]:
    raise asyncio.CancelledError
    yield


async def full(payload: Any, context_id: str) -> AsyncIterator[Any]:
    raise Overloaded("8 of 8 slots taken")
    yield


def refusing(payload: Any, context_id: str) -> AsyncIterator[Any]:
    raise ValueError("not a request")


async def test_a_silent_endpoint_is_probed_with_its_payload_and_becomes_ready() -> None:
    async with Bench(good) as bench:
        await bench.seconds(10)
        assert bench.calls == []
        assert bench.state is STARTING
        await bench.seconds(1)
        assert [payload for payload, _ in bench.calls] == [PAYLOAD]
        assert bench.state is READY
        assert bench.health.ready
        await bench.seconds(10)
        assert len({context_id for _, context_id in bench.calls}) == 2, "each probe is a request of its own"
        assert bench.counted() == {"healthy": 2}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (raising, "engine down"),
        (cut, "StreamIncomplete"),
        (error_item, "error item: engine down"),
        (empty, "without an item"),
        (endless, "no end"),
        (leaving, "SystemExit"),
        (cancelling, "cancelled itself"),
        (refusing, "not a request"),
    ],
)
async def test_an_answer_that_is_not_whole_and_good_is_sick(answer: Probe, reason: str) -> None:
    async with Bench(good) as bench:
        await bench.seconds(11)
        bench.answer = answer
        await bench.seconds(10)
        assert bench.state is SICK
        assert reason in bench.changes[-1].reason
        bench.answer = good
        await bench.seconds(10)
        assert [change.state for change in bench.changes] == [READY, SICK, READY]


async def test_a_handler_that_hangs_is_sick_within_wait_and_timeout() -> None:
    closed: list[bool] = []

    async def stuck(payload: Any, context_id: str) -> AsyncIterator[Any]:
        try:
            async for item in hanging(payload, context_id):
                yield item
        finally:
            closed.append(True)

    async with Bench(stuck) as bench:
        await bench.seconds(14)  # 10 + 3, and the wheel's second for each of the two
        assert bench.state is STARTING
        assert bench.canary.probing
        await bench.seconds(1)
        assert bench.state is SICK
        assert "within 3.0 s" in bench.changes[0].reason
        assert closed == [True]
        assert not bench.canary.probing
        assert len(bench.scope) == 0


async def test_a_probe_that_ignores_its_cancellation_is_the_only_one() -> None:
    release = asyncio.Event()

    async def stubborn(payload: Any, context_id: str) -> AsyncIterator[Any]:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        yield {"late": True}

    async with Bench(stubborn) as bench:
        await bench.seconds(200)
        assert bench.state is SICK
        assert len(bench.calls) == len(bench.scope) == 1
        release.set()
        await bench.settle()
        assert bench.state is SICK, "what comes late does not count"
        bench.answer = good
        await bench.seconds(2)
        assert len(bench.calls) == 2
        assert bench.state is READY


async def test_real_answers_keep_the_canary_quiet_and_errors_do_not() -> None:
    async with Bench(good) as bench:
        for _ in range(50):
            await bench.seconds(9)
            bench.activity.note()
        assert bench.calls == []
        assert bench.state is READY
        await bench.seconds(11)
        assert len(bench.calls) == 1


async def test_a_real_answer_during_a_probe_outruns_its_failure() -> None:
    async with Bench(hanging) as bench:
        await bench.seconds(12)
        bench.activity.note()
        await bench.seconds(4)
        assert bench.state is READY
        assert bench.counted() == {"outrun": 1}


async def test_late_while_full_is_busy_until_nobody_is_answered_any_more() -> None:
    async with Bench(good, busy=lambda: True) as bench:
        await bench.seconds(11)
        bench.answer = hanging
        await bench.seconds(58)
        assert bench.state is READY
        assert bench.counted()["busy"] == 5
        await bench.seconds(14)
        assert bench.state is SICK


async def test_refused_as_overloaded_is_busy_and_an_error_while_full_is_not() -> None:
    async with Bench(good) as bench:
        await bench.seconds(11)
        bench.answer = full
        await bench.seconds(20)
        assert bench.state is READY
        assert bench.counted() == {"healthy": 1, "busy": 2}
    async with Bench(raising, busy=lambda: True) as bench:
        await bench.seconds(11)
        assert bench.state is SICK


async def test_who_cannot_tell_whether_it_is_busy_is_not(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> bool:
        raise ValueError("mine")

    async with Bench(hanging, busy=broken) as bench:
        await bench.seconds(15)
        assert bench.state is SICK
    assert "whether generate is busy" in caplog.text


async def test_items_may_be_judged_by_the_owner() -> None:
    def no_tokens(item: Any) -> str:
        return "" if item["token_ids"] else "no tokens"

    async with Bench(good, problem_of=no_tokens) as bench:
        await bench.seconds(11)
        assert bench.changes[0].reason == "canary: no tokens"


async def test_stopping_ends_a_running_probe_and_says_nothing() -> None:
    async with Bench(hanging) as bench:
        await bench.seconds(12)
        assert bench.canary.probing
        bench.canary.stop()
        bench.canary.stop()
        assert len(bench.wheel) == 0
        await bench.settle()
        assert len(bench.scope) == 0
        await bench.seconds(50)
        assert (len(bench.calls), bench.changes, len(bench.wheel)) == (1, [], 0)


async def test_an_endpoint_that_was_removed_is_not_brought_back() -> None:
    async with Bench(good) as bench:
        bench.health.remove("generate")
        await bench.seconds(11)
        assert len(bench.calls) == 1
        assert bench.state is None


async def test_a_closed_scope_ends_the_canary(caplog: pytest.LogCaptureFixture) -> None:
    async with Bench(hanging) as bench:
        await bench.seconds(11)
        await bench.scope.aclose()
        await bench.seconds(50)
        assert (len(bench.calls), bench.changes, len(bench.wheel)) == (1, [], 0)
    assert caplog.text == ""


async def test_ten_thousand_rounds_are_exact_and_leave_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "stator.health")  # pytest would keep each line
    answers: tuple[Probe, ...] = (good, hanging, raising, error_item)
    begun: list[float] = []

    def turns(payload: Any, context_id: str) -> AsyncIterator[Any]:
        begun.append(bench.clock.monotonic())
        return answers[len(begun) % len(answers)](payload, context_id)

    async with Bench(turns) as bench:
        await bench.seconds(205)
        bench.changes.clear()
        gc.collect()
        objects = len(gc.get_objects())
        tasks = len(asyncio.all_tasks())
        rounds = len(begun)
        for _ in range(10_000):
            await bench.seconds(10)
            bench.changes.clear()
        await bench.seconds(5)
        assert len(begun) - rounds == 10_000
        assert begun == [1011 + 10 * n for n in range(len(begun))]
        bench.calls.clear()
        gc.collect()
        assert len(gc.get_objects()) - objects < 500
        assert len(asyncio.all_tasks()) == tasks
        assert (len(bench.scope), len(bench.wheel)) == (0, 1)
        assert sum(bench.counted().values()) == len(begun)
        assert bench.counted()["healthy"] == pytest.approx(len(begun) / 4, abs=1)
    assert len(bench.wheel) == 0


def test_the_default_judge_of_items() -> None:
    judge: Callable[[Any], str] = Canary.__init__.__kwdefaults__["problem_of"]
    assert judge(Annotated(event="error")) == "error item: no message"
    assert judge(Annotated(data=1, event="progress")) == ""
    assert judge({"event": "error"}) == "", "data of the handler's, as the reference takes it"
