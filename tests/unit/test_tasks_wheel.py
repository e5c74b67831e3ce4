"""The deadline wheel on a manual clock: who is asked, when, and who is not."""

import asyncio
from collections.abc import Callable
from random import Random

import pytest

from stator.tasks import DeadlineWheel, Timed
from stator.testing.manual_clock import ManualClock

RESOLUTION = 0.1


class Entry:
    """Something with a deadline that writes down when it was asked."""

    slot: set[Timed] | None = None

    def __init__(self, clock: ManualClock, answer: Callable[[float], float] = lambda now: 0.0) -> None:
        self.asked: list[float] = []
        self.answer = answer
        self.clock = clock

    def expire(self, now: float) -> float:
        assert now == self.clock.monotonic()
        self.asked.append(now)
        return self.answer(now)


class Timing:
    """A wheel that ticks when the test says so."""

    def __init__(self, start: float = 1000.0) -> None:
        self.clock = ManualClock(monotonic=start)
        self.wheel = DeadlineWheel(asyncio.get_running_loop(), now=self.clock.monotonic, resolution=RESOLUTION, stall=0.5)

    def entry(self, answer: Callable[[float], float] = lambda now: 0.0) -> Entry:
        return Entry(self.clock, answer)

    def arm(self, after: float, answer: Callable[[float], float] = lambda now: 0.0) -> Entry:
        entry = self.entry(answer)
        self.wheel.arm(entry, self.clock.monotonic() + after)
        return entry

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds, self.wheel)


@pytest.fixture
async def timing() -> Timing:
    return Timing()


@pytest.mark.parametrize("start", [0.0, 1000.0, 1000.03, 1000.09999, 123456.789])
@pytest.mark.parametrize("after", [0.001, 0.05, 0.1, 0.15, 0.9999, 1.0, 2.34, 61.7])
async def test_never_early_and_hardly_late(start: float, after: float) -> None:
    timing = Timing(start)
    at = timing.clock.monotonic() + after
    entry = timing.arm(after)
    timing.advance(after + 1)
    (asked,) = entry.asked
    assert at - 1e-9 <= asked <= at + 2 * RESOLUTION + 1e-6  # one for the slot, one for the tick
    assert len(timing.wheel) == 0 and entry.slot is None


async def test_a_thousand_deadlines_each_at_its_time() -> None:
    timing = Timing(1000.05)
    random = Random(5)
    entries = [(after, timing.arm(after)) for after in (random.uniform(0, 30) for _ in range(1000))]
    assert len(timing.wheel) == 1000
    timing.advance(31)
    for after, entry in entries:
        assert len(entry.asked) == 1
        assert -1e-6 <= entry.asked[0] - 1000.05 - after <= 2 * RESOLUTION + 1e-6
    assert len(timing.wheel) == 0


async def test_what_is_due_already_is_asked_at_the_next_tick(timing: Timing) -> None:
    entry = timing.arm(-5)
    assert entry.asked == []
    timing.advance(2 * RESOLUTION)
    assert len(entry.asked) == 1


async def test_arming_again_replaces_the_time(timing: Timing) -> None:
    entry = timing.arm(1)
    timing.wheel.arm(entry, timing.clock.monotonic() + 3)
    assert len(timing.wheel) == 1
    timing.advance(2)
    assert entry.asked == []
    timing.wheel.arm(entry, timing.clock.monotonic() + 0.1)
    timing.advance(5)
    assert len(entry.asked) == 1


async def test_a_disarmed_entry_is_not_asked(timing: Timing) -> None:
    entry = timing.arm(1)
    timing.wheel.disarm(entry)
    timing.wheel.disarm(entry)
    assert len(timing.wheel) == 0
    timing.advance(3)
    assert entry.asked == []
    timing.wheel.arm(entry, timing.clock.monotonic() + 1)
    timing.advance(3)
    assert len(entry.asked) == 1


async def test_the_answer_is_the_next_time(timing: Timing) -> None:
    entry = timing.arm(1, lambda now: now + 1 if now < 1004.5 else 0.0)
    timing.advance(20)
    assert len(entry.asked) == 5
    assert [round(later - earlier, 1) for earlier, later in zip(entry.asked, entry.asked[1:], strict=False)] == [
        pytest.approx(1.1, abs=0.1)
    ] * 4


async def test_an_answer_in_the_past_is_asked_once_per_tick(timing: Timing) -> None:
    entry = timing.arm(0.1, lambda now: 1.0)
    timing.advance(1.0)
    assert 8 <= len(entry.asked) <= 10


async def test_an_entry_may_arm_itself_when_it_is_asked(timing: Timing) -> None:
    entry = timing.entry()

    def later(now: float) -> float:
        if len(entry.asked) == 1:
            timing.wheel.arm(entry, now + 2)
        return 0.0

    entry.answer = later
    timing.wheel.arm(entry, 1000.5)
    timing.advance(5)
    assert len(entry.asked) == 2 and entry.asked[1] - entry.asked[0] == pytest.approx(2.1, abs=0.11)


async def test_an_entry_may_disarm_a_neighbour_of_its_slot(timing: Timing) -> None:
    pair: list[Entry] = []

    def only_one(now: float) -> float:
        for entry in pair:
            timing.wheel.disarm(entry)
        return 0.0

    pair += [timing.arm(1.0, only_one), timing.arm(1.0, only_one)]
    timing.advance(3)
    assert sorted(len(entry.asked) for entry in pair) == [0, 1]
    assert len(timing.wheel) == 0


async def test_an_entry_may_move_a_neighbour_of_its_slot(timing: Timing) -> None:
    pair: list[Entry] = []

    def push_the_other(now: float) -> float:
        for entry in pair:
            if not entry.asked:
                timing.wheel.arm(entry, now + 2)
        return 0.0

    pair += [timing.arm(1.0, push_the_other), timing.arm(1.0, push_the_other)]
    timing.advance(5)
    first, second = sorted(entry.asked[0] for entry in pair)
    assert [len(entry.asked) for entry in pair] == [1, 1] and second - first == pytest.approx(2.1, abs=0.11)


async def test_an_entry_may_arm_new_ones(timing: Timing) -> None:
    children: list[Entry] = []

    def spawn(now: float) -> float:
        children.extend((timing.arm(0.0), timing.arm(1.0)))
        return 0.0

    timing.arm(1.0, spawn)
    timing.advance(5)
    assert [len(child.asked) for child in children] == [1, 1]


async def test_a_failing_entry_disturbs_nobody(timing: Timing, caplog: pytest.LogCaptureFixture) -> None:
    def fails(now: float) -> float:
        raise RuntimeError("no")

    failing, other = timing.arm(1.0, fails), timing.arm(1.0)
    timing.advance(3)
    assert len(failing.asked) == len(other.asked) == 1
    assert "RuntimeError: no" in caplog.text
    assert len(timing.wheel) == 0


async def test_a_late_tick_asks_nobody_and_the_next_one_asks_all(timing: Timing) -> None:
    entries = [timing.arm(after) for after in (0.2, 1.0, 30.0)]
    timing.clock.advance(60)  # the loop stood still
    timing.wheel.tick()
    assert timing.wheel.stalls == 1 and timing.wheel.stalled_at == timing.clock.monotonic()
    assert [entry.asked for entry in entries] == [[], [], []]
    timing.advance(RESOLUTION)
    assert [len(entry.asked) for entry in entries] == [1, 1, 1]


async def test_a_little_late_is_not_a_stall(timing: Timing) -> None:
    entry = timing.arm(0.2)
    timing.clock.advance(0.55)
    timing.wheel.tick()
    assert timing.wheel.stalls == 0 and len(entry.asked) == 1


async def test_a_wheel_that_slept_for_hours_asks_everybody_in_order(timing: Timing) -> None:
    order: list[int] = []

    def note(number: int) -> Callable[[float], float]:
        def asked(now: float) -> float:
            order.append(number)
            return 0.0

        return asked

    for number in (3, 1, 2):
        timing.arm(number * 500.0, note(number))
    timing.clock.advance(7200)
    timing.wheel.tick()
    timing.advance(RESOLUTION)
    assert order == [1, 2, 3]


async def test_it_ticks_only_while_it_holds_something(timing: Timing) -> None:
    assert timing.wheel._timer is None
    entry = timing.arm(0.3)
    assert timing.wheel._timer is not None
    timing.advance(0.5)
    assert timing.wheel._timer is None and len(entry.asked) == 1
    timing.clock.advance(100)
    later = timing.arm(0.3)  # time without entries is no stall
    timing.advance(0.5)
    assert len(later.asked) == 1 and timing.wheel.stalls == 0


async def test_a_closed_wheel_asks_nobody(timing: Timing) -> None:
    entries = [timing.arm(0.1), timing.arm(50)]
    timing.wheel.close()
    timing.wheel.close()
    assert len(timing.wheel) == 0 and timing.wheel._timer is None
    timing.clock.advance(100)
    timing.wheel.tick()
    assert [entry.asked for entry in entries] == [[], []]
    for entry in entries:
        timing.wheel.disarm(entry)


async def test_on_the_loops_own_clock() -> None:
    loop = asyncio.get_running_loop()
    wheel = DeadlineWheel(loop, resolution=0.01)
    asked: asyncio.Future[float] = loop.create_future()

    class Once:
        slot: set[Timed] | None = None

        def expire(self, now: float) -> float:
            asked.set_result(loop.time())
            return 0.0

    at = loop.time() + 0.05
    wheel.arm(Once(), at)
    late = await asyncio.wait_for(asked, 5) - at
    assert -0.001 <= late < 0.5
    wheel.close()
