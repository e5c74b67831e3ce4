"""How long a forward pass takes: formulas fitted to a GPU (`spec/50 §23.1`). Times are whole nanoseconds, so that nothing adds up wrong."""

from typing import Protocol

__all__ = ["FormulaTiming", "PassTiming", "scaled"]

MILLISECOND = 1_000_000
"""in nanoseconds"""


class PassTiming(Protocol):
    """The two parts of a pass. Both are called once per pass."""

    @property
    def steady(self) -> bool:
        """Whether decoding takes as long in the next pass as in this one while the blocks in use are the same."""
        ...

    def prefill(self, tokens: int) -> int:
        """Nanoseconds to compute `tokens` ≥ 1 new prompt tokens."""
        ...

    def decode(self, used_blocks: int, context: int) -> int:
        """Nanoseconds until the next token of all sequences that get one; `context` is the mean of their lengths in tokens."""
        ...


def scaled(milliseconds: float, speedup: float) -> int:
    """A time that was found as milliseconds, in nanoseconds, `speedup` times as fast; rounded before and after, as the reference does."""
    nanoseconds = round(milliseconds * MILLISECOND)
    return nanoseconds if speedup == 1.0 else round(nanoseconds / speedup)


class FormulaTiming:
    """Prefill grows with the square of the tokens, decoding with the share of the blocks that are in use."""

    steady = True

    def __init__(self, *, capacity: int, speedup: float = 1.0, decode_speedup: float = 1.0) -> None:
        """`capacity` is in blocks; both speedups divide the time of decoding."""
        self._capacity = capacity
        self._speedup = speedup
        self._decode_speedup = speedup * decode_speedup
        self._decode: dict[int, int] = {}

    def prefill(self, tokens: int) -> int:
        return scaled(4.209989e-07 * tokens * tokens + 1.518344e-02 * tokens + 16.50142, self._speedup)

    def decode(self, used_blocks: int, context: int) -> int:
        found = self._decode.get(used_blocks)  # at most one entry per block of the pool
        if found is None:
            share = min(1.0, used_blocks / self._capacity)
            found = scaled(max(1.0, -25.74 * share * share + 54.01 * share + 5.74), self._decode_speedup)
            self._decode[used_blocks] = found
        return found
