"""A page for Prometheus out of metrics that several registries hold (`spec/30 §4`). Pure: entries in, text out.

A page is read a few times a minute and the numbers change ten thousand times a second, so all work is done here, at the scrape.
"""

import math
from collections.abc import Iterable
from decimal import Decimal
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import msgspec

from stator.errors import UsageError
from stator.telemetry.metric import Counter, Family, Gauge, Histogram

__all__ = [
    "CONTENT_TYPE",
    "Entry",
    "Kind",
    "MergedFamily",
    "Page",
    "Pairs",
    "encode",
    "join_texts",
    "label_text",
    "merge",
    "number_text",
]

CONTENT_TYPE = "text/plain; charset=utf-8"
"""of every page, without a version, as the reference says it (`spec/30 §4`)"""

Kind = Literal["counter", "gauge", "histogram"]
Pairs = tuple[tuple[str, str], ...]
"""label names and values"""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One metric as registered: `constant` labels are on each of its series, sorted by name."""

    name: str
    kind: Kind
    help: str
    constant: Pairs
    family: Family[Any]

    def series(self) -> list[tuple[Pairs, Counter | Gauge | Histogram]]:
        """Labels, sorted by name, and number of each series."""
        names = self.family.label_names
        if not names:
            return [(self.constant, metric) for _, metric in self.family.series()]
        return [
            (tuple(sorted((*self.constant, *zip(names, values, strict=True)))), metric)
            for values, metric in self.family.series()
        ]


class MergedFamily(msgspec.Struct, kw_only=True):
    """All series of one name, in the order of the page."""

    name: str
    kind: Kind
    help: str
    series: dict[Pairs, Counter | Gauge | Histogram]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Families sorted by name, and the series left out because another one has the same labels: (name, labels)."""

    families: list[MergedFamily]
    dropped: list[tuple[str, Pairs]]


def merge(registries: Iterable[Iterable[Entry]]) -> Page:
    """Join the families of several registries, of which the first ones win.

    Within a registry the series of a family are sorted by their label values, as the reference shows them. Families
    without series do not count. Raises `UsageError` if a family has not the same help and type everywhere.
    """
    families: dict[str, MergedFamily] = {}
    dropped: list[tuple[str, Pairs]] = []
    for index, registry in enumerate(registries):
        for entry, series in _by_values(registry):
            family = families.get(entry.name)
            if family is None:
                family = families[entry.name] = MergedFamily(name=entry.name, kind=entry.kind, help=entry.help, series={})
            elif (family.kind, family.help) != (entry.kind, entry.help):
                raise UsageError(f"Metric family '{entry.name}' has inconsistent help/type across registries (idx={index})")
            labels, metric = series
            if family.series.setdefault(labels, metric) is not metric:
                dropped.append((entry.name, labels))
    return Page(families=[families[name] for name in sorted(families)], dropped=dropped)


def _by_values(registry: Iterable[Entry]) -> list[tuple[Entry, tuple[Pairs, Counter | Gauge | Histogram]]]:
    found = [(entry, series) for entry in registry for series in entry.series()]
    found.sort(key=lambda one: (one[0].name, len(one[1][0]), [value for _, value in one[1][0]]))
    return found


def encode(families: Iterable[MergedFamily]) -> str:
    """The text: HELP and TYPE once per family, then its series."""
    lines: list[str] = []
    for family in families:
        if family.help:
            lines.append(f"# HELP {family.name} {_escape(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for pairs, metric in family.series.items():
            labels = ",".join([_pair_text(name, value) for name, value in pairs])
            if isinstance(metric, Histogram):
                _encode_histogram(lines, family.name, labels, metric)
            else:
                lines.append(f"{family.name}{_braced(labels)} {number_text(metric.value)}")
    return "".join([f"{line}\n" for line in lines])


def _encode_histogram(lines: list[str], name: str, labels: str, metric: Histogram) -> None:
    before = f"{name}_bucket{{{labels}," if labels else f"{name}_bucket{{"
    cumulated = list(accumulate(metric.counts))
    for bound, count in zip(_bound_texts(metric.bounds), cumulated, strict=True):
        lines.append(f'{before}le="{bound}"}} {count}')
    lines.append(f"{name}_sum{_braced(labels)} {number_text(metric.total)}")
    lines.append(f"{name}_count{_braced(labels)} {cumulated[-1]}")


@lru_cache(maxsize=256)
def _bound_texts(bounds: tuple[float, ...]) -> tuple[str, ...]:
    """The upper ends of all buckets; many histograms have the same."""
    return (*map(number_text, bounds), "+Inf")


@lru_cache(maxsize=4096)
def _pair_text(name: str, value: str) -> str:
    """One label; the levels' own are on every line."""
    return f'{name}="{_escape_value(value)}"'


def join_texts(texts: Iterable[str]) -> str:
    """One text; a newline comes between two if the first does not end in one."""
    page = ""
    for text in texts:
        if text:
            page = f"{page}\n{text}" if page and not page.endswith("\n") else page + text
    return page


def number_text(value: float) -> str:
    """Shortest form without exponent, whole numbers without point."""
    if isinstance(value, int):
        return str(int(value))
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    text = repr(value)
    return format(Decimal(text), "f") if "e" in text else text.removesuffix(".0")


def label_text(pairs: Pairs) -> str:
    """Labels as on the page, for log lines."""
    return _braced(",".join(_pair_text(name, value) for name, value in pairs))


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _escape_value(text: str) -> str:
    return _escape(text).replace('"', '\\"')
