"""A served endpoint's canary on a manual clock: what real answers and admission mean to it, and what it leaves behind."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stator.health import EndpointState, HealthConfig, SystemHealth
from stator.protocol.annotated import Annotated
from stator.protocol.envelope import IncomingRequest
from stator.protocol.ids import EndpointId
from stator.runtime.admission import Admission, AdmissionConfig
from stator.runtime.context import Context
from stator.runtime.meter import EndpointMeter, ProcessMeter
from stator.runtime.serving import Serving
from stator.runtime.wellbeing import Wellbeing
from stator.tasks import DeadlineWheel
from stator.telemetry import MetricsLevel
from stator.testing.manual_clock import ManualClock

pytestmark = pytest.mark.timeout(60)

READY, SICK = EndpointState.READY, EndpointState.SICK
CANARY = {"canary": True}
CONFIG = HealthConfig(canary=True, canary_wait=10.0, canary_timeout=3.0, canary_busy_limit=60.0)
WORST = 10 * 1.25 + 3 + 3
"""seconds until a fault is found: silence, noticed a quarter late, the time for an answer, and the wheel's second for each"""


class Untimed:
    """A loop for the wheel whose timers never fire: the test ticks."""

    def call_later(self, delay: float, callback: Callable[[], object]) -> "Untimed":
        return self

    def cancel(self) -> None: ...


class Heard:
    """A responder that takes everything."""

    def __init__(self) -> None:
        self.sent_items = 0
        self.sent_bytes = 0
        self.ended = False

    def wait(self) -> None: ...

    def start(self) -> None: ...

    def accept(self) -> None: ...

    def refuse(self, error: Exception) -> None:
        self.ended = True

    def send(self, item: Any) -> bool:
        self.sent_items += 1
        return True

    async def ready(self) -> None: ...

    def end(self, error: Exception | None = None) -> None:
        self.ended = True


class Bench:
    """A serving with its canary; time goes in steps of a second."""

    def __init__(self, *, slots: int = 10, queue: int = 10) -> None:
        self.answer = good
        self.probes = 0
        self.clock = ManualClock()
        self.wheel = DeadlineWheel(Untimed(), now=self.clock.monotonic, resolution=1.0)  # type: ignore[arg-type]  # all it uses
        self.root = MetricsLevel.runtime()
        self.admission = Admission(AdmissionConfig(slots=slots, queue=queue))
        process = ProcessMeter(self.root, self.admission, self.clock)
        endpoint = EndpointId("test", "backend", "generate")
        meter = EndpointMeter(process, endpoint, self.root)
        self.health = SystemHealth(clock=self.clock, canary=True)
        self.serving = Serving(self.generate, name=str(endpoint), admission=self.admission, meter=meter)
        self.told: list[bool] = []
        ids = count()
        self.wellbeing = Wellbeing(
            "generate",
            health=self.health,
            config=CONFIG,
            serving=self.serving,
            meter=process,
            wheel=self.wheel,
            new_id=lambda: f"probe {next(ids)}",
            changed=self.told.append,
        )

    def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        if request is CANARY:
            self.probes += 1
        return self.answer(request, context)

    def ask(self) -> Heard:
        responder = Heard()
        self.serving(IncomingRequest(id="r", body="real"), responder)
        return responder

    async def __aenter__(self) -> "Bench":
        self.wellbeing.start(CANARY, 1)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.wellbeing.aclose()
        await self.serving.aclose()
        assert len(self.wheel) == 0

    async def seconds(self, number: float) -> None:
        for _ in range(int(number)):
            self.clock.advance(1.0, self.wheel)
            for _ in range(6):
                await asyncio.sleep(0)

    @property
    def state(self) -> EndpointState | None:
        return self.health.state("generate")

    def shown(self, name: str, **labels: str) -> float:
        """All series of a metric that have these labels, together."""
        families = text_string_to_metric_families(self.root.exposition().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


async def good(request: Any, context: Context) -> AsyncIterator[Any]:
    yield "fine"


async def silent(request: Any, context: Context) -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield "never"


async def slow(request: Any, context: Context) -> AsyncIterator[Any]:
    """Goes on for ever, an item every few turns of the loop."""
    while True:
        yield "token"
        for _ in range(5):
            await asyncio.sleep(0)


async def error_items(request: Any, context: Context) -> AsyncIterator[Any]:
    yield Annotated(event="error", comment=["engine down"])


async def error_items_and_a_late_end(request: Any, context: Context) -> AsyncIterator[Any]:
    yield Annotated(event="error", comment=["engine down"])
    for _ in range(200):  # half a minute
        await asyncio.sleep(0)


async def raising(request: Any, context: Context) -> AsyncIterator[Any]:
    raise RuntimeError("engine down")
    yield


async def test_a_handler_that_begins_to_hang_is_found_in_time() -> None:
    async with Bench() as bench:
        for _ in range(5):
            bench.ask()
            await bench.seconds(7)
        assert (bench.probes, bench.state) == (0, READY)
        bench.answer = silent
        bench.ask()
        await bench.seconds(WORST)
        assert bench.state is SICK
        assert bench.told == [False, True]
        bench.answer = good
        await bench.seconds(WORST)
        assert bench.told == [False, True, False]


@pytest.mark.parametrize("answer", [error_items, error_items_and_a_late_end, raising])
async def test_errors_are_no_signs_of_life(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """However many requests there are: each of them gets an error."""
    async with Bench(slots=100) as bench:
        bench.ask()
        await bench.seconds(1)
        assert bench.state is READY
        bench.answer = answer
        for _ in range(int(WORST)):
            assert bench.ask()
            await bench.seconds(1)
        assert bench.state is SICK
        assert "engine down" in caplog.text
        bench.answer = good
        bench.ask()
        await bench.seconds(1)
        assert bench.state is READY, "a real answer is as good as a canary"


async def test_a_long_answer_keeps_the_canary_quiet() -> None:
    async with Bench() as bench:
        bench.answer = slow
        bench.ask()
        await bench.seconds(500)
        assert (bench.probes, bench.state) == (0, READY)


async def test_a_stream_that_stops_speaking_does_not() -> None:
    async with Bench() as bench:
        stuck = asyncio.Event()

        async def until(request: Any, context: Context) -> AsyncIterator[Any]:
            while not stuck.is_set():
                yield "token"
                await asyncio.sleep(0)
            await asyncio.Event().wait()

        bench.answer = until
        bench.ask()
        await bench.seconds(100)
        stuck.set()
        await bench.seconds(WORST)
        assert bench.state is SICK


async def test_late_while_admission_is_full_is_busy() -> None:
    async with Bench(slots=2, queue=1) as bench:
        await bench.seconds(12)
        assert bench.state is READY
        bench.answer = silent
        for _ in range(3):
            bench.ask()
        assert bench.admission.full
        await bench.seconds(50)
        assert bench.state is READY
        assert bench.shown("stator_canary_probes_total", outcome="busy") >= 3
        await bench.seconds(30)
        assert bench.state is SICK, "but not for ever"


async def test_the_canary_passes_admission_by_and_is_in_no_request_metric() -> None:
    async with Bench(slots=1, queue=0) as bench:
        bench.answer = silent
        bench.ask()
        await bench.seconds(1)
        bench.answer = good
        await bench.seconds(60)
        assert bench.probes >= 5
        assert bench.state is READY
        assert (bench.admission.running, bench.admission.queued) == (1, 0)
        assert bench.shown("dynamo_component_requests_total") == 1
        assert bench.shown("stator_requests_received_total") == 1
        assert bench.shown("dynamo_component_inflight_requests") == 1
        assert bench.shown("stator_canary_probes_total", outcome="healthy") == bench.probes


async def test_what_the_program_finds_counts_without_a_canary() -> None:
    bench = Bench()
    bench.health = SystemHealth(clock=bench.clock)
    told: list[bool] = []
    wellbeing = Wellbeing(
        "generate",
        health=bench.health,
        config=HealthConfig(),
        serving=bench.serving,
        meter=ProcessMeter(MetricsLevel.runtime(), bench.admission, bench.clock),
        wheel=bench.wheel,
        new_id=str,
        changed=told.append,
    )
    wellbeing.start(None, 1)
    bench.health.set_endpoint("generate", SICK, "the GPU is gone")
    bench.health.set_endpoint("generate", READY, "it is back")
    await wellbeing.aclose()
    assert told == [True, False]


async def test_ten_thousand_rounds_leave_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # pytest would keep each line
    answers = (good, silent, raising, error_items)
    async with Bench() as bench:

        async def rounds(number: int) -> None:
            end = bench.probes + number
            while bench.probes < end:
                bench.answer = answers[bench.probes % len(answers)]
                await bench.seconds(10)
            bench.told.clear()

        await rounds(100)
        gc.collect()
        objects, tasks, entries = len(gc.get_objects()), len(asyncio.all_tasks()), len(bench.wheel)
        await rounds(10_000)
        gc.collect()
        assert len(gc.get_objects()) - objects < 500
        assert len(bench.wheel) == entries == 2
        assert len(asyncio.all_tasks()) <= tasks + 1, "at most the probe that runs"
        assert bench.serving.inflight == bench.admission.running == 0
