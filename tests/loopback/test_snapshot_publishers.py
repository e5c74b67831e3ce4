"""Two workers with two ranks each, whose schedulers publish a thousand snapshots a second from threads of their own: what the metrics
pages show, what listeners hear, what it costs, and what an event plane that is away does to it (nothing).

Times are held to five times what they are to be; `soak` takes the whole time and the numbers as they are.
"""

import asyncio
import statistics
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from stator.discovery.memory import MemoryStore
from stator.engines.echo import EchoEngine
from stator.events import Channel
from stator.llm.load_event import LOAD_TOPIC, ActiveLoad, decode_load
from stator.runtime import Runtime
from stator.tasks import Scope
from stator.testing.nats_server import NatsServer, nats_server
from stator.testing.plane_suite import eventually
from stator.transports.memory import MemoryNetwork
from stator.worker import ComponentSnapshot, SnapshotSink, Worker, WorkerConfig

pytestmark = pytest.mark.timeout(60)

RANKS = (0, 1)
WORKERS = 2
RATE = 1000
"""snapshots per second and rank"""
COST = 15e-6
"""seconds at the median"""
TOTAL = 100_000


class Scheduler(threading.Thread):
    """One rank's: publishes at a steady rate until it is told to stop, and notes what that cost."""

    def __init__(self, sink: SnapshotSink, rank: int) -> None:
        super().__init__(name=f"scheduler of rank {rank}", daemon=True)
        self.sink = sink
        self.rank = rank
        self.costs: deque[float] = deque(maxlen=10_000)
        self.last = 0
        self.error: Exception | None = None
        self._over = threading.Event()

    def run(self) -> None:
        due = time.perf_counter()
        try:
            while not self._over.is_set():
                self.publish()
                due += 1 / RATE
                time.sleep(max(0.0, due - time.perf_counter()))
        except Exception as error:
            self.error = error

    def publish(self) -> None:
        self.last += 1
        snapshot = ComponentSnapshot(
            kv_used_blocks=self.last, kv_total_blocks=TOTAL, gpu_cache_usage=self.last / TOTAL, kv_cache_hit_rate=0.25
        )
        began = time.perf_counter()
        self.sink.publish(self.rank, snapshot)
        self.costs.append(time.perf_counter() - began)

    def stop(self) -> None:
        self._over.set()


class Ranked(EchoEngine):
    """An engine that hands its sink to the test."""

    sink: SnapshotSink

    def snapshot_ranks(self) -> Sequence[int]:
        return RANKS

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        self.sink = sink


class Site:
    """The workers, their schedulers, and somebody who listens."""

    def __init__(self, heard: dict[tuple[int, int], ActiveLoad]) -> None:
        self.runtimes: list[Runtime] = []
        self.schedulers: list[Scheduler] = []
        self.heard = heard

    def wanted(self) -> dict[tuple[int, int], int]:
        """What each rank said last."""
        pairs = zip(((runtime, rank) for runtime in self.runtimes for rank in RANKS), self.schedulers, strict=True)
        return {(runtime.instance_id, rank): scheduler.last for (runtime, rank), scheduler in pairs}

    def known(self) -> dict[tuple[int, int], int | None]:
        """What the listener has heard of each."""
        return {key: load.kv_used_blocks for key, load in self.heard.items()}

    def shown(self) -> dict[tuple[int, int], int]:
        """What the metrics pages say."""
        found: dict[tuple[int, int], int] = {}
        for runtime in self.runtimes:
            for line in runtime.metrics.exposition().decode().splitlines():
                if line.startswith("dynamo_component_gpu_cache_usage_percent{"):
                    rank = int(line.partition('dp_rank="')[2].partition('"')[0])
                    found[runtime.instance_id, rank] = round(float(line.rpartition(" ")[2]) * TOTAL)
        return found

    @property
    def costs(self) -> list[float]:
        """Of all that was published; may be looked at while it goes on: copying a deque is one step to other threads."""
        return sorted(cost for scheduler in self.schedulers for cost in scheduler.costs.copy())

    async def stop(self) -> None:
        for scheduler in self.schedulers:
            scheduler.stop()
        for scheduler in self.schedulers:
            await asyncio.to_thread(scheduler.join, 5)
            assert scheduler.error is None
            assert not scheduler.is_alive()


@asynccontextmanager
async def site(**settings: Any) -> AsyncGenerator[Site]:
    """Everything runs inside the block."""
    store, network = MemoryStore(), MemoryNetwork()
    async with AsyncExitStack() as stack, Scope("site") as scope:
        listener = await stack.enter_async_context(Runtime.connect(discovery=store, plane=network, **settings))
        heard: dict[tuple[int, int], ActiveLoad] = {}
        scope.spawn(_listen(listener, heard))
        here = Site(heard)
        workers: list[tuple[Worker, asyncio.Task[int]]] = []
        for _ in range(WORKERS):
            runtime = await stack.enter_async_context(Runtime.connect(discovery=store, plane=network, **settings))
            engine = Ranked()
            worker = Worker(engine, runtime, config=WorkerConfig(grace_period=0.0))
            task = scope.spawn(worker.run())
            async with asyncio.timeout(10):
                await worker.ready()
            workers.append((worker, task))
            here.runtimes.append(runtime)
            here.schedulers += [Scheduler(engine.sink, rank) for rank in RANKS]
        for scheduler in here.schedulers:
            scheduler.start()
        try:
            yield here
        finally:
            await here.stop()
            for worker, task in workers:
                worker.shutdown()
                async with asyncio.timeout(10):
                    assert await task == 0


async def _listen(listener: Runtime, heard: dict[tuple[int, int], ActiveLoad]) -> None:
    subscription = await listener.events.subscribe(Channel(namespace="dynamo", topic=LOAD_TOPIC))
    async for event in subscription:
        load = decode_load(event.payload)
        heard[load.worker_id, load.dp_rank] = load


async def check_converged(here: Site, *, within: float) -> None:
    """All has stopped: what is heard is what was said, and so is what is shown."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await eventually(
        lambda: here.known() == here.wanted(), within=within, what="the listener has heard the last value of each rank"
    )
    print(f"heard {1000 * (loop.time() - began):.0f} ms after the last snapshot")
    assert here.shown() == here.wanted()


async def publish_for(seconds: float, *, slack: float, **settings: Any) -> None:
    async with site(**settings) as here:
        await eventually(lambda: len(here.known()) == 4, what="each rank is heard")
        tasks = len(asyncio.all_tasks())
        await asyncio.sleep(seconds)
        assert len(asyncio.all_tasks()) <= tasks + 1
        await here.stop()
        await check_converged(here, within=0.1 * slack)
        assert min(here.wanted().values()) > 0.5 * RATE * seconds, "the schedulers were too slow to tell anything"
        median = statistics.median(here.costs)
        print(f"{len(here.costs)} snapshots, {1e6 * median:.1f} µs at the median, {1e6 * here.costs[-1]:.0f} µs at the worst")
        assert median <= COST * slack


async def test_a_thousand_snapshots_a_second_from_each_rank() -> None:
    await publish_for(1.0, slack=5)


async def test_over_zmq(tmp_path: Path) -> None:
    await publish_for(0.5, slack=5, event_plane="zmq")


@pytest.mark.soak
@pytest.mark.timeout(120)
async def test_for_half_a_minute_and_nothing_grows() -> None:
    async with site() as here:
        await asyncio.sleep(5)
        process = psutil.Process()
        before = process.memory_info().rss
        await asyncio.sleep(30)
        grown = process.memory_info().rss - before
        print(f"{grown / 2**20:.1f} MiB more after {sum(here.wanted().values())} snapshots")
        assert grown < 8 * 2**20
    await publish_for(5.0, slack=1)


async def outage(server: NatsServer, seconds: float) -> None:
    """The broker goes away and comes back; the schedulers go on as if nothing were."""
    settings: dict[str, Any] = {
        "event_plane": "nats",
        "nats__servers": server.url,
        "nats__reconnect_first": 0.02,
        "nats__reconnect_most": 0.2,
    }
    async with site(**settings) as here:
        await eventually(lambda: len(here.known()) == 4, within=10, what="each rank is heard")
        await asyncio.to_thread(server.stop)
        said = here.wanted()
        for scheduler in here.schedulers:
            scheduler.costs.clear()
        await asyncio.sleep(seconds)
        behind = [said[key] + 0.5 * RATE * seconds - here.wanted()[key] for key in said]
        assert max(behind) < 0, "the schedulers were held up"
        assert here.costs[-1] < 0.5, "publishing waited for the broker"
        assert statistics.median(here.costs) <= 5 * COST
        await asyncio.to_thread(server.start)
        await eventually(
            lambda: all((here.known()[key] or 0) > said[key] for key in said), within=10, what="the listener hears them again"
        )
        await here.stop()
        await check_converged(here, within=5)


async def test_a_broker_that_is_away_holds_nobody_up(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        await outage(server, 1.0)


@pytest.mark.soak
@pytest.mark.timeout(120)
async def test_a_broker_that_is_away_for_half_a_minute_holds_nobody_up(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        await outage(server, 30.0)


async def test_a_worker_starts_while_the_broker_is_away(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        server.stop()
        settings: dict[str, Any] = {
            "event_plane": "nats",
            "nats__servers": server.url,
            "nats__reconnect_first": 0.02,
            "nats__reconnect_most": 0.2,
        }
        async with site(**settings) as here:
            await asyncio.sleep(0.3)
            assert here.known() == {}
            assert here.shown().keys() == here.wanted().keys()
            await asyncio.to_thread(server.start)
            await eventually(lambda: len(here.known()) == 4, within=10, what="each rank is heard")
