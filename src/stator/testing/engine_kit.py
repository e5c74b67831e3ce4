"""An engine started and called as a worker does it, and what is seen of it: the ground the cases of `engine_cases` stand on."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec

from stator.kv.sources import PushSource
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest, SamplingOptions, StopConditions
from stator.protocol.ids import EndpointId
from stator.runtime.context import Context
from stator.tasks import Scope
from stator.telemetry import MetricsLevel
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.engine_metrics import ModelLevel, ModelMetrics
from stator.worker.guard import Guard
from stator.worker.snapshot import ComponentSnapshot

__all__ = [
    "INSTANCE",
    "SOON",
    "ConformanceFailure",
    "EngineKit",
    "LoopWatch",
    "RunningEngine",
    "check_answer",
    "collect",
    "happens",
    "require",
    "tasks_and_threads",
]

INSTANCE = 0x123456789ABCDEF
SOON = 2.0
"""seconds within which a stopped or killed request must be over (`spec/45 §14`)"""
_TURN = 64
"""items after which a reader lets others run, as an endpoint does"""


class ConformanceFailure(AssertionError):
    """An engine breaks a rule of the contract. `rule` is its name (`engine_cases.CASES`), `detail` what happened."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
        self.detail = detail


def require(condition: object, detail: str) -> None:
    """`AssertionError` with `detail` unless the condition holds."""
    if not condition:
        raise AssertionError(detail)


async def happens(condition: Callable[[], bool], *, within: float = SOON) -> bool:
    """Whether `condition()` holds by then."""
    loop = asyncio.get_running_loop()
    end = loop.time() + within
    while not condition():
        if loop.time() >= end:
            return False
        await asyncio.sleep(0.005)
    return True


async def collect(stream: AsyncIterator[EngineOutput]) -> list[EngineOutput]:
    """All items of a stream; others have their turn meanwhile."""
    items: list[EngineOutput] = []
    async for output in stream:
        items.append(output)
        if len(items) % _TURN == 0:
            await asyncio.sleep(0)
    return items


def check_answer(items: list[EngineOutput]) -> None:
    """At least one item; the last one, and no other, has a finish reason; choice 0 only."""
    require(items, "an answer needs at least one item")
    require(all(item.finish_reason is None for item in items[:-1]), "only the last item may have a finish reason")
    require(items[-1].finish_reason is not None, "the last item needs a finish reason")
    require(all(not item.index for item in items), "the worker numbers the choices")


class SeenSnapshots:
    """A `SnapshotSink` that keeps what it is given."""

    def __init__(self, dp_ranks: Sequence[int]) -> None:
        self.dp_ranks = dp_ranks
        self.seen: list[tuple[int, ComponentSnapshot]] = []

    def publish(self, dp_rank: int, snapshot: ComponentSnapshot) -> None:
        self.seen.append((dp_rank, snapshot))


class SeenKvEvents:
    """A `KvEventSink` that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def stored(
        self,
        *,
        token_ids: Sequence[int],
        block_hashes: Sequence[int],
        parent_hash: int | None = None,
        lora_name: str | None = None,
        tier: str = "device",
    ) -> None:
        self.calls += 1

    def removed(self, block_hashes: Sequence[int], *, tier: str = "device") -> None:
        self.calls += 1

    def cleared(self) -> None:
        self.calls += 1


class SeenMetrics(ModelMetrics):
    """`EngineMetrics` that keeps what is to be called at a scrape."""

    def __init__(self, level: ModelLevel) -> None:
        super().__init__(level)
        self.texts: list[Callable[[], str]] = []

    def on_scrape(self, text: Callable[[], str]) -> None:
        super().on_scrape(text)
        self.texts.append(text)


class LoopWatch:
    """How long the event loop did not get its turn, at the worst, in seconds."""

    def __init__(self) -> None:
        self.worst = 0.0

    async def look(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(0.005)
            self.worst = max(self.worst, loop.time() - before - 0.005)


class RunningEngine:
    """An engine that has started, called as a worker calls it."""

    def __init__(self, engine: LLMEngine, config: EngineConfig, scope: Scope, *, time_limit: float) -> None:
        self.engine = engine
        self.config = config
        self.scope = scope
        self.page = MetricsLevel.runtime(worker_id=INSTANCE)
        """the root of the metrics"""
        level = ModelLevel(
            self.page, EndpointId("test", "backend", "generate"), worker_id=INSTANCE, model=config.model, model_name=""
        )
        self.metrics = SeenMetrics(level)
        self.snapshots = SeenSnapshots(())
        self.kv_events = SeenKvEvents()
        self._guard = Guard(engine, scope)
        self._time_limit = time_limit
        self._count = 0

    def introduce(self) -> None:
        """Call the hooks between `start` and `generate`, in a worker's order."""
        engine = self.engine
        engine.register_metrics(self.metrics)
        ranks = sorted(set(engine.snapshot_ranks()))
        for source in engine.kv_event_sources():
            if isinstance(source, PushSource):
                source.on_ready(self.kv_events)
        if ranks:
            self.snapshots = SeenSnapshots(ranks)
            engine.attach_snapshots(self.snapshots)

    def generate(self, request: PreprocessedRequest, context: Context | None = None) -> AsyncIterator[EngineOutput]:
        """One answer, as the endpoint's handler gives it."""
        self._count += 1
        return self._guard.generate(request, context or Context(f"request-{self._count}"))

    async def answer(self, request: PreprocessedRequest, context: Context | None = None) -> list[EngineOutput]:
        """The whole answer, at most `time_limit` seconds."""
        try:
            async with asyncio.timeout(self._time_limit):
                return await collect(self.generate(request, context))
        except TimeoutError:
            raise AssertionError(f"no whole answer within {self._time_limit:g} s") from None


class EngineKit(msgspec.Struct, frozen=True, kw_only=True):
    """How to make an engine, and what its model needs."""

    make: Callable[[], LLMEngine]
    """a fresh engine, not started"""
    prompt: Sequence[int] = tuple(range(1, 33))
    """token ids the model knows; answering it with `max_tokens` of 10 000 must take several items and at least half a second"""
    time_limit: float = 60.0
    """seconds a start, or any one answer, may take"""
    loop_limit: float = 0.25
    """seconds that the event loop may have to wait for its turn"""

    @asynccontextmanager
    async def started(self) -> AsyncGenerator[RunningEngine]:
        """An engine from start to clean-up."""
        engine = self.make()
        async with Scope("engine suite") as scope:
            try:
                async with asyncio.timeout(self.time_limit):
                    config = await engine.start(INSTANCE)
                running = RunningEngine(engine, config, scope, time_limit=self.time_limit)
                running.introduce()
                yield running
            finally:
                await engine.cleanup()

    def request(self, max_tokens: int) -> PreprocessedRequest:
        """A request that runs to `max_tokens` or the end of the context."""
        return PreprocessedRequest(
            token_ids=list(self.prompt),
            stop_conditions=StopConditions(max_tokens=max_tokens, ignore_eos=True),
            sampling_options=SamplingOptions(temperature=0.0),
        )


def tasks_and_threads() -> dict[object, str]:
    """What runs now, with its name, but for the present task and the event loop's own pool of threads."""
    tasks = {task: f"task {task.get_name()}" for task in asyncio.all_tasks() - {asyncio.current_task()}}
    threads = {each: f"thread {each.name}" for each in threading.enumerate() if not each.name.startswith("asyncio_")}
    return {**tasks, **threads}
