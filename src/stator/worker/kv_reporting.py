"""From an engine's KV event sources to the event plane (`spec/45 §9`)."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from stator.events.interface import EventPlane
from stator.kv.engine_events import EngineStatistics
from stator.kv.engine_socket import follow_engine_socket
from stator.kv.publisher import KvPublisher, open_kv_publisher
from stator.kv.sources import KvEventSource, PushSource
from stator.protocol.ids import EndpointId
from stator.tasks import Scope
from stator.telemetry import MetricsLevel
from stator.telemetry.names import ComponentName, Label
from stator.worker.engine_metrics import own_counters

__all__ = ["report_kv_events"]

_OUTCOMES = ("published", "dropped", "rejected", "suspicious")


@asynccontextmanager
async def report_kv_events(
    sources: Sequence[KvEventSource],
    events: EventPlane,
    metrics: MetricsLevel,
    *,
    endpoint: EndpointId,
    worker_id: int,
    block_size: int,
) -> AsyncGenerator[None]:
    """Inside the block each source has a publisher of its own; a push source is given it at once. Counts are shown below `metrics`, the
    root of the process.

    Raises what opening a publisher raises, what `on_ready` raises, and `ConfigError` for a socket that cannot be followed.
    """
    publishers: list[KvPublisher] = []
    followed: list[EngineStatistics] = []
    async with AsyncExitStack() as stack, Scope(f"KV events of {endpoint}") as scope:
        stack.callback(_show(metrics, endpoint, worker_id, publishers, followed))
        for source in sources:
            publisher = await open_kv_publisher(
                events,
                namespace=endpoint.namespace,
                component=endpoint.component,
                worker_id=worker_id,
                dp_rank=source.dp_rank,
                block_size=block_size,
            )
            publishers.append(publisher)
            stack.push_async_callback(publisher.aclose)
            if isinstance(source, PushSource):
                source.on_ready(publisher)
            else:
                statistics = EngineStatistics()
                followed.append(statistics)
                work = follow_engine_socket(source, publisher, statistics=statistics)
                following = scope.spawn(work, name=f"KV events of rank {source.dp_rank}")
                await asyncio.sleep(0)  # an endpoint that cannot be used shows at once
                if following.done():
                    following.result()
        yield


def _show(
    metrics: MetricsLevel,
    endpoint: EndpointId,
    worker_id: int,
    publishers: Sequence[KvPublisher],
    followed: Sequence[EngineStatistics],
) -> Callable[[], None]:
    """Show the counts at each scrape, on the component's level. Returns what ends it."""
    names = ((Label.NAMESPACE, endpoint.namespace), (Label.COMPONENT, endpoint.component))
    level = MetricsLevel(names, worker_id=worker_id, parent=metrics)
    gaps = level.create_int_counter(
        ComponentName.KV_PUBLISHER_ENGINES_DROPPED_EVENTS_TOTAL, "Batches of KV events that the engine sent and nobody got"
    )
    told = own_counters(level, "stator_kv_events_total", "KV events of the engine by what became of them", ("outcome",))
    counters = {outcome: told.labels(outcome) for outcome in _OUTCOMES}

    def update() -> None:
        gaps.value = sum(each.gaps for each in followed)
        statistics = [publisher.statistics() for publisher in publishers]
        for outcome, counter in counters.items():
            counter.value = sum(getattr(each, outcome) for each in statistics)

    level.on_update(update)
    return level.remove
