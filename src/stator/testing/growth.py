"""How much longer a larger piece of work takes. Times move with the machine's mood, so the two are done in turn and the fastest of
each counts, which the machine disturbed least.
"""

import ctypes
import gc
from collections.abc import Generator
from contextlib import contextmanager
from time import perf_counter

__all__ = ["LINEAR", "Growth"]

LINEAR = 6.0
"""Three times the size takes three times as long if time is linear in size, and nine times if it grows with the square. Caches make
linear work somewhat worse than three; `python -m benchmarks --only large_messages` has figures, this only tells the two apart on any
machine."""

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_USUAL_TRIM_THRESHOLD, _USUAL_MMAP_MAX = 128 * 1024, 65_536


class Growth:
    """The fastest time of a small and of a large piece of work.

    growth = Growth()
    for _ in growth.rounds(5):
        with growth.small():
            work(10)
        with growth.large():
            work(30)
    assert growth.ratio <= LINEAR, growth
    """

    def __init__(self) -> None:
        self._small: list[float] = []
        self._large: list[float] = []

    def rounds(self, most: int) -> Generator[int]:
        """At least two, at most so many, and none more once the ratio is within `LINEAR`: they could only confirm it.

        Meanwhile the C library keeps all freed memory: it would keep the smaller blocks in any case, and pay for each page of the
        larger ones again.
        """
        with _kept_memory():
            for done in range(most):
                if done >= 2 and self.ratio <= LINEAR:
                    return
                yield done

    @contextmanager
    def small(self) -> Generator[None]:
        with _timed(self._small):
            yield

    @contextmanager
    def large(self) -> Generator[None]:
        with _timed(self._large):
            yield

    @property
    def ratio(self) -> float:
        """Of the fastest large to the fastest small one."""
        return min(self._large) / min(self._small)

    def __repr__(self) -> str:
        return f"Growth(small={min(self._small):.4f} s, large={min(self._large):.4f} s)"


@contextmanager
def _timed(times: list[float]) -> Generator[None]:
    gc.collect()
    began = perf_counter()
    yield
    times.append(perf_counter() - began)


@contextmanager
def _kept_memory() -> Generator[None]:
    """Only glibc has this to set; others are left as they are."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, 2**30)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _USUAL_MMAP_MAX)
        library.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM_THRESHOLD)
