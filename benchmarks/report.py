"""What a question is asked with (`Plan`) and what it answers (`Report`): samples, medians, ratios, verdicts."""

import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

__all__ = ["Plan", "Report", "Row", "Samples", "Target", "Verdict"]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much work to do. `contenders` are names; empty means all."""

    repeats: int = 5
    quick: bool = False
    contenders: tuple[str, ...] = ()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measured quantity. `metric` is the figure of the main table; `beside` go into the table below it."""

    name: str
    title: str
    metric: str
    unit: str
    digits: int = 0
    beside: tuple[str, ...] = ()


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a contender must reach in a row.

    `limit` bounds the ratio to the better of `against` (the one whose median is better) or, with nobody to compare with,
    the value itself.
    """

    row: str
    contender: str
    sense: Literal["at least", "at most"]
    limit: float
    against: tuple[str, ...] = ()
    wording: str

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.sense == "at least" else value <= self.limit


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A target with what was measured: the contender compared with, and the ratio to it, or the value itself without one.

    Both are None when one of the two was not measured: the target is then not met.
    """

    target: Target
    peer: str | None = None
    value: float | None = None

    @property
    def met(self) -> bool:
        return self.value is not None and self.target.holds(self.value)


class Samples:
    """Metrics by row, contender and repeat."""

    def __init__(self) -> None:
        self._metrics: dict[tuple[str, str], dict[int, dict[str, float]]] = {}

    def add(self, row: str, contender: str, repeat: int, metrics: dict[str, float]) -> None:
        self._metrics.setdefault((row, contender), {})[repeat] = metrics

    def void(self, contender: str) -> None:
        """Forget a contender that failed or answered wrongly: its figures mean nothing."""
        self._metrics = {key: metrics for key, metrics in self._metrics.items() if key[1] != contender}

    def of(self, row: str, contender: str) -> list[dict[str, float]]:
        """The metrics of every repeat that succeeded."""
        return list(self._metrics.get((row, contender), {}).values())

    def median(self, row: str, contender: str, metric: str) -> float | None:
        """Median over the repeats; None if nothing was measured."""
        values = [metrics[metric] for metrics in self.of(row, contender) if metric in metrics]
        return statistics.median(values) if values else None

    def ratio(self, row: str, contender: str, peer: str, metric: str) -> float | None:
        """Median over the repeats of contender ÷ peer.

        Each ratio is taken inside one repeat, where the two ran one after the other: drift of the machine cancels.
        """
        found = self.ratios(row, contender, peer, metric)
        return statistics.median(found.values()) if found else None

    def ratios(self, row: str, contender: str, peer: str, metric: str) -> dict[int, float]:
        """Contender ÷ peer in each repeat that has both."""
        ours, theirs = self._metrics.get((row, contender), {}), self._metrics.get((row, peer), {})
        both = [repeat for repeat in ours if repeat in theirs and theirs[repeat][metric]]
        return {i: ours[i][metric] / theirs[i][metric] for i in both}


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one question."""

    name: str
    question: str
    method: Sequence[str]
    rows: Sequence[Row]
    contenders: Sequence[tuple[str, str]]
    """name and label, in the order of the columns"""
    samples: Samples
    targets: Sequence[Target] = ()
    unavailable: dict[str, str]
    """name of a contender that was not measured, or not to the end, and the reason"""

    def verdicts(self) -> list[Verdict]:
        """One per target."""
        rows = {row.name: row for row in self.rows}
        return [self._judge(target, rows[target.row].metric) for target in self.targets]

    def _judge(self, target: Target, metric: str) -> Verdict:
        if not target.against:
            return Verdict(target=target, value=self.samples.median(target.row, target.contender, metric))
        medians = {name: self.samples.median(target.row, name, metric) for name in target.against}
        known = {name: value for name, value in medians.items() if value is not None}
        if not known:
            return Verdict(target=target)
        peer = (max if target.sense == "at least" else min)(known, key=lambda name: known[name])
        return Verdict(target=target, peer=peer, value=self.samples.ratio(target.row, target.contender, peer, metric))
