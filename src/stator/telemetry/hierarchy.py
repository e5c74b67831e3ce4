"""The levels of the reference: runtime, namespace, component, endpoint (`spec/30 §1, §2`).

A level knows labels, not components: it puts its own and those above it on every metric created there, under a name that begins
with `dynamo_component_`. A metric is held by the level that created it, and a scrape of a level shows it and all below.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from stator.errors import UsageError
from stator.telemetry.exposition import Kind, Pairs
from stator.telemetry.metric import Counter, Family, Gauge, Histogram
from stator.telemetry.metric_set import DEFAULT_BUCKETS, SERIES_LIMIT, MetricSet, histogram_family
from stator.telemetry.names import AUTO_LABELS, Label, component_metric_name, sanitize_label

__all__ = ["CreateKind", "IntCounter", "IntGauge", "MetricsLevel"]

CreateKind = Literal[
    "counter", "int_counter", "gauge", "int_gauge", "histogram", "counter_vec", "int_counter_vec", "gauge_vec", "int_gauge_vec"
]
Labels = Sequence[tuple[str, str]]


class IntCounter(Counter):
    """A counter of whole things."""

    __slots__ = ()

    def inc(self, amount: float = 1) -> None:
        """Add the whole number `amount` ≥ 0, else `UsageError`."""
        if not isinstance(amount, int) or amount < 0:
            raise UsageError(f"an int counter grows by whole numbers, not by {amount!r}")
        self.value += amount


class IntGauge(Gauge):
    """A gauge of whole things."""

    __slots__ = ()

    def set(self, value: float) -> None:
        """Set to a whole number, else `UsageError`."""
        self.value = _whole(value)

    def inc(self, amount: float = 1) -> None:
        """Add a whole number, else `UsageError`."""
        self.value += _whole(amount)

    def dec(self, amount: float = 1) -> None:
        """Subtract a whole number, else `UsageError`."""
        self.value -= _whole(amount)


_KINDS: dict[CreateKind, tuple[Kind, Callable[[], Any] | None]] = {
    "counter": ("counter", Counter),
    "int_counter": ("counter", IntCounter),
    "gauge": ("gauge", Gauge),
    "int_gauge": ("gauge", IntGauge),
    "histogram": ("histogram", None),
    "counter_vec": ("counter", Counter),
    "int_counter_vec": ("counter", IntCounter),
    "gauge_vec": ("gauge", Gauge),
    "int_gauge_vec": ("gauge", IntGauge),
}
"""how each kind is shown, and what makes one series of it"""


class MetricsLevel(MetricSet):
    """One level. `MetricsLevel.runtime(worker_id=…)` is the root; `namespace`, `component` and `endpoint` go down.

    Each call of those makes a level of its own, shown from then on until it is removed: who serves an endpoint a second time
    has two levels with the same labels, of which the first is shown.
    """

    def __init__(self, names: Pairs = (), *, worker_id: int = 0, parent: "MetricsLevel | None" = None) -> None:
        """`names` are the auto labels with their raw values. Use `runtime` and the methods below it."""
        super().__init__()
        self._auto = names
        self._worker_id = worker_id
        self._parent = parent
        if parent is not None:
            parent.attach(self)

    @classmethod
    def runtime(cls, *, worker_id: int = 0) -> "MetricsLevel":
        """A root. `worker_id` is the instance id; 0 means none and gives no label."""
        return cls(worker_id=worker_id)

    def namespace(self, name: str) -> "MetricsLevel":
        """The level of a namespace below the runtime, or of one below a namespace, which keeps the outer one's label."""
        if self._has(Label.NAMESPACE) and not self._has(Label.COMPONENT):
            return MetricsLevel(self._auto, worker_id=self._worker_id, parent=self)
        return self._below(Label.NAMESPACE, name, after=None)

    def component(self, name: str) -> "MetricsLevel":
        """The level of a component below a namespace."""
        return self._below(Label.COMPONENT, name, after=Label.NAMESPACE)

    def endpoint(self, name: str) -> "MetricsLevel":
        """The level of an endpoint below a component."""
        return self._below(Label.ENDPOINT, name, after=Label.COMPONENT)

    def remove(self) -> None:
        """Show this level and all below it no longer. Idempotent."""
        if self._parent is not None:
            self._parent.detach(self)

    def auto_labels(self) -> dict[str, str]:
        """What each metric of this level carries; empty names give no label. Raises `UsageError` as `sanitize_label`."""
        labels = {label: sanitize_label(raw) for label, raw in self._auto if raw}
        if self._worker_id:
            labels[Label.WORKER_ID] = format(self._worker_id, "x")
        return labels

    def create_counter(self, name: str, help: str, labels: Labels = ()) -> Counter:
        """A counter at this level."""
        return self.create("counter", name, help, labels).labels()

    def create_int_counter(self, name: str, help: str, labels: Labels = ()) -> IntCounter:
        """A counter of whole numbers at this level."""
        return self.create("int_counter", name, help, labels).labels()

    def create_gauge(self, name: str, help: str, labels: Labels = ()) -> Gauge:
        """A gauge at this level."""
        return self.create("gauge", name, help, labels).labels()

    def create_int_gauge(self, name: str, help: str, labels: Labels = ()) -> IntGauge:
        """A gauge of whole numbers at this level."""
        return self.create("int_gauge", name, help, labels).labels()

    def create_histogram(
        self, name: str, help: str, labels: Labels = (), *, buckets: Sequence[float] | None = None
    ) -> Histogram:
        """A histogram at this level; `buckets` are upper bounds, `DEFAULT_BUCKETS` without."""
        return self.create("histogram", name, help, labels, buckets=buckets).labels()

    def create_counter_vec(self, name: str, help: str, label_names: Sequence[str], labels: Labels = ()) -> Family[Counter]:
        """Counters told apart by `label_names` at this level."""
        return self.create("counter_vec", name, help, labels, label_names=label_names)

    def create_int_counter_vec(
        self, name: str, help: str, label_names: Sequence[str], labels: Labels = ()
    ) -> Family[IntCounter]:
        """Counters of whole numbers told apart by `label_names` at this level."""
        return self.create("int_counter_vec", name, help, labels, label_names=label_names)

    def create_gauge_vec(self, name: str, help: str, label_names: Sequence[str], labels: Labels = ()) -> Family[Gauge]:
        """Gauges told apart by `label_names` at this level."""
        return self.create("gauge_vec", name, help, labels, label_names=label_names)

    def create_int_gauge_vec(self, name: str, help: str, label_names: Sequence[str], labels: Labels = ()) -> Family[IntGauge]:
        """Gauges of whole numbers told apart by `label_names` at this level."""
        return self.create("int_gauge_vec", name, help, labels, label_names=label_names)

    def create(
        self,
        kind: CreateKind,
        name: str,
        help: str,
        labels: Labels = (),
        *,
        label_names: Sequence[str] | None = None,
        buckets: Sequence[float] | None = None,
    ) -> Family[Any]:
        """A metric of any kind, checked in the reference's order (`spec/30 §2`). Raises `UsageError`, and then nothing is left.

        `labels` are constant. Their keys are taken as they are and must be label names; their values are free text.
        """
        if twice := _first_twice([key for key, _ in labels]):
            raise UsageError(f"Duplicate label key '{twice}' found in labels")
        full_name = component_metric_name(name)
        for key, _ in labels:
            if key in AUTO_LABELS:
                raise UsageError(f"Label '{key}' is automatically added by auto-label injection and cannot be manually set")
        for key in label_names or ():
            if key in AUTO_LABELS:
                raise UsageError(f"Variable label name '{key}' conflicts with auto-injected const label and cannot be used")
        constant = (*self.auto_labels().items(), *labels)
        shown, make = _KINDS[kind]
        _check_arguments(kind, full_name, label_names=label_names, buckets=buckets)
        names = tuple(label_names or ())
        family: Family[Any]
        if make is None:
            family = histogram_family(full_name, names, DEFAULT_BUCKETS if buckets is None else buckets)
        else:
            family = Family[Any](full_name, names, make, SERIES_LIMIT)
        return self.register(shown, full_name, help, family, constant)

    def _has(self, label: str) -> bool:
        return any(found == label for found, _ in self._auto)

    def _below(self, label: Label, name: str, *, after: Label | None) -> "MetricsLevel":
        here = self._auto[-1][0] if self._auto else None
        if here != after:
            raise UsageError(f"a level labelled {label} cannot be below one labelled {here}: go down one step at a time")
        return MetricsLevel((*self._auto, (label, name)), worker_id=self._worker_id, parent=self)


def _check_arguments(
    kind: CreateKind, name: str, *, label_names: Sequence[str] | None, buckets: Sequence[float] | None
) -> None:
    if buckets is not None and kind != "histogram":
        raise UsageError(f"metric {name}: buckets belong to a histogram, not to {kind}")
    if kind.endswith("_vec"):
        if not label_names:
            raise UsageError(f"metric {name}: {kind} needs label names")
    elif label_names is not None:
        raise UsageError(f"metric {name}: label names belong to a vec, not to {kind}")


def _first_twice(keys: list[str]) -> str:
    return next((key for position, key in enumerate(keys) if key in keys[:position]), "")


def _whole(value: float) -> int:
    if not isinstance(value, int):
        raise UsageError(f"an int gauge holds whole numbers, not {value!r}")
    return value
