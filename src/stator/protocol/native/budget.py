"""One budget of bytes for all streams of a process (`docs/native-plane.md §6`)."""

from stator.errors import Overloaded

__all__ = ["ByteBudget"]


class ByteBudget:
    """Hands out windows and request space; what is out is never more than `total` plus one `least` per stream."""

    __slots__ = ("_least", "_most", "_out", "_total")

    def __init__(self, *, total: int = 256 * 1024 * 1024, most: int = 256 * 1024, least: int = 16 * 1024) -> None:
        self._total = total
        self._most = most
        self._least = least
        self._out = 0

    @property
    def out(self) -> int:
        """Bytes handed out."""
        return self._out

    def window(self) -> int:
        """A stream's window: `most` while a quarter of the total is free for it, then a quarter of that, at last `least`."""
        free = self._total - self._out
        most = self._most
        window = most if free > self._total // 4 else most // 4 if free > most else self._least
        window = max(window, self._least)
        self._out += window
        return window

    def take(self, size: int) -> None:
        """Space for a request that is arriving; `Overloaded` when there is none."""
        if self._out + size > self._total:
            raise Overloaded(f"no space for a request of {size} bytes: {self._out} of {self._total} bytes are in use")
        self._out += size

    def give(self, size: int) -> None:
        """Return a window or request space."""
        self._out -= size
