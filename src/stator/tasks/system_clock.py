"""The real clock."""

import time

__all__ = ["SystemClock"]


class SystemClock:
    """`stator.clock.Clock` on the operating system's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()
