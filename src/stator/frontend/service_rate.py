"""How long until the next place comes free: from how long calls take, and how many run (Little's law)."""

__all__ = ["ServiceRate"]

_MEMORY = 32
"""calls over which the mean is taken, the latest counting most"""


class ServiceRate:
    """Mean duration of the calls that ended lately, in seconds. While none has, nothing is known.

    Ends alone would tell less: on an idle model they come as slowly as requests do, though a burst would be served much faster.
    """

    def __init__(self) -> None:
        self.mean = 0.0
        self._count = 0
        self._last_end = 0.0

    @property
    def known(self) -> bool:
        """Whether a call has ended."""
        return self._count > 0

    def ended(self, seconds: float, now: float) -> None:
        """A call ended that had its place for so long."""
        self._count = min(self._count + 1, _MEMORY)
        self.mean += (seconds - self.mean) / self._count
        self._last_end = now

    def interval(self, running: int, *, since: float, now: float) -> float | None:
        """Seconds between two calls that end, while `running` run and nothing had to wait before `since`; None if that is not known.

        When for longer than a whole call none ended, it is what they are late by: nobody knows when they will.
        """
        if not self._count or not running:
            return None
        return max(self.mean / running, now - max(self._last_end, since) - self.mean)
