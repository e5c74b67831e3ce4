"""The door that an engine's scheduler pushes its snapshots through (`spec/45 §8.2`)."""

import logging
import threading
from collections.abc import Callable, Sequence

from stator.telemetry import MetricsLevel
from stator.worker.component_gauges import ComponentGauges
from stator.worker.engine_metrics import own_counters
from stator.worker.load_publisher import WorkerMetricsPublisher
from stator.worker.snapshot import ComponentSnapshot

__all__ = ["SnapshotPublisher"]

logger = logging.getLogger(__name__)


class _Slot:
    """What one rank said last. Stores are atomic; who reads may see the rate of one snapshot beside the blocks of the next."""

    __slots__ = ("failing", "hit_rate", "snapshot")

    def __init__(self) -> None:
        self.snapshot: ComponentSnapshot | None = None
        self.hit_rate: float | None = None
        """of the last snapshot that had one"""
        self.failing = False

    def fail(self, dp_rank: int, error: Exception) -> None:
        """Something is wrong with what the rank says: once a line, then silence."""
        level = logging.DEBUG if self.failing else logging.WARNING
        self.failing = True
        logger.log(level, "a snapshot of rank %s cannot be used, further failures are not shown: %r", dp_rank, error)

    def recover(self, dp_rank: int) -> None:
        """It is right, perhaps again."""
        if self.failing:
            self.failing = False
            logger.info("snapshots of rank %s can be used again", dp_rank)


class SnapshotPublisher:
    """Keeps the last snapshot of each declared rank: the gauges are filled from it at a scrape, the load signal is sent from it.

    One per worker. `publish` stores and returns: nothing is encoded, sent or waited for in the caller's thread.
    """

    def __init__(
        self, dp_ranks: Sequence[int], level: MetricsLevel, gauges: ComponentGauges, load: WorkerMetricsPublisher
    ) -> None:
        self._slots = {rank: _Slot() for rank in sorted(set(dp_ranks))}
        self.dp_ranks: Sequence[int] = tuple(self._slots)
        """the declared ranks, sorted"""
        self._gauges = gauges
        self._load = load
        self._strangers = 0
        self._counting = threading.Lock()
        help = "Snapshots dropped because their rank was not declared"
        self._dropped = own_counters(level, "stator_snapshots_dropped_total", help).labels()
        self._forget: Callable[[], None] = level.on_update(self._show)

    def publish(self, dp_rank: int, snapshot: ComponentSnapshot) -> None:
        """What the rank's scheduler knows now. From any thread; never blocks, never raises. An undeclared rank is dropped and counted."""
        slot = self._slots.get(dp_rank)
        if slot is None:
            self._drop(dp_rank)
            return
        try:
            slot.snapshot = snapshot
            if snapshot.kv_cache_hit_rate is not None:
                slot.hit_rate = snapshot.kv_cache_hit_rate
            self._load.publish(dp_rank, None, snapshot.kv_used_blocks)
        except Exception as error:  # no snapshot: an engine's scheduler must not end for what it tells
            slot.fail(dp_rank, error)

    def _drop(self, dp_rank: int) -> None:
        with self._counting:
            self._strangers += 1
            first = self._strangers == 1
        if first:
            logger.warning(
                "a snapshot of rank %r was dropped, the engine has declared %s; further ones are only counted",
                dp_rank,
                ", ".join(map(str, self.dp_ranks)) or "none",
            )

    def _show(self) -> None:
        """Before a scrape, in the loop's thread."""
        self._dropped.value = self._strangers
        for rank, slot in self._slots.items():
            if slot.snapshot is None:
                continue
            try:
                self._gauges.show(rank, slot.snapshot, slot.hit_rate)
            except Exception as error:  # numbers that are none
                slot.fail(rank, error)
            else:
                slot.recover(rank)

    def close(self) -> None:
        """Show no more. `publish` does no harm afterwards."""
        self._show()
        self._forget()
