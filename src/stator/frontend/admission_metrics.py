"""What admission counts, beside the reference's families: who waits, how long, and why others were refused."""

from collections.abc import Mapping

from stator.frontend.permit import Priority
from stator.telemetry import MetricSet

__all__ = ["AdmissionMetrics"]

_WAIT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class AdmissionMetrics:
    """Families of one frontend's page."""

    def __init__(self, page: MetricSet) -> None:
        self._waiting = page.gauges(
            "stator_frontend_waiting_calls", "Engine calls that wait for a place at a worker", ("model", "priority")
        )
        self._waits = page.histograms(
            "stator_frontend_queue_wait_seconds",
            "How long engine calls waited for a place at a worker, those that had to",
            ("model", "priority"),
            _WAIT,
        )
        self._refusals = page.counters(
            "stator_frontend_refusals_total", "Requests refused because all workers are at capacity", ("model", "reason")
        )

    def waited(self, model: str, priority: Priority, seconds: float) -> None:
        """A call that had to wait was let in."""
        self._waits.labels(model, priority.label).observe(seconds)

    def refused(self, model: str, reason: str) -> None:
        """A request was refused."""
        self._refusals.labels(model, reason).inc()

    def show(self, waiting: Mapping[tuple[str, Priority], int]) -> None:
        """Bring the gauges up to date. `waiting` is how many calls wait, by model and class; 0 for all others."""
        for _, gauge in self._waiting.series():
            gauge.set(0)
        for (model, priority), calls in waiting.items():
            self._waiting.labels(model, priority.label).set(calls)
