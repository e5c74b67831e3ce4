"""Tells a queue that stands from one that a burst left behind."""

__all__ = ["Overload"]

_NOTICE = 8
"""places that must come free before a standing queue is taken for one: fewer tell nothing"""
_MEMORY = 32
"""places that must come free without a refusal before it is over; at twice the capacity that does not happen by chance"""


class Overload:
    """The state of one line. It is overloaded when it was above its target for `burst` seconds on end, and stays so until for a while
    nobody had to be refused for it. `burst` 0: never. `interval` is the time between two places that come free, in seconds.
    """

    def __init__(self, burst: float) -> None:
        self._burst = burst
        self._above_since: float | None = None
        self._until = 0.0

    def standing(self, above: bool, now: float) -> None:
        """Whether the line is above its target now."""
        if not above:
            self._above_since = None
        elif self._above_since is None:
            self._above_since = now

    def at(self, now: float, interval: float) -> bool:
        """Whether it is overloaded."""
        if now < self._until:
            return True
        since = self._above_since
        return self._burst > 0 and since is not None and now - since >= max(self._burst, _NOTICE * interval)

    def refused(self, now: float, interval: float) -> None:
        """Somebody was refused because it is."""
        self._until = now + max(self._burst, _MEMORY * interval)
