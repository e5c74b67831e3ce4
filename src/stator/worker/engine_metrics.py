"""An engine's own metrics on the worker's page (`spec/45 §8.4`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from stator.protocol.ids import EndpointId
from stator.telemetry import Counter, Family, MetricsLevel
from stator.telemetry.metric_set import SERIES_LIMIT
from stator.telemetry.names import Label

__all__ = ["EngineMetrics", "ModelLevel", "ModelMetrics", "own_counters"]


class EngineMetrics(Protocol):
    """Handed to `LLMEngine.register_metrics`."""

    @property
    def labels(self) -> Mapping[str, str]:
        """What the worker's own series are labelled with: `dynamo_namespace`, `dynamo_component`, `dynamo_endpoint`, `worker_id` (hex),
        `model`, `model_name`.
        """
        ...

    @property
    def level(self) -> MetricsLevel:
        """Where metrics are created that get those labels."""
        ...

    def on_scrape(self, text: Callable[[], str]) -> None:
        """Append what `text` returns, in the Prometheus text format, to every scrape. One that raises is logged and left out."""
        ...


class ModelLevel(MetricsLevel):
    """The level of one worker: that of its endpoint, and each metric says which model. `remove` it at the worker's end."""

    def __init__(self, parent: MetricsLevel, endpoint: EndpointId, *, worker_id: int, model: str, model_name: str) -> None:
        names = (
            (Label.NAMESPACE, endpoint.namespace),
            (Label.COMPONENT, endpoint.component),
            (Label.ENDPOINT, endpoint.name),
        )
        super().__init__(names, worker_id=worker_id, parent=parent)
        self.model_labels = tuple(
            (label.value, text) for label, text in ((Label.MODEL, model), (Label.MODEL_NAME, model_name)) if text
        )
        """`model` and `model_name`; an empty one gives no label"""

    def auto_labels(self) -> dict[str, str]:
        return super().auto_labels() | dict(self.model_labels)


class ModelMetrics:
    """`EngineMetrics` on a `ModelLevel`."""

    def __init__(self, level: ModelLevel) -> None:
        self._level = level

    @property
    def labels(self) -> Mapping[str, str]:
        return self._level.auto_labels()

    @property
    def level(self) -> MetricsLevel:
        return self._level

    def on_scrape(self, text: Callable[[], str]) -> None:
        self._level.on_exposition(text)


def own_counters(level: MetricsLevel, name: str, help: str, label_names: Sequence[str] = ()) -> Family[Counter]:
    """Counters under a whole name of our own, with the labels of `level`."""
    family = Family(name, tuple(label_names), Counter, SERIES_LIMIT)
    return level.register("counter", name, help, family, tuple(level.auto_labels().items()))
