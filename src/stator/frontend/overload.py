"""Tells a queue that stands from one that a burst left behind."""

__all__ = ["Overload"]

_NOTICE = 8
"""places that must come free before a standing queue is looked at, and half as many until it is looked at again: fewer tell nothing"""
_MEMORY = 32
"""places that must come free without a refusal before it is over; at twice the capacity that does not happen by chance"""


class Overload:
    """The state of one line.

    A line that is above its target for `burst` seconds on end is looked at from then on. The longest it was before is the burst; when
    it is that long again, or would be with those that were refused since the last look, more comes than goes: it is overloaded, and
    stays so until for a while nobody had to be refused for it. `burst` 0: never. `interval` is the time between two places that come
    free, in seconds.
    """

    def __init__(self, burst: float) -> None:
        self._burst = burst
        self._looked_at: float | None = None
        self._in_burst = True
        self._longest = 0
        self._refused = 0
        self._until = 0.0

    def standing(self, waiting: int, now: float, interval: float) -> bool:
        """A request comes and finds so many that wait, more than the target allows. Whether the line is overloaded."""
        if self._looked_at is None:
            self._looked_at, self._in_burst, self._longest = now, True, waiting
        period = max(self._burst, _NOTICE * interval)
        if self._in_burst:
            self._longest = max(self._longest, waiting)
            if now - self._looked_at >= period:
                self._in_burst = False
                self._looked_at, self._refused = now, 0
        elif now - self._looked_at >= period / 2:
            if self._burst and waiting + self._refused >= self._longest:
                self._until = max(self._until, now + self._memory(interval))
            self._longest = max(self._longest, waiting)
            self._looked_at, self._refused = now, 0
        return now < self._until

    def short(self) -> None:
        """The line is not above its target."""
        self._looked_at = None

    def refused(self) -> None:
        """Somebody was refused while it was above its target."""
        self._refused += 1

    def refused_for_it(self, now: float, interval: float) -> None:
        """Somebody was refused because it is overloaded."""
        self._until = now + self._memory(interval)

    def _memory(self, interval: float) -> float:
        return max(self._burst, _MEMORY * interval)
