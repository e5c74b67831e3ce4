"""What a simulated rank has done so far."""

from collections import deque

__all__ = ["HitRate", "Statistics"]


class HitRate:
    """Share of the prompt tokens that were found in the prefix cache, over the last `window` admitted requests."""

    def __init__(self, window: int = 1000) -> None:
        self._window = window
        self._recent: deque[tuple[int, int]] = deque()
        self._asked = 0
        self._found = 0

    def add(self, *, asked: int, found: int) -> None:
        """One request of `asked` ≥ 1 prompt tokens came in."""
        self._recent.append((asked, found))
        self._asked += asked
        self._found += found
        if len(self._recent) > self._window:
            old_asked, old_found = self._recent.popleft()
            self._asked -= old_asked
            self._found -= old_found

    @property
    def value(self) -> float | None:
        """0 … 1; None before the first request."""
        return self._found / self._asked if self._asked else None


class Statistics:
    """Totals since the start; times in nanoseconds."""

    def __init__(self) -> None:
        self.passes = 0
        self.busy = 0
        """sum of all passes"""
        self.tokens = 0
        """tokens generated"""
        self.computed = 0
        """prompt tokens computed, again after preemptions"""
        self.admitted = 0
        """requests, each at its first admission"""
        self.finished = 0
        self.rejected = 0
        self.preemptions = 0
        self.used_time = 0
        """blocks in use, summed over the time of the passes: block-nanoseconds"""
        self.most_used = 0
        """blocks"""
        self.hits = HitRate()
        self.gaps: dict[int, int] | None = None
        """times between two tokens of a sequence, and how often each occurred; None: not counted"""
