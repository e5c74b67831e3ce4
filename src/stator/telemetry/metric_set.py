"""Metrics that are registered, shown and removed together, and the sets below them (`spec/30 §1, §3, §4`).

A `MetricSet` knows whole names and no labels of its own: process-wide metrics and a frontend's page are made of it, and each
level of the hierarchy is one. All happens on one thread, that of the event loop, without a lock.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from stator.errors import UsageError
from stator.telemetry.exposition import Entry, Kind, Pairs, encode, join_texts, label_text, merge
from stator.telemetry.metric import Counter, Family, Gauge, Histogram, M

__all__ = ["DEFAULT_BUCKETS", "SERIES_LIMIT", "MetricSet", "histogram_family"]

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""of a histogram that names none"""
SERIES_LIMIT = 1000
"""series of one family at one level, unless it says otherwise; what is beyond is counted in one series `other`"""

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_SHOWN_DROPS = 5


class MetricSet:
    """Entries, sets below, and callbacks. `exposition` shows this set and all below it."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, Pairs], Entry] = {}
        self._names: dict[str, Entry] = {}
        self._children: list[MetricSet] = []
        self._updates: list[Callable[[], None]] = []
        self._texts: list[Callable[[], str]] = []
        self._dropped: set[tuple[str, Pairs]] = set()

    def counter(self, name: str, help: str) -> Counter:
        """A new counter; it is on the page with 0 at once."""
        return self.counters(name, help, ()).labels()

    def gauge(self, name: str, help: str) -> Gauge:
        """A new gauge; it is on the page with 0 at once."""
        return self.gauges(name, help, ()).labels()

    def histogram(self, name: str, help: str, bounds: Sequence[float]) -> Histogram:
        """A new histogram; it is on the page with 0 at once."""
        return self.histograms(name, help, (), bounds).labels()

    def counters(self, name: str, help: str, label_names: Sequence[str], *, limit: int = SERIES_LIMIT) -> Family[Counter]:
        """New counters told apart by `label_names`; absent from the page until there is a series."""
        return self.register("counter", name, help, Family(name, tuple(label_names), Counter, limit))

    def gauges(self, name: str, help: str, label_names: Sequence[str], *, limit: int = SERIES_LIMIT) -> Family[Gauge]:
        """New gauges told apart by `label_names`; absent from the page until there is a series."""
        return self.register("gauge", name, help, Family(name, tuple(label_names), Gauge, limit))

    def histograms(
        self, name: str, help: str, label_names: Sequence[str], bounds: Sequence[float], *, limit: int = SERIES_LIMIT
    ) -> Family[Histogram]:
        """New histograms told apart by `label_names`; absent from the page until there is a series."""
        return self.register("histogram", name, help, histogram_family(name, tuple(label_names), bounds, limit))

    def register(self, kind: Kind, name: str, help: str, family: Family[M], constant: Pairs = ()) -> Family[M]:
        """Put `family` on the page as `name`, with `constant` labels on each series.

        Raises `UsageError` for a name or label that Prometheus does not allow, and if the set has a metric of this name
        with the same constant labels, or with other help, type or label names.
        """
        labels = [label for label, _ in constant] + list(family.label_names)
        if not _NAME.fullmatch(name):
            raise UsageError(f"Error: '{name}' is not a valid metric name")
        for label in labels:
            if not _LABEL.fullmatch(label) or (kind == "histogram" and label == "le"):
                raise UsageError(f"Error: '{label}' is not a valid label name")
        if len(set(labels)) != len(labels):
            raise UsageError(f"Error: metric '{name}' has a label twice: {', '.join(labels)}")
        entry = Entry(name=name, kind=kind, help=help, constant=tuple(sorted(constant)), family=family)
        if (name, entry.constant) in self._entries:
            raise UsageError(f"Failed to register metric: '{name}' with these labels is registered at this level already")
        first = self._names.setdefault(name, entry)
        if _shape(first) != _shape(entry):
            raise UsageError(f"Failed to register metric: '{name}' has other help, type or label names at this level already")
        self._entries[name, entry.constant] = entry
        if not family.label_names:
            family.labels()
        return family

    def attach(self, child: "MetricSet") -> None:
        """Show `child` and all below it after this set. A set that is there already is not added again."""
        if not any(found is child for found in self._children):
            self._children.append(child)

    def detach(self, child: "MetricSet") -> None:
        """Show `child` no longer, e.g. when an endpoint is no longer served. Idempotent."""
        self._children[:] = [found for found in self._children if found is not child]

    def on_update(self, update: Callable[[], None]) -> Callable[[], None]:
        """Call `update` before each scrape. If it raises, that is logged and the page is shown. Returns what takes it back."""
        self._updates.append(update)
        return lambda: _remove(self._updates, update)

    def on_exposition(self, text: Callable[[], str]) -> Callable[[], None]:
        """Append what `text` returns to each page, as it is: neither merged nor checked.

        If it raises, that is logged and it adds nothing. Returns what takes it back.
        """
        self._texts.append(text)
        return lambda: _remove(self._texts, text)

    def walk(self) -> Iterator["MetricSet"]:
        """This set and all below it, depth first, each once."""
        seen: set[int] = set()
        waiting: list[MetricSet] = [self]
        while waiting:
            one = waiting.pop()
            if id(one) not in seen:
                seen.add(id(one))
                yield one
                waiting.extend(reversed(one._children))

    def exposition(self) -> bytes:
        """The page of this set and all below it, in UTF-8.

        Raises `UsageError` if a family has not the same help and type in all of them.
        """
        sets = list(self.walk())
        for one in sets:
            one._update()
        page = merge([list(one._entries.values()) for one in sets])
        self._warn(page.dropped)
        texts = [text for one in sets for text in one._read_texts()]
        return join_texts([encode(page.families), *texts]).encode("utf-8", "replace")

    def _update(self) -> None:
        for update in list(self._updates):
            try:
                update()
            except Exception:
                log.exception("update callback raised")

    def _read_texts(self) -> Iterator[str]:
        for read in list(self._texts):
            try:
                text = read()
                if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callbacks come from users
                    raise TypeError(f"expected text, got {type(text).__name__}")
            except Exception:
                log.exception("expfmt callback raised")
            else:
                yield text

    def _warn(self, dropped: list[tuple[str, Pairs]]) -> None:
        """Once per duplicate: the next scrapes would say the same."""
        new = [one for one in dropped if one not in self._dropped]
        self._dropped = set(dropped)
        if new:
            shown = [f"{name}{label_text(labels)}" for name, labels in new[:_SHOWN_DROPS]]
            more = f" and {len(new) - _SHOWN_DROPS} more" if len(new) > _SHOWN_DROPS else ""
            log.warning(
                "Duplicate Prometheus series while merging registries; dropping later sample: %s%s", ", ".join(shown), more
            )


def histogram_family(
    name: str, label_names: tuple[str, ...], bounds: Sequence[float], limit: int = SERIES_LIMIT
) -> Family[Histogram]:
    """A family with these upper bounds; the one for +Inf is always added. Raises `UsageError` if they do not ascend."""
    ends = tuple(bounds)
    if not ends or list(ends) != sorted(set(ends)) or not all(map(math.isfinite, ends)):
        raise UsageError(f"metric {name}: bucket bounds {ends} must be finite and ascend")
    return Family(name, label_names, lambda: Histogram(ends), limit)


def _shape(entry: Entry) -> tuple[object, ...]:
    return entry.kind, entry.help, sorted([*(name for name, _ in entry.constant), *entry.family.label_names])


def _remove(callbacks: list[T], callback: T) -> None:
    callbacks[:] = [found for found in callbacks if found is not callback]
