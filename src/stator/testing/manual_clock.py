"""Time that stands still until it is told to go on."""

from stator.tasks import DeadlineWheel

__all__ = ["ManualClock"]


class ManualClock:
    """`stator.clock.Clock` under the test's control; drives deadline wheels made with `now=clock.monotonic`."""

    def __init__(self, *, monotonic: float = 1000.0, wall: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def advance(self, seconds: float, *wheels: DeadlineWheel) -> None:
        """Let `seconds` pass in steps of the wheels' resolution, ticking each wheel at every step."""
        step = min((wheel.resolution for wheel in wheels), default=seconds)
        end = self._monotonic + seconds
        while self._monotonic < end - 1e-9:
            delta = min(step, end - self._monotonic)
            self._monotonic += delta
            self._wall += delta
            for wheel in wheels:
                wheel.tick()
