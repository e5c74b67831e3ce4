"""Deadlines by the thousand: one coarse timer for the process instead of one per wait.

An entry sits in one slot of `resolution` seconds and is *asked* when the slot comes round; it answers with the time at which it
wants to be asked again, so that activity costs nothing (no re-arming per item: `asyncio.timeout` costs 6 µs, an item in all 1–2).
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

__all__ = ["DeadlineWheel", "Timed"]

logger = logging.getLogger(__name__)


class Timed(Protocol):
    """Something with a deadline. `slot` is the wheel's: where the entry sits, None while it is not armed."""

    slot: "set[Timed] | None"

    def expire(self, now: float) -> float:
        """Do what is due at `now`. The answer is when to ask again (same clock), or 0.0 to leave the wheel."""
        ...


class DeadlineWheel:
    """A timer wheel on a running loop; ticks only while it holds entries.

    Late ticks (the loop was blocked or the process stopped) ask nobody: they wait one more tick, so that bytes which arrived meanwhile
    are read before anyone is declared late. `stalls` counts them and `stalled_at` is when the last one was noticed.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        now: Callable[[], float] | None = None,
        resolution: float = 0.1,
        stall: float = 0.5,
    ) -> None:
        self.loop = loop
        self.now = now if now is not None else loop.time
        self.resolution = resolution
        self.stalls = 0
        self.stalled_at = float("-inf")
        self._stall = stall
        self._slots: dict[int, set[Timed]] = {}
        self._tick = 0
        self._timer: asyncio.TimerHandle | None = None
        self._expected = 0.0

    def __len__(self) -> int:
        return sum(len(slot) for slot in self._slots.values())

    def arm(self, entry: Timed, at: float) -> None:
        """Ask `entry` at `at` or up to one resolution later, instead of at any time set before."""
        if entry.slot is not None:
            entry.slot.discard(entry)
        if self._timer is None:
            self._start()
        number = max(int(at / self.resolution) + 1, self._tick + 1)
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = set()
        slot.add(entry)
        entry.slot = slot

    def disarm(self, entry: Timed) -> None:
        """Do not ask `entry` any more. Harmless when it is not armed."""
        if entry.slot is not None:
            entry.slot.discard(entry)
            entry.slot = None

    def _start(self) -> None:
        now = self.now()
        self._tick = int(now / self.resolution)
        self._schedule(now)

    def _schedule(self, now: float) -> None:
        self._expected = now + self.resolution
        self._timer = self.loop.call_later(self.resolution, self.tick)

    def tick(self) -> None:
        """Ask everyone whose slot has come. Called by its own timer (and by tests on a manual clock)."""
        now = self.now()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if now - self._expected > self._stall:
            self.stalls += 1
            self.stalled_at = now
            self._schedule(now)
            return
        self._advance(now)
        if self._slots:
            self._schedule(now)

    def _advance(self, now: float) -> None:
        last = int(now / self.resolution)
        due = (
            [n for n in range(self._tick + 1, last + 1) if n in self._slots]
            if last - self._tick < 1000
            else sorted(n for n in self._slots if n <= last)
        )
        self._tick = last
        for number in due:
            slot = self._slots.pop(number)
            while slot:
                entry = slot.pop()
                entry.slot = None
                try:
                    again = entry.expire(now)
                except Exception:
                    logger.exception("deadline of %r failed", entry)
                    continue
                if again:
                    self.arm(entry, again)

    def close(self) -> None:
        """Forget every entry and stop ticking."""
        self._slots.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
