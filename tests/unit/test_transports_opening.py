"""A wait for a connection ends with the request that needs it."""

import asyncio

import pytest

from stator.errors import Cancelled, ConnectFailed, Timeout
from stator.tasks import DeadlineWheel
from stator.testing.manual_clock import ManualClock
from stator.transports.inbox import UNLINKED, Inbox, Patience, PhaseLimits
from stator.transports.opening import while_wanted

pytestmark = pytest.mark.timeout(10)


def inbox_on(clock: ManualClock, **limits: float) -> tuple[Inbox, DeadlineWheel]:
    wheel = DeadlineWheel(asyncio.get_running_loop(), now=clock.monotonic)
    return Inbox(wheel=wheel, patience=Patience(PhaseLimits(**limits)), instance=7), wheel


async def test_what_is_done_in_time_is_done() -> None:
    inbox, _ = inbox_on(ManualClock())
    async with while_wanted(inbox):
        await asyncio.sleep(0)
    assert not inbox.ended
    assert inbox.link is UNLINKED
    inbox.kill()


async def test_its_own_errors_are_raised() -> None:
    inbox, _ = inbox_on(ManualClock())
    with pytest.raises(ConnectFailed):
        async with while_wanted(inbox):
            raise ConnectFailed("refused")
    assert inbox.link is UNLINKED
    inbox.kill()


@pytest.mark.parametrize("how", ["kill", "stop", "expire"])
async def test_the_end_of_the_request_ends_the_wait(how: str) -> None:
    clock = ManualClock()
    inbox, wheel = inbox_on(clock, connect=0.5)
    loop = asyncio.get_running_loop()
    match how:
        case "kill":
            loop.call_soon(inbox.kill)
        case "stop":
            loop.call_soon(inbox.stop)
        case _:
            loop.call_soon(clock.advance, 1.0, wheel)
    async with while_wanted(inbox):
        await asyncio.Event().wait()
    assert inbox.ended
    assert type(inbox.error) is {"kill": Cancelled, "stop": type(None), "expire": Timeout}[how]
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    await asyncio.sleep(0)


async def test_an_error_after_the_end_is_of_no_interest() -> None:
    inbox, _ = inbox_on(ManualClock())
    async with while_wanted(inbox):
        inbox.kill()
        raise ConnectFailed("refused")
    assert isinstance(inbox.error, Cancelled)


async def test_the_end_after_the_wait_harms_nobody() -> None:
    inbox, _ = inbox_on(ManualClock())
    async with while_wanted(inbox):
        link = inbox.link
    link.kill()
    link.stop()
    await asyncio.sleep(0)
    assert inbox.ended  # stopped before anything was sent


async def test_cancelling_goes_through() -> None:
    inbox, _ = inbox_on(ManualClock())

    async def waits() -> None:
        async with while_wanted(inbox):
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(waits())
        await asyncio.sleep(0)
        task.cancel()
    assert task.cancelled()
    assert not inbox.ended
    inbox.kill()
