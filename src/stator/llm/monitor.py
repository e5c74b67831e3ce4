"""The worker monitor: hears how loaded workers are and takes those over their limit out of routing (`spec/40 §3`)."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from stator.llm.thresholds import LoadConfig, Thresholds

__all__ = ["MonitorStatistics", "RankReport", "WorkerMonitor"]


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one rank of one listed worker that has reported."""

    namespace: str
    worker_id: int
    dp_rank: int
    worker_type: str
    """`decode` or `prefill`; aggregated workers decode"""
    models: tuple[str, ...]
    active_decode_blocks: int | None
    active_prefill_tokens: int | None
    kv_used_blocks: int | None
    age: float
    """seconds since the last report"""
    busy: tuple[str, ...]
    """the models for which this rank is over a threshold; a worker is busy when all of its ranks are"""


class MonitorStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Since the monitor was made."""

    heard: int
    """load events that could be read, whoever they were about"""
    malformed: int
    """events that could not"""
    dropped: int
    """reports of ranks beyond `load.max_ranks`"""
    resubscribed: int
    """how often a subscription had to be made again"""
    workers: int
    """listed workers that have reported"""
    busy: int
    """listed workers that are busy, for one model at least"""


class WorkerMonitor:
    """`ModelDirectory.monitor`; made and fed by the directory. All methods are for the event loop's thread and never block."""

    def __init__(self, config: LoadConfig) -> None:
        self._config = config

    # -- thresholds, per model

    def thresholds(self, model: str) -> Thresholds | None:
        """Those in force for `model`; None for a model nobody serves now."""
        raise NotImplementedError

    def set_thresholds(
        self,
        model: str,
        *,
        active_decode_blocks_threshold: float | None | UnsetType = UNSET,
        active_prefill_tokens_threshold: int | None | UnsetType = UNSET,
        active_prefill_tokens_threshold_frac: float | None | UnsetType = UNSET,
    ) -> Thresholds:
        """Set what is given (None: that one does not count any more), leave the rest; the thresholds now in force.

        It acts at once, on the reports that are known. What was set is kept while the process lives, also while nobody serves the model.
        Raises `UsageError`, and changes nothing, for a model nobody serves now and for a value out of range.
        """
        raise NotImplementedError

    def all_thresholds(self) -> dict[str, Thresholds]:
        """Those in force, by name of the models served now, sorted."""
        raise NotImplementedError

    # -- for the metrics page and for people

    def snapshot(self) -> Sequence[RankReport]:
        """What is known of each rank, sorted by worker and rank."""
        raise NotImplementedError

    def statistics(self) -> MonitorStatistics:
        """Counters."""
        raise NotImplementedError
