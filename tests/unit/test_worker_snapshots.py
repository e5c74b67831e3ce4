"""Snapshots: what of them the metrics page shows, what goes to the load signal, and what is dropped."""

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import pytest

from stator.protocol.ids import EndpointId
from stator.telemetry import MetricsLevel
from stator.testing.worker_host import FakeEvents
from stator.worker import ComponentSnapshot, SnapshotPublisher, WorkerMetricsPublisher
from stator.worker.component_gauges import ComponentGauges
from stator.worker.engine_metrics import ModelLevel

pytestmark = pytest.mark.timeout(20)

LABELS = (
    'dynamo_component="backend",dynamo_endpoint="generate",dynamo_namespace="demo",model="m",model_name="shown",worker_id="abc"'
)
RANK_0 = f'dp_rank="0",{LABELS}'


def snapshot(used: int, total: int = 100, rate: float | None = None) -> ComponentSnapshot:
    return ComponentSnapshot(kv_used_blocks=used, kv_total_blocks=total, gpu_cache_usage=used / total, kv_cache_hit_rate=rate)


class Stage:
    """A publisher with its gauges and its load signal."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.root = MetricsLevel.runtime(worker_id=0xABC)
        endpoint = EndpointId("demo", "backend", "generate")
        level = ModelLevel(self.root, endpoint, worker_id=0xABC, model="m", model_name="shown")
        self.events = FakeEvents()
        self.load = WorkerMetricsPublisher(self.events, namespace="demo", worker_id=0xABC)
        self.publisher = SnapshotPublisher(ranks, level, ComponentGauges(level, ranks), self.load)

    def shown(self) -> dict[str, float]:
        """The page: series of the families under test, short names, by rank where they have one."""
        found: dict[str, float] = {}
        for line in self.root.exposition().decode().splitlines():
            if line.startswith("#"):
                continue
            series, _, value = line.rpartition(" ")
            name, _, labels = series.partition("{")
            rank = labels.partition('dp_rank="')[2].partition('"')[0]
            found[f"{name.removeprefix('dynamo_component_')}{'/' + rank if rank else ''}"] = float(value)
        return found


@asynccontextmanager
async def stage(*ranks: int) -> AsyncGenerator[Stage]:
    here = Stage(ranks)
    async with here.load:
        yield here


async def test_declared_ranks_are_on_the_page_from_the_beginning() -> None:
    async with stage(0, 3) as here:
        assert here.shown() == {
            "model_load_time_seconds": 0,
            "drain_time_seconds": 0,
            "cleanup_time_seconds": 0,
            "total_blocks/0": 0,
            "total_blocks/3": 0,
            "gpu_cache_usage_percent/0": 0,
            "gpu_cache_usage_percent/3": 0,
            "stator_snapshots_dropped_total": 0,
        }


async def test_the_labels_are_those_of_the_reference() -> None:
    async with stage(0) as here:
        here.publisher.publish(0, snapshot(5, rate=0.5))
        page = here.root.exposition().decode()
    for name in ("total_blocks", "gpu_cache_usage_percent", "kv_cache_hit_rate"):
        assert f"dynamo_component_{name}{{{RANK_0}}}" in page
    assert f"dynamo_component_model_load_time_seconds{{{LABELS}}} 0" in page


async def test_the_page_shows_the_last_snapshot() -> None:
    async with stage(0, 1) as here:
        for used in range(50):
            here.publisher.publish(0, snapshot(used))
        here.publisher.publish(1, snapshot(30, 60))
        page = here.shown()
    assert (page["total_blocks/0"], page["gpu_cache_usage_percent/0"]) == (100, 0.49)
    assert (page["total_blocks/1"], page["gpu_cache_usage_percent/1"]) == (60, 0.5)


async def test_a_hit_rate_that_is_unknown_changes_nothing_and_0_is_a_value() -> None:
    async with stage(0, 1) as here:
        here.publisher.publish(0, snapshot(1))
        assert "kv_cache_hit_rate/0" not in here.shown()
        here.publisher.publish(0, snapshot(1, rate=0.5))
        here.publisher.publish(0, snapshot(2))
        assert here.shown()["kv_cache_hit_rate/0"] == 0.5
        here.publisher.publish(0, snapshot(3, rate=0.0))
        assert here.shown()["kv_cache_hit_rate/0"] == 0.0
        assert "kv_cache_hit_rate/1" not in here.shown()


async def test_the_load_signal_says_the_used_blocks_of_the_rank() -> None:
    async with stage(0, 1) as here:
        here.publisher.publish(1, snapshot(42))
        await _until_sent(here.events)
        [load] = here.events.loads
        assert (load.worker_id, load.dp_rank, load.kv_used_blocks, load.active_decode_blocks) == (0xABC, 1, 42, None)


async def _until_sent(events: FakeEvents) -> None:
    async with asyncio.timeout(5):
        while not events.loads:
            await asyncio.sleep(0.001)


async def test_the_ranks_are_sorted_and_each_is_there_once() -> None:
    async with stage(3, 0, 3) as here:
        assert list(here.publisher.dp_ranks) == [0, 3]


async def test_an_undeclared_rank_is_dropped_and_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async with stage(0, 1) as here:
        for _ in range(5):
            here.publisher.publish(7, snapshot(1))
        page = here.shown()
    assert page["stator_snapshots_dropped_total"] == 5
    assert not any(name.endswith("/7") for name in page)
    assert here.events.loads == []
    assert [record.getMessage() for record in caplog.records] == [
        "a snapshot of rank 7 was dropped, the engine has declared 0, 1; further ones are only counted"
    ]


@pytest.mark.parametrize("bad", [None, {"kv_used_blocks": 1}, "text"])
async def test_what_is_no_snapshot_is_told_once_and_so_is_the_recovery(bad: object, caplog: pytest.LogCaptureFixture) -> None:
    async with stage(0) as here:
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                here.publisher.publish(0, bad)  # type: ignore[arg-type]
                here.shown()
            assert [record.levelname for record in caplog.records] == ["WARNING"]
            here.publisher.publish(0, snapshot(5))
            assert here.shown()["total_blocks/0"] == 100
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_numbers_that_are_none_do_not_break_the_page(caplog: pytest.LogCaptureFixture) -> None:
    async with stage(0, 1) as here:
        here.publisher.publish(0, ComponentSnapshot(kv_used_blocks=1, kv_total_blocks="x", gpu_cache_usage=0.5))  # type: ignore[arg-type]
        here.publisher.publish(1, snapshot(5))
        for _ in range(3):
            assert here.shown()["total_blocks/1"] == 100
    assert len(caplog.records) == 1


async def test_strangers_are_counted_from_many_threads() -> None:
    async with stage(0) as here:

        def shout() -> None:
            for _ in range(1000):
                here.publisher.publish(9, snapshot(1))

        threads = [threading.Thread(target=shout) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert here.shown()["stator_snapshots_dropped_total"] == 4000


async def test_after_the_end_the_last_values_stand_and_publishing_does_no_harm() -> None:
    async with stage(0) as here:
        here.publisher.publish(0, snapshot(5))
        here.publisher.close()
        here.publisher.publish(0, snapshot(6))
        assert here.shown()["gpu_cache_usage_percent/0"] == 0.05
    here.publisher.publish(0, snapshot(7))


async def test_a_model_without_a_name_has_no_label_for_it() -> None:
    root = MetricsLevel.runtime(worker_id=1)
    level = ModelLevel(root, EndpointId("a", "b", "c"), worker_id=1, model="", model_name="n")
    assert level.auto_labels() == {
        "dynamo_namespace": "a",
        "dynamo_component": "b",
        "dynamo_endpoint": "c",
        "model_name": "n",
        "worker_id": "1",
    }
