"""How much of the recent prompts a prefix cache had."""

__all__ = ["HitRate"]

_WINDOW = 1_000_000
"""tokens looked up that count fully; older ones fade"""


class HitRate:
    """Fed with counts of tokens looked up and found. None until something was looked up."""

    __slots__ = ("_found", "_looked_up")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """The cache was emptied."""
        self._looked_up = self._found = 0.0

    def add(self, looked_up: int, found: int) -> None:
        self._looked_up += looked_up
        self._found += found
        if self._looked_up > _WINDOW:
            self._found *= _WINDOW / self._looked_up
            self._looked_up = _WINDOW

    @property
    def value(self) -> float | None:
        """0 … 1"""
        return self._found / self._looked_up if self._looked_up else None
