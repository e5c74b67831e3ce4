"""The gauges that the kit keeps for every engine (`spec/45 §8.3`)."""

from collections.abc import Sequence

from stator.telemetry import Family, Gauge, MetricsLevel
from stator.telemetry.names import ComponentName, Label
from stator.worker.snapshot import ComponentSnapshot

__all__ = ["ComponentGauges"]


class ComponentGauges:
    """On one worker's level. Usage and totals of each declared rank are on the page from the beginning, as 0: an empty family would
    not be shown. The hit rate is not: it appears with the first snapshot that has one.
    """

    def __init__(self, level: MetricsLevel, dp_ranks: Sequence[int] = ()) -> None:
        rank = (Label.DP_RANK,)
        self.model_load_time = level.create_gauge(ComponentName.MODEL_LOAD_TIME_SECONDS, "Seconds the engine took to start")
        self.drain_time = level.create_gauge(
            ComponentName.DRAIN_TIME_SECONDS, "Seconds from the refusal of new requests until those running had ended"
        )
        self.cleanup_time = level.create_gauge(ComponentName.CLEANUP_TIME_SECONDS, "Seconds the engine took to free everything")
        self._total: Family[Gauge] = level.create_gauge_vec(ComponentName.TOTAL_BLOCKS, "KV blocks of the rank", rank)
        self._usage: Family[Gauge] = level.create_gauge_vec(
            ComponentName.GPU_CACHE_USAGE_PERCENT, "Share of the KV blocks in use, 0 to 1", rank
        )
        self._hit_rate: Family[Gauge] = level.create_gauge_vec(
            ComponentName.KV_CACHE_HIT_RATE, "Share of prompt blocks found in the prefix cache, 0 to 1", rank
        )
        for each in dp_ranks:
            self._total.labels(str(each))
            self._usage.labels(str(each))

    def show(self, dp_rank: int, snapshot: ComponentSnapshot, hit_rate: float | None) -> None:
        """What is known of a rank now; without a `hit_rate` that gauge stays as it is. In the event loop's thread."""
        rank = str(dp_rank)
        self._total.labels(rank).set(float(snapshot.kv_total_blocks))
        self._usage.labels(rank).set(float(snapshot.gpu_cache_usage))
        if hit_rate is not None:
            self._hit_rate.labels(rank).set(float(hit_rate))
