"""Deadlines on the wheel: as `asyncio.timeout`, with progress that costs nothing."""

import asyncio

import pytest

from stator.frontend.limit import Limit
from stator.tasks import DeadlineWheel
from stator.testing.manual_clock import ManualClock


def wheel_on(clock: ManualClock) -> DeadlineWheel:
    return DeadlineWheel(asyncio.get_running_loop(), now=clock.monotonic)


async def test_the_block_is_cut_when_its_time_has_come() -> None:
    clock = ManualClock()
    wheel = wheel_on(clock)
    progress = [clock.monotonic() + 5]
    steps: list[str] = []

    async def work() -> None:
        with pytest.raises(TimeoutError), Limit(wheel, lambda: progress[0]):
            await asyncio.Event().wait()
        steps.append("cut")
        await asyncio.sleep(0)  # the cancellation is over
        steps.append("going on")

    async with asyncio.TaskGroup() as group:
        task = group.create_task(work())
        await asyncio.sleep(0)
        clock.advance(4.5, wheel)
        progress[0] += 5
        clock.advance(4.5, wheel)
        await asyncio.sleep(0)
        assert not steps
        clock.advance(2.0, wheel)
    assert steps == ["cut", "going on"]
    assert task.cancelling() == 0
    assert len(wheel) == 0
    wheel.close()


async def test_a_block_in_time_leaves_nothing() -> None:
    wheel = wheel_on(ManualClock())
    with Limit(wheel, lambda: 2000.0):
        await asyncio.sleep(0)
        assert len(wheel) == 1
    assert len(wheel) == 0
    with pytest.raises(ValueError), Limit(wheel, lambda: 2000.0):
        raise ValueError
    assert len(wheel) == 0
    wheel.close()


async def test_a_cancellation_from_elsewhere_stays_one() -> None:
    clock = ManualClock()
    wheel = wheel_on(clock)

    async def work() -> None:
        with Limit(wheel, lambda: 1001.0):
            await asyncio.Event().wait()

    task = asyncio.get_running_loop().create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    clock.advance(2.0, wheel)
    with pytest.raises(asyncio.CancelledError):
        await task
    wheel.close()
