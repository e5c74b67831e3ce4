"""What a worker tells of its engine while it serves: metrics, snapshots, load and KV events."""

import logging
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from stator.protocol.ids import EndpointId
from stator.worker.component_gauges import ComponentGauges
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.engine_metrics import ModelLevel, ModelMetrics
from stator.worker.host import WorkerHost
from stator.worker.kv_reporting import report_kv_events
from stator.worker.load_publisher import WorkerMetricsPublisher
from stator.worker.snapshot_publisher import SnapshotPublisher

__all__ = ["Reporting"]

logger = logging.getLogger(__name__)


class Reporting:
    """From `open`, after the engine's start, to `aclose`, after its clean-up: an engine may publish until then."""

    def __init__(self, host: WorkerHost, endpoint: EndpointId, config: EngineConfig, *, model_name: str) -> None:
        self._host = host
        self._endpoint = endpoint
        self._config = config
        self._stack = AsyncExitStack()
        self._level = ModelLevel(
            host.metrics, endpoint, worker_id=host.instance_id, model=config.model, model_name=model_name or config.model
        )
        self._stack.callback(self._level.remove)
        self.gauges: ComponentGauges | None = None
        """None before `open`"""

    @property
    def labels(self) -> tuple[tuple[str, str], ...]:
        """`model` and `model_name`, for the metrics of requests."""
        return self._level.model_labels

    async def open(self, engine: LLMEngine, *, kv_events: bool) -> ComponentGauges:
        """Ask the engine what it has to tell, in the order of `spec/45 §3`. What its hooks raise is raised; `aclose` in any case."""
        engine.register_metrics(ModelMetrics(self._level))
        ranks = sorted(set(engine.snapshot_ranks()))
        self.gauges = gauges = ComponentGauges(self._level, ranks)
        if kv_events:
            await self._open_kv_events(engine)
        if ranks:
            await self._open_snapshots(engine, ranks, gauges)
        return gauges

    async def _open_kv_events(self, engine: LLMEngine) -> None:
        sources = engine.kv_event_sources()
        block_size = self._config.kv_cache_block_size
        if sources and block_size is None:
            logger.warning("the engine does not say kv_cache_block_size: its KV events are not published")
        elif sources and block_size is not None:
            await self._stack.enter_async_context(
                report_kv_events(
                    sources,
                    self._host.events,
                    self._host.metrics,
                    endpoint=self._endpoint,
                    worker_id=self._host.instance_id,
                    block_size=block_size,
                )
            )

    async def _open_snapshots(self, engine: LLMEngine, ranks: list[int], gauges: ComponentGauges) -> None:
        load = await self._stack.enter_async_context(
            WorkerMetricsPublisher(self._host.events, namespace=self._endpoint.namespace, worker_id=self._host.instance_id)
        )
        snapshots = SnapshotPublisher(ranks, self._level, gauges, load)
        self._stack.callback(snapshots.close)
        engine.attach_snapshots(snapshots)

    async def aclose(self) -> None:
        """Tell no more, and take the metrics off the page. Idempotent."""
        await self._stack.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
