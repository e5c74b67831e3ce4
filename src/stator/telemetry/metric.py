"""The numbers themselves: counters, gauges, histograms, and families of them told apart by labels."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

from stator.errors import UsageError

__all__ = ["OTHER", "Counter", "Family", "Gauge", "Histogram"]

OTHER = "other"
"""value of every label of the series that takes what is beyond a family's limit"""


class Counter:
    """A number that only grows. On the hottest paths add to `value` directly."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        """Add `amount` ≥ 0."""
        self.value += amount


class Gauge:
    """A number that goes up and down. As a context manager, one more while inside: `with gauge:` leaves it as it was.

    It may be entered any number of times at once.
    """

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def set(self, value: float) -> None:
        self.value = value

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def dec(self, amount: float = 1) -> None:
        self.value -= amount

    def __enter__(self) -> None:
        self.value += 1

    def __exit__(self, *_: object) -> None:
        self.value -= 1


class Histogram:
    """How often values fell into which bucket. `bounds` are the upper ends, ascending; one more bucket takes what is beyond."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Note `value`, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def observe_all(self, values: Collection[float]) -> None:
        """Note each of `values`. A thousand cost a fifth of as many calls of `observe`."""
        ordered = sorted(values)
        noted = 0
        for bucket, bound in enumerate(self.bounds):
            below = bisect_right(ordered, bound, noted)
            self.counts[bucket] += below - noted
            noted = below
        self.counts[-1] += len(ordered) - noted
        self.total += sum(ordered)


M = TypeVar("M", Counter, Gauge, Histogram)


class Family(Generic[M]):
    """The series of one metric at one level, told apart by variable labels. Keep what `labels` returns."""

    __slots__ = ("_children", "_limit", "_make", "label_names", "name")

    def __init__(self, name: str, label_names: tuple[str, ...], make: Callable[[], M], limit: int) -> None:
        self.name = name
        self.label_names = label_names
        self._make = make
        self._limit = limit
        self._children: dict[tuple[str, ...], M] = {}

    def labels(self, *values: str) -> M:
        """The series with these label values, in the order of the label names. Made when first asked for.

        Beyond the family's limit of series, one series with the value "other" takes everything: label values from outside
        cannot fill the memory.
        """
        child = self._children.get(values)
        if child is not None:
            return child
        if len(values) != len(self.label_names):
            raise UsageError(f"metric {self.name} has the labels {self.label_names}, got {len(values)} values")
        if len(self._children) >= self._limit:
            values = (OTHER,) * len(values)
        return self._children.setdefault(values, self._make())

    def remove(self, *values: str) -> None:
        """Forget a series, e.g. of an instance that is gone."""
        self._children.pop(values, None)

    def series(self) -> list[tuple[tuple[str, ...], M]]:
        """Label values and metric of each series, oldest first."""
        return list(self._children.items())
