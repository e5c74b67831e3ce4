"""When one endpoint is probed and what a probe's outcome means. Pure: `now` is an argument (monotonic seconds)."""

import enum

__all__ = ["CanarySchedule", "Step", "Verdict"]


class Step(enum.Enum):
    """What to do now."""

    WAIT = enum.auto()
    PROBE = enum.auto()
    """start a probe; it has begun for the schedule"""
    GIVE_UP = enum.auto()
    """the probe is late: judge it and cancel it"""


class Verdict(enum.Enum):
    """What a probe showed; the values are metric labels."""

    HEALTHY = "healthy"
    SICK = "sick"
    BUSY = "busy"
    """at capacity, and it answered somebody not long ago: nothing changes"""
    OUTRUN = "outrun"
    """the probe failed, but a real request was answered meanwhile: nothing changes"""


class CanarySchedule:
    """Idle → probing → idle. One probe at a time: the next one waits until the last has ended, even one that was given up.

    The wait counts from the last answer or from when the last probe was due, so that the cadence of an idle endpoint does not drift
    (`spec/25 §6`). A given-up probe that does not end is judged again every `wait` seconds: it stays what it is, late.
    """

    __slots__ = ("_begun", "_busy_limit", "_given_up", "_good", "_rest", "_timeout", "_wait")

    def __init__(self, *, wait: float, timeout: float, busy_limit: float | None, now: float) -> None:
        self._wait = wait
        self._timeout = timeout
        self._busy_limit = busy_limit
        self._rest = now
        self._good = now
        self._begun: float | None = None
        self._given_up = False

    @property
    def probing(self) -> bool:
        """Whether a probe has not ended."""
        return self._begun is not None

    @property
    def given_up(self) -> bool:
        """Whether the probe that has not ended is late; what it still says does not count."""
        return self._given_up

    def step(self, now: float, active: float) -> tuple[Step, float]:
        """What to do at `now`, the last real answer having been at `active`; and when to ask again."""
        if self._begun is not None:
            late = self._begun + self._timeout
            if now < late:
                return Step.WAIT, late
            self._given_up = True
            return Step.GIVE_UP, now + self._wait
        due = max(self._rest, active) + self._wait
        if now < due:
            return Step.WAIT, due
        self._begun = now
        self._rest = due if now < due + self._wait else now
        return Step.PROBE, now + self._timeout

    def judge(self, now: float, active: float, *, failed: bool, full: bool) -> Verdict:
        """What the running probe shows. `full`: it failed while the endpoint was at capacity."""
        assert self._begun is not None
        if not failed:
            self._good = now
            return Verdict.HEALTHY
        if active >= self._begun:
            return Verdict.OUTRUN
        if full and (self._busy_limit is None or now - max(active, self._good) < self._busy_limit):
            return Verdict.BUSY
        return Verdict.SICK

    def ended(self, now: float, active: float) -> float:
        """The probe has ended. Returns when to ask again."""
        self._begun = None
        self._given_up = False
        return max(max(self._rest, active) + self._wait, now)
