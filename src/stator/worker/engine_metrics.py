"""An engine's own metrics on the worker's page (`spec/45 §8.4`)."""

from collections.abc import Callable, Mapping
from typing import Protocol

from stator.telemetry import MetricsLevel

__all__ = ["EngineMetrics"]


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
