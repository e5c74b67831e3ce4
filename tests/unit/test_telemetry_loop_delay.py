"""The delay of the event loop: what is measured, what counts as a stall."""

import asyncio

from stator.telemetry import LoopDelay, MetricSet
from stator.testing.frontend_kit import page_sample
from stator.testing.manual_clock import ManualClock


async def count_reaches(metrics: MetricSet, wanted: float) -> str:
    """The page, once so many delays were measured."""
    async with asyncio.timeout(10):
        while page_sample(page := metrics.exposition().decode(), "x_event_loop_delay_seconds_count") < wanted:
            await asyncio.sleep(0.001)
    return page


def between(page: str, more: str, most: str) -> float:
    """How many delays were longer than `more` and at most `most`."""
    name = "x_event_loop_delay_seconds_bucket"
    return page_sample(page, name, le=most) - page_sample(page, name, le=more)


async def test_a_sleep_that_takes_longer_is_a_delay_and_a_long_one_a_stall() -> None:
    metrics, clock = MetricSet(), ManualClock()
    delay = LoopDelay(metrics, clock, prefix="x")
    delay.start(asyncio.get_running_loop())
    clock.advance(0.052)
    page = await count_reaches(metrics, 1)
    assert between(page, "0.001", "0.005") == 1
    assert page_sample(page, "x_event_loop_stall_total") == 0
    clock.advance(0.250)
    page = await count_reaches(metrics, page_sample(page, "x_event_loop_delay_seconds_count") + 1)
    assert between(page, "0.1", "0.25") == 1
    assert page_sample(page, "x_event_loop_stall_total") == 1
    delay.stop()


async def test_stopping_stops_and_starting_again_goes_on() -> None:
    metrics, clock = MetricSet(), ManualClock()
    delay = LoopDelay(metrics, clock, prefix="x")
    delay.stop()
    for wanted in (1, 2):
        delay.start(asyncio.get_running_loop())
        await count_reaches(metrics, wanted)
        delay.stop()
        delay.stop()
        before = metrics.exposition()
        await asyncio.sleep(0.15)  # three times what a sleep takes
        assert metrics.exposition() == before
