"""What a clock is. The only real one is `stator.tasks.SystemClock`; tests hand in `stator.testing.ManualClock`."""

from typing import Protocol

__all__ = ["Clock"]


class Clock(Protocol):
    """A source of time. Both readings are in seconds."""

    def monotonic(self) -> float:
        """Time that never goes back; only differences mean something."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch, for records and logs; never for durations."""
        ...
