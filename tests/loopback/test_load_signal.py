"""From the schedulers' threads to the frontend's view: two workers of two ranks, a thousand snapshots a second and rank."""

import asyncio
import re
import statistics
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stator.engines.echo import EchoEngine
from stator.llm.directory import ModelDirectory
from stator.runtime import Runtime
from stator.tasks import Scope, SystemClock
from stator.testing.plane_suite import eventually
from stator.worker import EngineConfig, Worker, WorkerConfig
from stator.worker.snapshot import ComponentSnapshot, SnapshotSink

pytestmark = pytest.mark.timeout(60)

BLOCKS = 100_000
RANKS = (0, 1)
RATE = 1000
COUNT = 1500
CONVERGED = 0.1
"""seconds from the last event to the right view; the assertion allows five times as much"""
COST = 15e-6
"""seconds of a publish, likewise"""


class Scheduler(EchoEngine):
    """An echo with a scheduler per rank that publishes from a thread of its own."""

    sink: SnapshotSink

    async def start(self, instance_id: int) -> EngineConfig:
        config = await super().start(instance_id)
        return msgspec.structs.replace(config, total_kv_blocks=BLOCKS, data_parallel_size=len(RANKS))

    def snapshot_ranks(self) -> Sequence[int]:
        return RANKS

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        self.sink = sink

    def publish(self, rank: int, used: int) -> None:
        self.sink.publish(
            rank,
            ComponentSnapshot(
                kv_used_blocks=used, kv_total_blocks=BLOCKS, gpu_cache_usage=used / BLOCKS, kv_cache_hit_rate=used / COUNT / 100
            ),
        )

    def run(self, rank: int, count: int) -> list[float]:
        """Publish at the rate; what each call took."""
        took: list[float] = []
        began = time.perf_counter()
        for step in range(1, count + 1):
            due = began + step / RATE
            while (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            before = time.perf_counter()
            self.publish(rank, step + 10_000 * rank)
            took.append(time.perf_counter() - before)
        return took


class Site:
    def __init__(self, directory: ModelDirectory, workers: list[tuple[Runtime, Scheduler]]) -> None:
        self.directory = directory
        self.workers = workers

    def view(self) -> dict[tuple[int, int], int | None]:
        return {(row.worker_id, row.dp_rank): row.kv_used_blocks for row in self.directory.monitor.snapshot()}

    def expected(self, step: int) -> dict[tuple[int, int], int | None]:
        return {(runtime.instance_id, rank): step + 10_000 * rank for runtime, _ in self.workers for rank in RANKS}


@asynccontextmanager
async def site(root: Path) -> AsyncGenerator[Site, None]:
    async with AsyncExitStack() as stack:

        async def join() -> Runtime:
            return await stack.enter_async_context(
                Runtime.connect(discovery="file", event_plane="zmq", file__root=str(root), health__port=-1)
            )

        directory = await stack.enter_async_context(ModelDirectory.follow(await join(), clock=SystemClock()))
        scope = await stack.enter_async_context(Scope("workers"))
        workers: list[tuple[Runtime, Scheduler]] = []
        for _ in range(2):
            runtime, engine = await join(), Scheduler()
            worker = Worker(engine, runtime, config=WorkerConfig(grace_period=0.0))
            running = scope.spawn(worker.run())

            async def end(worker: Worker = worker, running: "asyncio.Task[Any]" = running) -> None:
                worker.shutdown()
                worker.shutdown()
                await asyncio.wait_for(running, 20)

            stack.push_async_callback(end)
            await asyncio.wait_for(worker.ready(), 20)
            workers.append((runtime, engine))
        found = Site(directory, workers)
        for _, engine in workers:
            for rank in RANKS:
                engine.publish(rank, 0)
        await eventually(lambda: len(found.view()) == 4, within=20)
        yield found


async def test_a_thousand_snapshots_a_second_and_rank_reach_gauges_and_monitor(tmp_path: Path) -> None:
    async with site(tmp_path) as found:
        took: list[list[float]] = []
        threads = [
            threading.Thread(target=lambda engine=engine, rank=rank: took.append(engine.run(rank, COUNT)))
            for _, engine in found.workers
            for rank in RANKS
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.001)
        ended = time.perf_counter()
        await eventually(lambda: found.view() == found.expected(COUNT), within=CONVERGED * 5)
        converged = time.perf_counter() - ended
        cost = statistics.median(each for calls in took for each in calls)
        print(f"publish {cost * 1e6:.1f} µs at the median, view right after {converged * 1e3:.0f} ms")
        assert cost <= COST * 5
        for runtime, _ in found.workers:
            page = runtime.metrics.exposition().decode()
            for rank in RANKS:
                used = COUNT + 10_000 * rank
                assert gauge(page, "total_blocks", rank) == BLOCKS
                assert gauge(page, "gpu_cache_usage_percent", rank) == pytest.approx(used / BLOCKS)
                assert gauge(page, "kv_cache_hit_rate", rank) == pytest.approx(used / COUNT / 100)
        statistics_of_monitor = found.directory.monitor.statistics()
        assert statistics_of_monitor.malformed == statistics_of_monitor.dropped == 0


def gauge(page: str, name: str, rank: int) -> float:
    line = re.search(rf'^dynamo_component_{name}\{{[^}}]*dp_rank="{rank}"[^}}]*\}} (\S+)$', page, re.MULTILINE)
    assert line is not None, name
    return float(line.group(1))
