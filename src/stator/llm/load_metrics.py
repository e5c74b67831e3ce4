"""What the monitor knows, as metrics: on the page of the process, brought up to date with each scrape (`spec/30 §8.2`)."""

from collections.abc import Generator
from contextlib import contextmanager

from stator.llm.monitor import RankReport, WorkerMonitor
from stator.telemetry import Family, Gauge, MetricSet
from stator.telemetry.names import FRONTEND_PREFIX

__all__ = ["load_metrics"]

_RANK = ("worker_id", "dp_rank", "worker_type")


class _LoadMetrics:
    """`worker_id` is decimal, as in the other families of the frontend. A rank that is known no more disappears."""

    def __init__(self, page: MetricSet, monitor: WorkerMonitor) -> None:
        self._monitor = monitor
        self._decode = page.gauges(
            f"{FRONTEND_PREFIX}_worker_active_decode_blocks", "Active KV cache decode blocks per worker", _RANK
        )
        self._prefill = page.gauges(
            f"{FRONTEND_PREFIX}_worker_active_prefill_tokens", "Active prefill tokens queued per worker", _RANK
        )
        self._used = page.gauges("stator_worker_kv_used_blocks", "KV blocks in use, as the worker last said", _RANK)
        self._busy = page.gauges("stator_busy_workers", "Workers over a limit, that get no requests of the model", ("model",))
        self._events = page.counters("stator_load_events_total", "Load events that arrived", ("outcome",))

    def show(self) -> None:
        """Bring the page up to date."""
        statistics = self._monitor.statistics()
        self._events.labels("heard").value = statistics.heard
        self._events.labels("malformed").value = statistics.malformed
        self._events.labels("dropped_rank").value = statistics.dropped
        _show(self._busy, {(model,): count for model, count in self._monitor.busy_workers().items()})
        reports = self._monitor.snapshot()
        for family, values in (
            (self._decode, [(report, report.active_decode_blocks) for report in reports]),
            (self._prefill, [(report, report.active_prefill_tokens) for report in reports]),
            (self._used, [(report, report.kv_used_blocks) for report in reports]),
        ):
            _show(family, {_labels(report): value for report, value in values if value is not None})


@contextmanager
def load_metrics(page: MetricSet, monitor: WorkerMonitor) -> Generator[None]:
    """Show on `page` what `monitor` knows, inside the block."""
    own = MetricSet()
    own.on_update(_LoadMetrics(own, monitor).show)
    page.attach(own)
    try:
        yield
    finally:
        page.detach(own)


def _show(family: Family[Gauge], values: dict[tuple[str, ...], int]) -> None:
    for labels, _ in family.series():
        if labels not in values:
            family.remove(*labels)
    for labels, value in values.items():
        family.labels(*labels).set(value)


def _labels(report: RankReport) -> tuple[str, str, str]:
    return str(report.worker_id), str(report.dp_rank), report.worker_type
