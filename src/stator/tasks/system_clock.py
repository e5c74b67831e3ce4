"""The real clock."""

import time

__all__ = ["SystemClock"]


class SystemClock:
    """`stator.clock.Clock` on the operating system's clocks; read on hot paths, so nothing of ours is in between."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)
