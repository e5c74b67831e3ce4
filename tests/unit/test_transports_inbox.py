"""The reading end of a stream on a manual clock: phases and their limits, waiting, cancelling, killing."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from stator.errors import Cancelled, ConfigError, Disconnected, EngineError, StreamIncomplete, Timeout, UsageError
from stator.protocol.stream import Phase
from stator.tasks import DeadlineWheel
from stator.testing.manual_clock import ManualClock
from stator.transports.inbox import UNLINKED, Inbox, Patience, PhaseLimits

LIMITS = PhaseLimits(connect=1, accept=2, call_home=3, prologue=4, first_item=5, items=6, total=None)
SLACK = 0.21
"""seconds a wheel may be late"""


class Link:
    """A plane that writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def stop(self) -> None:
        self.asked.append("stop")

    def kill(self) -> None:
        self.asked.append("kill")

    def taken(self) -> None:
        self.asked.append("taken")


class Reading:
    """An inbox, its link and its time."""

    def __init__(self, limits: PhaseLimits = LIMITS) -> None:
        self.clock = ManualClock()
        self.wheel = DeadlineWheel(asyncio.get_running_loop(), now=self.clock.monotonic)
        self.link = Link()
        self.inbox = Inbox(wheel=self.wheel, patience=Patience(limits), instance=7)
        self.inbox.link = self.link

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds, self.wheel)

    async def ends_after(self, limit: float, phase: str) -> None:
        """Not before `limit`, then with a timeout of `phase`; the plane is told and nothing is left armed."""
        waiting = asyncio.create_task(self.inbox.more())
        await asyncio.sleep(0)
        self.advance(limit - 0.15)
        await asyncio.sleep(0)
        assert not self.inbox.ended
        self.advance(0.15 + SLACK)
        with pytest.raises(Timeout) as caught:
            await soon(waiting)
        assert (caught.value.phase, caught.value.instance) == (phase, 7)
        assert self.link.asked[-1] == "kill" and self.inbox.link is UNLINKED
        assert len(self.wheel) == 0


@pytest.fixture
async def reading() -> Reading:
    return Reading()


async def soon(task: "asyncio.Task[Any]") -> Any:
    """Its result, in bounded time."""
    return await asyncio.wait_for(task, 5)


PHASES: list[tuple[Phase, float, str]] = [
    (Phase.CONNECT, 1, "connect"),
    (Phase.ACCEPT, 2, "accept"),
    (Phase.CALL_HOME, 3, "call home"),
    (Phase.PROLOGUE, 4, "prologue"),
    (Phase.FIRST_ITEM, 5, "first item"),
]


@pytest.mark.parametrize(("phase", "limit", "label"), PHASES)
async def test_each_phase_has_its_limit(reading: Reading, phase: Phase, limit: float, label: str) -> None:
    reading.advance(0.7)
    reading.inbox.advance(phase)
    await reading.ends_after(limit, label)  # a limit begins with the wait


async def test_the_limit_between_items(reading: Reading) -> None:
    reading.inbox.receive([1])
    assert await reading.inbox.more()
    reading.inbox.items.clear()
    await reading.ends_after(6, "items")


async def test_every_item_begins_the_limit_anew(reading: Reading) -> None:
    reading.inbox.accept()
    for number in range(10):
        waiting = asyncio.create_task(reading.inbox.more())
        await asyncio.sleep(0)
        reading.advance(5 if number else 4)
        reading.inbox.receive([number])
        assert await soon(waiting)
        reading.inbox.items.clear()
    await reading.ends_after(6, "items")


@pytest.mark.parametrize("phase", [Phase.FIRST_ITEM, Phase.ITEMS])
async def test_a_reader_that_does_not_wait_is_not_late(reading: Reading, phase: Phase) -> None:
    """Time the application takes for itself is not the worker's."""
    if phase is Phase.ITEMS:
        reading.inbox.receive([1])
        reading.inbox.items.clear()
    else:
        reading.inbox.accept()
    reading.advance(100)
    assert not reading.inbox.ended
    await reading.ends_after(5 if phase is Phase.FIRST_ITEM else 6, phase.label)


@pytest.mark.parametrize("phase", PHASES[:4])
async def test_before_acceptance_time_runs_also_when_nobody_waits(reading: Reading, phase: tuple[Phase, float, str]) -> None:
    reading.inbox.advance(phase[0])
    reading.advance(phase[1] + SLACK)
    assert reading.inbox.ended and isinstance(reading.inbox.error, Timeout)
    assert reading.inbox.error.phase == phase[2]


async def test_a_limit_of_none_waits_for_ever() -> None:
    reading = Reading(PhaseLimits(connect=None, accept=None, first_item=None, items=None))
    waiting = asyncio.create_task(reading.inbox.more())
    await asyncio.sleep(0)
    reading.advance(5000)
    assert not reading.inbox.ended and not waiting.done()
    reading.inbox.receive([1])
    assert await soon(waiting)


@pytest.mark.parametrize("waits", [True, False])
async def test_the_total_limit_counts_from_the_opening_whatever_happens(waits: bool) -> None:
    reading = Reading(PhaseLimits(total=10))
    reading.inbox.receive([0])
    for number in range(9):
        reading.advance(1)
        reading.inbox.receive([number])
    assert not reading.inbox.ended
    waiting = asyncio.create_task(reading.inbox.more()) if waits else None
    reading.advance(1 + SLACK)
    assert isinstance(reading.inbox.error, Timeout) and reading.inbox.error.phase == "total"
    assert reading.link.asked[-1] == "kill"
    if waiting is not None:
        assert await soon(waiting)  # what had arrived is still there
    reading.inbox.items.clear()
    with pytest.raises(Timeout):
        await reading.inbox.more()


async def test_a_stalled_process_gives_its_streams_another_tick() -> None:
    reading = Reading()
    waiting = asyncio.create_task(reading.inbox.more())
    await asyncio.sleep(0)
    reading.clock.advance(3600)  # the loop stood still
    reading.wheel.tick()
    assert not reading.inbox.ended
    reading.inbox.receive([1])  # it was in the kernel's buffer
    assert await soon(waiting)


@pytest.mark.parametrize("name", PhaseLimits.__struct_fields__)
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_are_above_zero(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"limit {name} must be a positive"):
        PhaseLimits(**{name: value})


# -- waiting


async def test_items_are_waited_for_and_taken_by_the_reader(reading: Reading) -> None:
    waiting = asyncio.create_task(reading.inbox.more())
    await asyncio.sleep(0)
    assert reading.link.asked == ["taken"]
    reading.inbox.receive([1, 2])
    reading.inbox.receive([3])
    assert await soon(waiting)
    assert list(reading.inbox.items) == [1, 2, 3]
    assert await reading.inbox.more()  # nothing was taken: no wait
    assert reading.link.asked == ["taken"]


async def test_the_plane_is_told_when_the_inbox_was_emptied(reading: Reading) -> None:
    reading.inbox.receive([1])
    assert await reading.inbox.more()
    assert reading.link.asked == []
    reading.inbox.items.clear()
    waiting = asyncio.create_task(reading.inbox.more())
    await asyncio.sleep(0)
    assert reading.link.asked == ["taken"]
    reading.inbox.finish()
    assert await soon(waiting) is False


async def test_opened_returns_with_acceptance_items_or_an_end() -> None:
    steps: list[Callable[[Inbox], Any]] = [
        lambda inbox: inbox.accept(),
        lambda inbox: inbox.receive([1]),
        lambda inbox: inbox.finish(),
        lambda inbox: inbox.finish(EngineError("no")),
        lambda inbox: inbox.kill(),
    ]
    for step in steps:
        inbox = Reading().inbox
        waiting = asyncio.create_task(inbox.opened())
        await asyncio.sleep(0)
        inbox.advance(Phase.ACCEPT)
        await asyncio.sleep(0)
        assert not waiting.done()
        step(inbox)
        await soon(waiting)
        await inbox.opened()


async def test_one_reader_at_a_time(reading: Reading) -> None:
    first = asyncio.create_task(reading.inbox.more())
    await asyncio.sleep(0)
    for second in (reading.inbox.more, reading.inbox.opened):
        with pytest.raises(UsageError, match="one task at a time"):
            await second()
    reading.inbox.receive([1])
    assert await soon(first)


async def test_a_cancelled_wait_takes_nothing_and_may_be_repeated(reading: Reading) -> None:
    for _ in range(3):
        waiting = asyncio.create_task(reading.inbox.more())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(waiting)
    assert not reading.inbox.ended
    waiting = asyncio.create_task(reading.inbox.more())
    await asyncio.sleep(0)
    reading.inbox.receive([1])
    assert await soon(waiting) and list(reading.inbox.items) == [1]


async def test_a_wait_cancelled_as_items_arrive_loses_none(reading: Reading) -> None:
    waiting = asyncio.create_task(reading.inbox.more())
    await asyncio.sleep(0)
    reading.inbox.receive([1])
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(waiting)
    reading.inbox.receive([2])
    assert await reading.inbox.more() and list(reading.inbox.items) == [1, 2]


async def test_a_cancelled_wait_stops_its_clock(reading: Reading) -> None:
    reading.inbox.receive([1])
    reading.inbox.items.clear()
    waiting = asyncio.create_task(reading.inbox.more())
    await asyncio.sleep(0)
    reading.advance(5)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(waiting)
    reading.advance(100)
    assert not reading.inbox.ended


# -- ends


async def test_items_come_before_the_end(reading: Reading) -> None:
    reading.inbox.receive([1])
    reading.inbox.finish(EngineError("broke"))
    assert await reading.inbox.more()
    reading.inbox.items.clear()
    with pytest.raises(EngineError, match="broke") as caught:
        await reading.inbox.more()
    assert caught.value.instance == 7
    with pytest.raises(EngineError):
        await reading.inbox.more()


async def test_an_ended_inbox_holds_nothing_of_plane_or_wheel(reading: Reading) -> None:
    assert len(reading.wheel) == 1
    reading.inbox.finish()
    assert len(reading.wheel) == 0 and reading.inbox.link is UNLINKED
    assert await reading.inbox.more() is False
    reading.inbox.stop()
    reading.inbox.kill()
    assert reading.link.asked == [] and reading.inbox.error is None


async def test_kill_tells_the_plane_once_and_wakes_the_reader(reading: Reading) -> None:
    waiting = asyncio.create_task(reading.inbox.more())
    await asyncio.sleep(0)
    reading.inbox.kill()
    reading.inbox.kill()
    with pytest.raises(Cancelled) as caught:
        await soon(waiting)
    assert reading.link.asked == ["taken", "kill"]
    assert caught.value.phase == "connect"


async def test_stop_is_passed_on_and_ends_nothing(reading: Reading) -> None:
    reading.inbox.stop()
    assert reading.link.asked == ["stop"] and not reading.inbox.ended
    reading.inbox.receive([1])
    assert list(reading.inbox.items) == [1]


@pytest.mark.parametrize("first", ["kill", "finish", "fail", "cut", "time out"])
@pytest.mark.parametrize("second", ["kill", "finish", "fail", "cut", "items", "accept", "advance", "time out"])
async def test_the_first_end_decides(first: str, second: str) -> None:
    reading = Reading(PhaseLimits(connect=None, accept=None, first_item=None, items=None, total=1))
    inbox = reading.inbox
    inbox.receive([1])

    def do(what: str) -> object:
        match what:
            case "kill":
                return inbox.kill()
            case "finish":
                return inbox.finish()
            case "fail":
                return inbox.finish(EngineError("broke"))
            case "cut":
                return inbox.cut("gone")
            case "items":
                return inbox.receive([2])
            case "accept":
                return inbox.accept()
            case "advance":
                return inbox.advance(Phase.PROLOGUE)
            case _:
                return reading.advance(2)

    do(first)
    expected = {"kill": Cancelled, "finish": type(None), "fail": EngineError, "cut": StreamIncomplete, "time out": Timeout}
    assert type(inbox.error) is expected[first]
    do(second)
    assert type(inbox.error) is expected[first] and inbox.ended and list(inbox.items) == [1]
    assert reading.link.asked.count("kill") == (first in ("kill", "time out"))


async def test_a_cut_before_the_first_item_may_be_retried(reading: Reading) -> None:
    reading.inbox.accept()
    reading.inbox.cut("gone")
    assert type(reading.inbox.error) is Disconnected and reading.inbox.error.retryable
    assert reading.inbox.error.phase == "first item"


async def test_patience_for_what_is_left_of_the_whole() -> None:
    patience = Patience(PhaseLimits(total=10))
    assert patience.within(3).total == 3
    assert patience.within(30).total == 10
    assert Patience(PhaseLimits()).within(3).total == 3
    assert Patience(PhaseLimits(items=1, total=None)).look_every == 1
