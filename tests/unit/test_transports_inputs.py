"""Both ends of a conversation's inputs on a manual clock: limits, waiting, ends."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from stator.errors import Cancelled, ConfigError, EngineError, Timeout, UsageError
from stator.protocol.stream import Phase
from stator.tasks import DeadlineWheel
from stator.testing.manual_clock import ManualClock
from stator.transports.inbox import UNLINKED, Patience, PhaseLimits
from stator.transports.inputs import UNSENT, DuplexInbox, InputStream

SLACK = 0.21
"""seconds a wheel may be late"""


class Time:
    """A wheel on a manual clock."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.wheel = DeadlineWheel(asyncio.get_running_loop(), now=self.clock.monotonic)

    async def pass_(self, seconds: float) -> None:
        """Let time pass in steps of the wheel."""
        end = self.clock.monotonic() + seconds
        while self.clock.monotonic() < end - 1e-9:
            self.clock.advance(min(0.1, end - self.clock.monotonic()))
            self.wheel.tick()
            await asyncio.sleep(0)


class Sender:
    """A plane's sender that gives leave when told so."""

    def __init__(self) -> None:
        self.over = False
        self.leave = asyncio.Event()
        self.closed = 0

    def send(self, item: Any) -> bool:
        return False

    async def ready(self) -> None:
        await self.leave.wait()

    def end(self) -> None:
        self.over = True

    def close(self) -> None:
        self.over = True
        self.closed += 1
        self.leave.set()


class Link:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def stop(self) -> None:
        self.asked.append("stop")

    def kill(self) -> None:
        self.asked.append("kill")

    def taken(self) -> None:
        self.asked.append("taken")


def duplex(time: Time, **limits: float | None) -> tuple[DuplexInbox, Sender, Link]:
    inbox = DuplexInbox(wheel=time.wheel, patience=Patience(PhaseLimits(**limits)), instance=7)
    inbox.sender = sender = Sender()
    inbox.link = link = Link()
    inbox.accept()
    return inbox, sender, link


async def running(work: Awaitable[Any]) -> asyncio.Task[Any]:
    """A task that has had its first turns."""
    task = asyncio.ensure_future(work)
    for _ in range(3):
        await asyncio.sleep(0)
    return task  # type: ignore[return-value]


# -- the caller's end


async def test_before_a_plane_took_it_and_after_its_end_nothing_is_sent() -> None:
    time = Time()
    inbox = DuplexInbox(wheel=time.wheel, patience=Patience(PhaseLimits()))
    assert inbox.sender is UNSENT
    assert inbox.sender.over
    await inbox.ready()
    assert not inbox.sender.send(1)
    inbox.finish()
    assert len(time.wheel) == 0


@pytest.mark.parametrize("how", ["finish", "error", "cut", "kill", "fail"])
async def test_every_end_closes_the_sender_once_and_wakes_who_waits(how: str) -> None:
    time = Time()
    inbox, sender, _ = duplex(time)
    waiting = await running(inbox.ready())
    assert not waiting.done()
    match how:
        case "finish":
            inbox.finish()
        case "error":
            inbox.finish(EngineError("it broke"))
        case "cut":
            inbox.cut("gone")
        case "kill":
            inbox.kill()
        case _:
            inbox.fail(UsageError("no input"))
            inbox.fail(UsageError("a second time"))
            assert isinstance(inbox.error, UsageError)
            assert inbox.error.message == "no input"
    await asyncio.wait_for(waiting, 1)
    inbox.finish()
    assert sender.closed == 1
    assert inbox.sender is UNSENT
    assert inbox.link is UNLINKED
    assert len(time.wheel) == 0


async def test_waiting_to_send_has_a_limit_of_its_own() -> None:
    time = Time()
    inbox, sender, link = duplex(time, first_item=None, input=2)
    await time.pass_(10)  # nobody waits
    assert not inbox.ended
    waiting = await running(inbox.ready())
    await time.pass_(1.9)
    assert not inbox.ended
    await time.pass_(0.1 + SLACK)
    await asyncio.wait_for(waiting, 1)
    assert isinstance(inbox.error, Timeout)
    assert inbox.error.phase == "input"
    assert inbox.error.instance == 7
    assert link.asked[-1] == "kill"
    assert sender.closed == 1


async def test_the_limit_begins_with_each_wait() -> None:
    time = Time()
    inbox, sender, _ = duplex(time, first_item=None, input=2)
    for _ in range(3):
        sender.leave.clear()
        waiting = await running(inbox.ready())
        await time.pass_(1.5)
        sender.leave.set()
        await asyncio.wait_for(waiting, 1)
    assert not inbox.ended
    inbox.kill()


async def test_the_limits_of_reading_hold_beside_it() -> None:
    time = Time()
    inbox, _, _ = duplex(time, first_item=1, input=50)
    sending, reading = await running(inbox.ready()), await running(inbox.more())
    await time.pass_(1 + SLACK)
    await asyncio.wait_for(sending, 1)
    with pytest.raises(Timeout) as caught:
        await reading
    assert caught.value.phase == "first item"


async def test_a_cancelled_wait_changes_nothing() -> None:
    time = Time()
    inbox, sender, _ = duplex(time, first_item=None, input=1)
    waiting = await running(inbox.ready())
    waiting.cancel()
    await asyncio.wait([waiting])
    await time.pass_(5)
    assert not inbox.ended
    sender.leave.set()
    await inbox.ready()
    inbox.kill()


async def test_one_task_sends_at_a_time() -> None:
    inbox, _, _ = duplex(Time())
    waiting = await running(inbox.ready())
    with pytest.raises(UsageError, match="one task"):
        await inbox.ready()
    inbox.kill()
    await waiting


async def test_who_took_everything_and_sends_has_taken_it() -> None:
    inbox, sender, link = duplex(Time())
    sender.leave.set()
    inbox.receive([1])
    await inbox.ready()
    assert link.asked == []
    inbox.items.clear()
    await inbox.ready()
    assert link.asked == ["taken"]
    inbox.kill()


@pytest.mark.parametrize("value", [0, -1, "soon"])
def test_the_limit_is_a_positive_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="input"):
        PhaseLimits(input=value)


# -- the handler's end


def stream(time: Time, limit: float | None = 2.0) -> InputStream:
    inputs = InputStream(wheel=time.wheel, limit=limit)
    inputs.link = Link()
    return inputs


async def test_inputs_are_iterated_to_their_end() -> None:
    time = Time()
    inputs = stream(time)
    assert inputs.phase is Phase.ITEMS
    inputs.receive([1, 2])
    inputs.receive([3])
    inputs.finish()
    assert [each async for each in inputs] == [1, 2, 3]
    assert [each async for each in inputs] == []
    assert len(time.wheel) == 0


async def test_inputs_that_ended_badly_come_first() -> None:
    inputs = stream(Time())
    inputs.receive([1])
    inputs.finish(Cancelled("killed"))
    got: list[Any] = []
    with pytest.raises(Cancelled):
        async for each in inputs:
            got.append(each)
    assert got == [1]


async def test_a_handler_that_waits_too_long_is_told() -> None:
    time = Time()
    inputs = stream(time, 2.0)
    await time.pass_(10)  # it does something else
    assert not inputs.ended
    waiting = await running(anext(inputs))
    await time.pass_(2 + SLACK)
    with pytest.raises(Timeout) as caught:
        await waiting
    assert caught.value.phase == "input"


async def test_without_a_limit_it_waits() -> None:
    time = Time()
    inputs = stream(time, None)
    waiting = await running(anext(inputs))
    await time.pass_(100)
    assert not waiting.done()
    inputs.receive(["late"])
    assert await waiting == "late"
    inputs.finish()
