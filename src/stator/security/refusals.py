"""Connections that were not made because one side does not trust the other: counted by side and reason."""

from typing import Literal

__all__ = ["Refusals", "Side"]

Side = Literal["accepting", "dialling"]


class Refusals:
    """Counts, by side and reason; `docs/security.md` lists the reasons. Plain numbers that become metrics before a scrape."""

    def __init__(self) -> None:
        self.counts: dict[tuple[Side, str], int] = {}

    def count(self, side: Side, reason: str) -> None:
        """One more."""
        self.counts[side, reason] = self.counts.get((side, reason), 0) + 1

    def of(self, reason: str) -> int:
        """How many there were for `reason`, on both sides."""
        return sum(count for (_, each), count in self.counts.items() if each == reason)
