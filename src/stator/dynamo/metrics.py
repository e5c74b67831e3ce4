"""Metrics of an endpoint, for its author."""

from collections.abc import Callable, Sequence
from typing import Any

from stator.dynamo.errors import InvalidType
from stator.dynamo.membership import Membership
from stator.protocol.ids import EndpointId
from stator.telemetry import Counter, Family, Gauge, Histogram, MetricsLevel

__all__ = ["RuntimeMetrics"]

Labels = Sequence[tuple[str, str]]


class RuntimeMetrics:
    """Registers what the page of the process shows besides the metrics of requests.

    The reference's 1.3.1 has `register_prometheus_expfmt_callback` alone. The makers of metrics are Stator's; they need a connected
    runtime and raise `UsageError` for names and labels as the reference words it.
    """

    __slots__ = ("_endpoint", "_membership")

    def __init__(self, membership: Membership, endpoint: EndpointId) -> None:
        self._membership = membership
        self._endpoint = endpoint

    @property
    def _level(self) -> MetricsLevel:
        return self._membership.now("making a metric").endpoint(str(self._endpoint)).metrics

    def register_prometheus_expfmt_callback(self, callback: Callable[[], str]) -> None:
        """Append what `callback` returns, Prometheus text, to each page, as it is. If it raises, that is logged and it adds nothing."""
        if not callable(callback):
            raise InvalidType(f"the callback must be callable, not {type(callback).__name__}")
        path = str(self._endpoint)
        self._membership.when_connected(lambda runtime: runtime.endpoint(path).metrics.on_exposition(callback))

    def create_counter(self, name: str, help: str, labels: Labels = ()) -> Counter:
        """A counter `dynamo_component_{name}` with the endpoint's labels and `labels`."""
        return self._level.create_counter(name, help, labels)

    def create_gauge(self, name: str, help: str, labels: Labels = ()) -> Gauge:
        """A gauge."""
        return self._level.create_gauge(name, help, labels)

    def create_histogram(
        self, name: str, help: str, labels: Labels = (), *, buckets: Sequence[float] | None = None
    ) -> Histogram:
        """A histogram; `buckets` are upper bounds."""
        return self._level.create_histogram(name, help, labels, buckets=buckets)

    def create_counter_vec(self, name: str, help: str, label_names: Sequence[str], labels: Labels = ()) -> Family[Any]:
        """Counters told apart by `label_names`."""
        return self._level.create_counter_vec(name, help, label_names, labels)

    def create_gauge_vec(self, name: str, help: str, label_names: Sequence[str], labels: Labels = ()) -> Family[Any]:
        """Gauges told apart by `label_names`."""
        return self._level.create_gauge_vec(name, help, label_names, labels)
