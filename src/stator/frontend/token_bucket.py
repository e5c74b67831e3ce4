"""A limit per minute as a token bucket: a quiet caller may use a minute's worth at once, a steady one the rate."""

__all__ = ["TokenBucket"]


class TokenBucket:
    """Fills at `rate` per second up to `capacity`. Each `now` is monotonic, in seconds, and never before the one before.

    What `take` gives away in any span of t seconds is at most `capacity` + t · `rate`. `charge` takes what cannot be refused any more
    and may leave less than nothing: that debt is paid back before anything is given again.
    """

    __slots__ = ("_at", "_level", "capacity", "rate")

    def __init__(self, per_minute: float, now: float) -> None:
        self.rate = per_minute / 60
        self.capacity = max(1.0, per_minute)
        """at least one, or nothing would ever get through"""
        self._level = self.capacity
        self._at = now

    def level(self, now: float) -> float:
        """What is there; negative while there are debts."""
        level = self._level + (now - self._at) * self.rate
        return level if level < self.capacity else self.capacity

    def take(self, amount: float, now: float) -> bool:
        """Take `amount` if it is there; whether it was."""
        level = self.level(now)
        if level < amount:
            return False
        self._level, self._at = level - amount, now
        return True

    def charge(self, amount: float, now: float) -> None:
        """Take `amount`, there or not. Token path: once per batch of tokens."""
        level = self._level + (now - self._at) * self.rate
        self._level = (level if level < self.capacity else self.capacity) - amount
        self._at = now

    def give_back(self, amount: float, now: float) -> None:
        """`amount` was taken for nothing."""
        self.charge(-amount, now)
        self._level = min(self._level, self.capacity)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there; infinite if it is more than there can be."""
        if amount > self.capacity:
            return float("inf")
        return max(0.0, (amount - self.level(now)) / self.rate)

    def until_full(self, now: float) -> float:
        """Seconds until all is there if nothing is taken."""
        return (self.capacity - self.level(now)) / self.rate

    def relimit(self, per_minute: float, now: float) -> None:
        """Another limit from now on. What was used stays used, but a smaller limit makes no debts."""
        level = self.level(now)
        used = self.capacity - level
        self.rate = per_minute / 60
        self.capacity = max(1.0, per_minute)
        self._level, self._at = max(self.capacity - used, min(level, 0.0)), now
