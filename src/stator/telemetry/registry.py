"""The tree of metrics, shown to Prometheus when it asks.

Each level has constant labels (the runtime's worker id, below it a namespace, a component, an endpoint) and holds the
metrics created there; a scrape walks the tree and joins families of one name. The root owns a `CollectorRegistry` of its own,
never the process-wide one, so that two runtimes in a process do not mix; a foreign collector is registered there too
(`registry.prometheus`).

Metrics are plain numbers: counting costs an addition. All happens on one thread, that of the event loop, without a lock.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import accumulate
from typing import Any, Literal

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from stator.errors import UsageError
from stator.telemetry.metric import Counter, Family, Gauge, Histogram, M

__all__ = ["CONTENT_TYPE", "MetricRegistry"]

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")


class _Declaration(msgspec.Struct, frozen=True):
    """What must be the same wherever a name is used."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    bounds: tuple[float, ...] = ()


class _Reading(msgspec.Struct, frozen=True):
    """A number that somebody else keeps, asked for when scraped."""

    read: Callable[[], float]


Entry = Family[Any] | _Reading


class MetricRegistry:
    """One level of the tree: `MetricRegistry({"worker_id": "2f7d"})` is a root, `root.child(endpoint="e")` below it."""

    def __init__(self, labels: Mapping[str, str] | None = None, *, parent: "MetricRegistry | None" = None) -> None:
        """Use `child` for a level below another."""
        _check_labels(labels or {}, taken=parent.labels if parent else {})
        self.labels: Mapping[str, str] = {**(parent.labels if parent else {}), **(labels or {})}
        self.prometheus = parent.prometheus if parent else CollectorRegistry()
        self._parent = parent
        self._children: dict[tuple[tuple[str, str], ...], MetricRegistry] = {}
        self._declared: dict[str, _Declaration] = parent._declared if parent else {}
        self._entries: dict[str, Entry] = {}
        if parent is None:
            self.prometheus.register(_TreeCollector(self._collect))

    def child(self, **labels: str) -> "MetricRegistry":
        """The level below with these labels beside ours; the same object each time, until it is removed."""
        key = tuple(sorted(labels.items()))
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = MetricRegistry(labels, parent=self)
        return child

    def remove(self) -> None:
        """Take this level and all below it off the page, e.g. when an endpoint is no longer served. Idempotent."""
        if self._parent is not None:
            siblings = self._parent._children
            for key in [key for key, child in siblings.items() if child is self]:
                del siblings[key]

    def counter(self, name: str, help: str) -> Counter:
        """The counter of this name at this level. Counters end in `_total`."""
        return self.counters(name, help, ()).labels()

    def gauge(self, name: str, help: str) -> Gauge:
        """The gauge of this name at this level."""
        return self.gauges(name, help, ()).labels()

    def histogram(self, name: str, help: str, bounds: Sequence[float]) -> Histogram:
        """The histogram of this name at this level."""
        return self.histograms(name, help, (), bounds).labels()

    def counters(self, name: str, help: str, label_names: Sequence[str], *, limit: int = 1000) -> Family[Counter]:
        """Counters told apart by `label_names`; at most `limit` series."""
        return self._family(name, _Declaration("counter", help), label_names, Counter, limit)

    def gauges(self, name: str, help: str, label_names: Sequence[str], *, limit: int = 1000) -> Family[Gauge]:
        """Gauges told apart by `label_names`; at most `limit` series."""
        return self._family(name, _Declaration("gauge", help), label_names, Gauge, limit)

    def histograms(
        self, name: str, help: str, label_names: Sequence[str], bounds: Sequence[float], *, limit: int = 1000
    ) -> Family[Histogram]:
        """Histograms told apart by `label_names`; at most `limit` series."""
        ends = tuple(float(bound) for bound in bounds)
        if not ends or list(ends) != sorted(set(ends)) or not all(map(math.isfinite, ends)):
            raise UsageError(f"metric {name}: bucket bounds {ends} must be finite and ascend")
        return self._family(name, _Declaration("histogram", help, ends), label_names, lambda: Histogram(ends), limit)

    def reading(self, name: str, help: str, read: Callable[[], float], *, kind: Literal["counter", "gauge"] = "gauge") -> None:
        """A number kept elsewhere: `read` is called at each scrape. If it raises, the series is left out of that page."""
        self._declare(name, _Declaration(kind, help))
        if name in self._entries:
            raise UsageError(f"metric {name} exists at this level already")
        self._entries[name] = _Reading(read)

    def exposition(self) -> bytes:
        """The page of the whole tree in Prometheus text format (`CONTENT_TYPE`)."""
        return generate_latest(self.prometheus)

    def _family(
        self, name: str, declaration: _Declaration, label_names: Sequence[str], make: Callable[[], M], limit: int
    ) -> Family[M]:
        self._declare(name, declaration)
        names = tuple(label_names)
        found = self._entries.get(name)
        if found is None:
            _check_labels(dict.fromkeys(names, ""), taken=self.labels)
            found = self._entries[name] = Family(name, names, make, limit)
        if not isinstance(found, Family) or found.label_names != names:
            raise UsageError(f"metric {name} exists at this level with other labels")
        return found

    def _declare(self, name: str, declaration: _Declaration) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is not a metric name")
        if (declaration.kind == "counter") != name.endswith("_total"):
            raise UsageError(f"metric {name}: counters end in _total, and nothing else does")
        if self._declared.setdefault(name, declaration) != declaration:
            raise UsageError(f"metric {name} is declared differently elsewhere: {self._declared[name]}")

    def _walk(self) -> Iterator["MetricRegistry"]:
        yield self
        for child in list(self._children.values()):
            yield from child._walk()

    def _collect(self) -> Iterator[Metric]:
        """All families of the tree, sorted by name; those without series are absent."""
        families: dict[str, Metric] = {}
        for level in self._walk():
            for name, entry in level._entries.items():
                declaration = self._declared[name]
                family = families.get(name)
                if family is None:
                    family = families[name] = Metric(name.removesuffix("_total"), declaration.help, declaration.kind)
                _add(family, name, level.labels, entry)
        return iter([families[name] for name in sorted(families) if families[name].samples])


class _TreeCollector(Collector):
    """What the `CollectorRegistry` of a root asks at each scrape."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()


def _add(family: Metric, name: str, constant: Mapping[str, str], entry: Entry) -> None:
    """Append the samples of `entry` to `family`."""
    if isinstance(entry, _Reading):
        try:
            family.add_sample(name, dict(constant), entry.read())
        except Exception:
            log.exception("metric %s cannot be read", name)
        return
    for values, metric in entry.series():
        labels = {**constant, **dict(zip(entry.label_names, values, strict=True))}
        if isinstance(metric, Histogram):
            cumulated = list(accumulate(metric.counts))
            for bound, count in zip((*map(_bound_text, metric.bounds), "+Inf"), cumulated, strict=True):
                family.add_sample(f"{name}_bucket", {**labels, "le": bound}, count)
            family.add_sample(f"{name}_sum", labels, metric.total)
            family.add_sample(f"{name}_count", labels, cumulated[-1])
        else:
            family.add_sample(name, labels, metric.value)


def _bound_text(bound: float) -> str:
    """Shortest form without exponent, whole numbers without point, as the reference prints them (`spec/30 §4`)."""
    return str(int(bound)) if bound == int(bound) else format(Decimal(repr(bound)), "f")


def _check_labels(labels: Mapping[str, str], *, taken: Mapping[str, str]) -> None:
    for name in labels:
        if not _LABEL.fullmatch(name) or name == "le":
            raise UsageError(f"{name!r} is not a label name")
        if name in taken:
            raise UsageError(f"label {name!r} is set by a level above")
