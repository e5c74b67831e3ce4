"""How often a failed request may be tried elsewhere (`design.md §5`).

The budget belongs to a client and keeps a dead cluster from being asked twice as often as a living one. `Attempts` belongs
to one request, from its first failure on: each instance once, at most 16.
"""

import math

from stator.errors import Overloaded, StatorError

__all__ = ["Attempts", "RetryBudget"]

_MEMORY = 10.0
"""seconds after which unused retries are largely forgotten (time constant)"""


class RetryBudget:
    """Grows by `ratio` per request and `rate` per second, and forgets with a time constant of 10 s.

    So in the long run at most `ratio` × requests + `rate` × seconds retries are allowed, and a burst may spend at most what ten
    seconds earn: many requests that fail at one instant, because their worker died, find room. It starts with 10 s of `rate`.
    """

    __slots__ = ("_balance", "_next", "_rate", "_ratio", "_requests", "_settled")

    def __init__(self, now: float, *, ratio: float = 0.2, rate: float = 10.0) -> None:
        self._ratio = ratio
        self._rate = rate
        self._balance = rate * _MEMORY
        self._requests = 0
        self._settled = now
        self._next = now + 1.0

    def count_request(self, now: float) -> None:
        """A new request (not a retry) begins."""
        self._requests += 1
        if now >= self._next:
            self._settle(now)

    def spend(self, now: float) -> bool:
        """Take one retry; False if none is left."""
        self._settle(now)
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True

    def balance(self, now: float) -> float:
        """Retries left."""
        self._settle(now)
        return self._balance

    def _settle(self, now: float) -> None:
        """Bring the balance up to date."""
        passed = max(0.0, now - self._settled)
        kept = math.exp(-passed / _MEMORY)
        self._balance = self._balance * kept + self._rate * _MEMORY * (1.0 - kept) + self._ratio * self._requests
        self._requests = 0
        self._settled = now
        self._next = now + 1.0


class Attempts:
    """What one request has tried. Made at its first failure; `tried` goes into the next `RouteRequest`."""

    __slots__ = ("_budget", "_limit", "tried")

    def __init__(self, budget: RetryBudget, *, limit: int = 16) -> None:
        self._budget = budget
        self._limit = limit
        self.tried: set[int] = set()

    def again(self, instance_id: int, error: StatorError, now: float, *, charged: bool = True) -> bool:
        """Note that `instance_id` failed with `error`; whether another instance may be tried.

        Not for errors that are not retryable, nor beyond the limit of attempts, nor when the budget is spent. A refusal as
        overloaded costs nothing, nor does one that is not `charged` (a draining worker did not accept).
        """
        self.tried.add(instance_id)
        if not error.retryable or len(self.tried) >= self._limit:
            return False
        if isinstance(error, Overloaded) or not charged:
            return True
        return self._budget.spend(now)
