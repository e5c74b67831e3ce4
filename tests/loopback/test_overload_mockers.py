"""Four simulated workers at 0.8, 2 and 5 times their capacity, over HTTP and in virtual time: who is taken is served as fast as ever.

Everything is real but the time: frontend, queue, directory, runtimes, planes, workers, simulated engines. What code takes does not count,
what passes of the engines take does, so that the figures are the same on every machine.
"""

import asyncio
import statistics
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random

import msgspec
import pytest

from stator.discovery.memory import MemoryStore
from stator.frontend import FrontendConfig, FrontendMetrics, FrontendServer, create_app
from stator.frontend.state import STATE, FrontendState
from stator.llm.directory import ModelDirectory
from stator.mocker.engine import MockerEngine
from stator.mocker.options import MockerOptions
from stator.runtime import Runtime
from stator.tasks import Scope
from stator.telemetry import MetricSet
from stator.testing.frontend_kit import RawClient
from stator.testing.plane_suite import eventually
from stator.testing.virtual_loop import VirtualClock, VirtualLoop, run_virtually
from stator.transports.memory import MemoryNetwork
from stator.worker import Worker, WorkerConfig

pytestmark = pytest.mark.timeout(300)

WORKERS = 4
SLOTS = 16
PROMPT, ANSWER = (256, 768), (32, 96)
"""tokens, at random between these"""
OPTIONS = MockerOptions(max_num_seqs=SLOTS)
WARM_UP, MEASURED = 2.0, 5.0
"""seconds of virtual time"""


class Site:
    """The frontend and what it has answered."""

    def __init__(self, port: int, state: FrontendState, directory: ModelDirectory, loop: VirtualLoop) -> None:
        self.port = port
        self.state = state
        self.directory = directory
        self._loop = loop
        self._idle: list[RawClient] = []
        self._stack = AsyncExitStack()

    async def ask(self, number: int, *, key: str = "") -> tuple[int, float, float]:
        """One request: status, seconds to the first token (or the refusal), seconds to the end."""
        began = self._loop.time()
        client = self._idle.pop() if self._idle else await self._stack.enter_async_context(RawClient(self.port, patience=600.0))
        random = Random(number)
        prompt = f"{number:012}".ljust(random.randint(*PROMPT), "x")
        body = msgspec.json.encode({"model": "mocker", "prompt": prompt, "max_tokens": random.randint(*ANSWER), "stream": True})
        headers = {"authorization": f"Bearer {key}"} if key else {}
        await client.request("POST", "/v1/completions", body, **headers)
        status, fields = await client.head()
        if status != 200:
            await client.read_until(b"}}") if fields.get("content-length") else None
            took = self._loop.time() - began
            self._idle.append(client)
            return status, took, took
        first = 0.0
        async for _ in client.chunks():
            first = first or self._loop.time() - began
        self._idle.append(client)
        return status, first, self._loop.time() - began

    async def aclose(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def site() -> AsyncGenerator[Site, None]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    clock, store, network = VirtualClock(loop), MemoryStore(), MemoryNetwork()
    async with AsyncExitStack() as stack:

        async def join() -> Runtime:
            return await stack.enter_async_context(
                Runtime.connect(discovery=store, plane=network, clock=clock, random=Random(1), health__port=-1)
            )

        directory = await stack.enter_async_context(ModelDirectory.follow(await join(), clock=clock, policy="round_robin"))
        scope = await stack.enter_async_context(Scope("workers"))
        for _ in range(WORKERS):
            worker = Worker(MockerEngine(OPTIONS, clock=clock), await join(), config=WorkerConfig(grace_period=0.0))
            running = scope.spawn(worker.run())

            async def end(worker: Worker = worker, running: "asyncio.Task[int]" = running) -> None:
                worker.shutdown()
                worker.shutdown()
                await running

            stack.push_async_callback(end)
            await worker.ready()
        await eventually(lambda: sum(len(served.instances()) for served in directory.models()) == WORKERS, within=30)
        config = FrontendConfig(port=0, graceful_shutdown=0.2)
        app = create_app(directory, config=config, metrics=FrontendMetrics(MetricSet(), clock), clock=clock)
        server = await stack.enter_async_context(FrontendServer(app, config=config))
        found = Site(server.port, app[STATE], directory, loop)
        stack.push_async_callback(found.aclose)
        yield found


class Outcome:
    """What became of the requests that came in the time measured."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.first: list[float] = []
        self.refused: list[float] = []
        self.done = 0
        """ended well within the time"""

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.first, n=100)[98]


async def load(found: Site, rate: float, *, seed: int, key: str = "", outcome: Outcome | None = None) -> Outcome:
    """Requests at random intervals, `rate` a second."""
    loop, random, outcome = asyncio.get_running_loop(), Random(seed), outcome or Outcome()
    began = loop.time()
    async with Scope("load") as scope:
        tasks: list[asyncio.Task[None]] = []
        number = seed * 1_000_000

        async def one(number: int, came: float) -> None:
            status, first, whole = await found.ask(number, key=key)
            if WARM_UP <= came - began + whole < WARM_UP + MEASURED and status == 200:
                outcome.done += 1
            if WARM_UP <= came - began < WARM_UP + MEASURED:
                outcome.statuses[status] += 1
                (outcome.first if status == 200 else outcome.refused).append(first)

        due = began
        while (due := due + random.expovariate(rate)) < began + WARM_UP + MEASURED:
            await asyncio.sleep(due - loop.time())
            number += 1
            tasks.append(scope.spawn(one(number, due)))
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            task.result()
    return outcome


async def measure(rate: float, seed: int = 1) -> Outcome:
    async with site() as found:
        outcome = await load(found, rate, seed=seed)
        await found.state.idle.wait()
        return outcome


@pytest.fixture(scope="module")
def capacity() -> float:
    """Requests a second that the four can do: what comes out when far too many come."""
    return run_virtually(measure(50.0 * WORKERS)).done / MEASURED


@pytest.fixture(scope="module")
def unhurried(capacity: float) -> Outcome:
    outcome = run_virtually(measure(0.8 * capacity))
    assert outcome.statuses.keys() == {200}, "nobody is refused below capacity"
    return outcome


@pytest.mark.parametrize("times", [2, 5])
def test_who_is_taken_is_served_as_fast_as_below_capacity(capacity: float, unhurried: Outcome, times: int) -> None:
    outcome = run_virtually(measure(times * capacity, seed=times))
    print(
        f"capacity {capacity:.1f}/s; at 0.8: p99 {unhurried.p99 * 1e3:.0f} ms; at {times}: p99 {outcome.p99 * 1e3:.0f} ms, "
        f"{outcome.done / MEASURED:.1f}/s done, {outcome.statuses}, slowest refusal {max(outcome.refused) * 1e3:.1f} ms, "
        f"p99 {statistics.quantiles(outcome.refused, n=100)[98] * 1e3:.1f} ms"
    )
    assert outcome.statuses.keys() == {200, 503}
    assert outcome.p99 <= 2 * unhurried.p99
    assert statistics.quantiles(outcome.refused, n=100)[98] < 0.01
    assert outcome.done / MEASURED >= 0.95 * capacity, "no place stays empty"


def test_a_tenant_that_floods_does_not_starve_the_other(capacity: float) -> None:
    async def both() -> tuple[Outcome, Outcome]:
        async with site() as found:
            modest, flood = Outcome(), Outcome()
            async with asyncio.TaskGroup() as group:
                group.create_task(load(found, 0.4 * capacity, seed=7, key="modest", outcome=modest))
                group.create_task(load(found, 4 * capacity, seed=8, key="flood", outcome=flood))
            return modest, flood

    async def alone() -> Outcome:
        async with site() as found:
            return await load(found, 0.4 * capacity, seed=7, key="modest")

    before = run_virtually(alone())
    modest, flood = run_virtually(both())
    print(f"alone {before.done}, beside a flood {modest.done} ({modest.statuses}); the flood {flood.done} ({flood.statuses})")
    assert modest.done >= 0.9 * before.done
    assert flood.done >= 0.4 * capacity * MEASURED, "what is left goes to who asks"


def test_gauges_are_back_at_zero_after_a_storm(capacity: float) -> None:
    async def storm() -> tuple[Callable[[], str], int]:
        async with site() as found:
            await load(found, 3 * capacity, seed=3)
            await found.state.idle.wait()
            page = found.state.metrics.page.exposition().decode()
            return (lambda: page), len(found.state.running)

    page, running = run_virtually(storm())
    assert running == 0
    inflight = [line for line in page().splitlines() if "inflight" in line or "queued" in line or "waiting" in line]
    assert inflight
    assert all(line.startswith("#") or line.endswith(" 0") for line in inflight), inflight
