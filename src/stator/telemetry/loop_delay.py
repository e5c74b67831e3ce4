"""How late the event loop is: a short sleep over and over, and by how much it was longer than asked for (`spec/30 §8.2`)."""

import asyncio

from stator.clock import Clock
from stator.telemetry.metric import Counter, Histogram
from stator.telemetry.metric_set import MetricSet

__all__ = ["LOOP_DELAY_BUCKETS", "LoopDelay"]

LOOP_DELAY_BUCKETS = (0, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
"""seconds"""

_SLEEP = 0.05
"""seconds; shorter sleeps wake a process that waits for tokens more often than its tokens do, and cost it a twentieth of its time"""
_STALL = 0.005
"""seconds of delay from which on it counts as a stall"""


class LoopDelay:
    """Measures the loop it is started on, between `start` and `stop`. One timer, no task."""

    __slots__ = ("_clock", "_delay", "_due", "_loop", "_stalls", "_timer")

    def __init__(self, metrics: MetricSet, clock: Clock, *, prefix: str) -> None:
        """Register `<prefix>_event_loop_delay_seconds` and `<prefix>_event_loop_stall_total`. Raises `UsageError` if they are there."""
        self._clock = clock
        self._delay: Histogram = metrics.histogram(
            f"{prefix}_event_loop_delay_seconds",
            f"Event loop delay canary: drift from {_SLEEP * 1e3:.0f}ms sleep (seconds)",
            LOOP_DELAY_BUCKETS,
        )
        self._stalls: Counter = metrics.counter(f"{prefix}_event_loop_stall_total", "Number of event loop stalls (delay > 5ms)")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measure from now on."""
        self.stop()
        self._loop = loop
        self._sleep()

    def stop(self) -> None:
        """Measure no longer. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop = None

    def _sleep(self) -> None:
        if self._loop is not None:
            self._due = self._clock.monotonic() + _SLEEP
            self._timer = self._loop.call_later(_SLEEP, self._wake)

    def _wake(self) -> None:
        late = max(0.0, self._clock.monotonic() - self._due)
        self._delay.observe(late)
        if late > _STALL:
            self._stalls.value += 1
        self._sleep()
