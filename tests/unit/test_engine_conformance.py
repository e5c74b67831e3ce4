"""The conformance kit finds what is wrong with an engine and says which rule it breaks; it passes the engines that keep them all."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pytest
from blockbuster import BlockBuster

from stator.engines.echo import EchoEngine
from stator.errors import EngineError
from stator.llm.card import ModelCard
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.testing.engine_cases import CASES
from stator.testing.engine_suite import ConformanceFailure, EngineSuite, run_conformance
from stator.worker import (
    ComponentSnapshot,
    EngineConfig,
    EngineMetrics,
    FunctionEngine,
    LLMEngine,
    SnapshotSink,
)

pytestmark = pytest.mark.timeout(60)


class Sound(LLMEngine):
    """An engine that keeps every rule; the broken ones below change one thing each."""

    def __init__(self) -> None:
        self.sink: SnapshotSink | None = None

    async def start(self, instance_id: int) -> EngineConfig:
        return EngineConfig(model="sound", card=ModelCard(display_name="sound"), max_num_seqs=4)

    def snapshot_ranks(self) -> Sequence[int]:
        return (0,)

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        self.sink = sink

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        if not request.token_ids:
            raise EngineError("no tokens", kind="InvalidArgument")
        limit = request.stop_conditions.max_tokens or 10
        for number in range(limit):
            await self.step()
            if context.is_stopped:
                yield EngineOutput(token_ids=[], finish_reason="cancelled")
                return
            self.tell()
            yield EngineOutput(token_ids=[number], finish_reason="length" if number == limit - 1 else None)

    async def step(self) -> None:
        await asyncio.sleep(0.001)

    def tell(self) -> None:
        if self.sink is not None:
            self.sink.publish(0, ComponentSnapshot(kv_used_blocks=1, kv_total_blocks=2, gpu_cache_usage=0.5))


async def test_the_kit_passes_an_engine_that_keeps_every_rule() -> None:
    await run_conformance(Sound)


async def test_the_kit_passes_the_echo_engine() -> None:
    await run_conformance(EchoEngine)


async def test_the_kit_passes_a_function() -> None:
    async def count(request: PreprocessedRequest) -> AsyncIterator[int]:
        for number in range(10_000):
            await asyncio.sleep(0.0005)
            yield number % 200

    await run_conformance(lambda: FunctionEngine(count))


class NeverYields(Sound):
    """Waits for ever."""

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        await asyncio.Event().wait()
        yield EngineOutput(token_ids=[])


class EndsWithoutItems(Sound):
    """Ends at once."""

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        if not request.token_ids:
            yield EngineOutput(token_ids=[])


class YieldsAfterStop(Sound):
    """Does not look at its context."""

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        async for item in super().generate(request, Context("nobody's")):
            yield item


class YieldsAfterKill(Sound):
    """Believes that a cancellation is somebody else's affair."""

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        try:
            async for item in super().generate(request, context):
                yield item
        except asyncio.CancelledError:
            yield EngineOutput(token_ids=[1])


class RaisesInStart(Sound):
    """Cannot be started."""

    async def start(self, instance_id: int) -> EngineConfig:
        raise RuntimeError("no weights")


class LeaksATask(Sound):
    """Leaves a task behind."""

    async def start(self, instance_id: int) -> EngineConfig:
        self.left = asyncio.create_task(asyncio.sleep(20), name="forgotten")
        return await super().start(instance_id)


class LeaksAThread(Sound):
    """Leaves a thread behind."""

    async def start(self, instance_id: int) -> EngineConfig:
        threading.Thread(target=time.sleep, args=(8,), name="forgotten", daemon=True).start()
        return await super().start(instance_id)


class BlocksTheLoop(Sound):
    """Computes in the event loop's thread."""

    async def step(self) -> None:
        time.sleep(0.01)


class BlocksTheLoopForLong(Sound):
    """The same, in one piece."""

    async def step(self) -> None:
        time.sleep(0.025)
        await asyncio.sleep(0)


class ChangesItsRanks(Sound):
    """Does not know how many ranks it has."""

    calls = 0

    def snapshot_ranks(self) -> Sequence[int]:
        self.calls += 1
        return tuple(range(self.calls))


class TellsOfStrangers(Sound):
    """Publishes for a rank it has not declared."""

    def tell(self) -> None:
        if self.sink is not None:
            self.sink.publish(7, ComponentSnapshot(kv_used_blocks=1, kv_total_blocks=2, gpu_cache_usage=0.5))


class TellsNothing(Sound):
    """Declares a rank and is silent."""

    def tell(self) -> None: ...


class SpoilsThePage(Sound):
    """Adds something to the page that cannot be made."""

    def register_metrics(self, metrics: EngineMetrics) -> None:
        metrics.on_scrape(lambda: 1 / 0)  # type: ignore[return-value, arg-type]


class CriesWolf(Sound):
    """Says that it has failed."""

    async def failed(self) -> str:
        return "tired"


class CannotEndTwice(Sound):
    """Minds a second clean-up."""

    ended = False

    async def cleanup(self) -> None:
        assert not self.ended, "again?"
        self.ended = True


class CannotEndUnstarted(Sound):
    """Needs what `start` has made."""

    loaded = False

    async def start(self, instance_id: int) -> EngineConfig:
        self.loaded = True
        return await super().start(instance_id)

    async def cleanup(self) -> None:
        assert self.loaded, "nothing to clean up"


class ServesOneAtATime(Sound):
    """A reader that pauses holds up everybody."""

    lock = asyncio.Lock()

    def __init__(self) -> None:
        super().__init__()
        self.lock = asyncio.Lock()

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        async with self.lock:
            async for item in super().generate(request, context):
                yield item


class KeepsItsSlots(Sound):
    """Does not give back the slots of requests that nobody wants any more."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = asyncio.Semaphore(4)

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        await self.slots.acquire()
        async for item in super().generate(request, context):
            if item.finish_reason is not None:
                self.slots.release()
            yield item


class NamelessCommand(Sound):
    """Has a command without a name."""

    def controls(self) -> Mapping[str, Any]:
        return {"": self.drain}


BROKEN: dict[Callable[[], LLMEngine], str] = {
    NeverYields: "an answer has items, and the last alone has the finish reason",
    EndsWithoutItems: "an answer has items, and the last alone has the finish reason",
    YieldsAfterStop: "a request stopped before its first item ends as cancelled",
    YieldsAfterKill: "nothing is yielded after a kill",
    RaisesInStart: "start describes the model",
    LeaksATask: "cleanup leaves no task and no thread",
    LeaksAThread: "cleanup leaves no task and no thread",
    BlocksTheLoop: "the event loop is never blocked",
    BlocksTheLoopForLong: "the event loop is never blocked",
    ChangesItsRanks: "ranks are the same at each call",
    TellsOfStrangers: "snapshots are of declared ranks and possible",
    TellsNothing: "snapshots are of declared ranks and possible",
    SpoilsThePage: "the metrics hook leaves a page that can be read",
    CriesWolf: "a healthy engine does not say that it failed",
    CannotEndTwice: "a second cleanup does no harm",
    CannotEndUnstarted: "cleanup without start does no harm",
    ServesOneAtATime: "a reader that pauses delays nobody",
    KeepsItsSlots: "killed requests free their slots",
    NamelessCommand: "commands have names",
}

BLOCKING = (BlocksTheLoop, BlocksTheLoopForLong)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda engine: engine.__name__)
async def test_the_kit_names_the_rule_that_an_engine_breaks(
    broken: Callable[[], LLMEngine], no_blocking_calls: BlockBuster
) -> None:
    no_blocking_calls.deactivate()  # it would find what the kit is to find
    with pytest.raises(ConformanceFailure) as caught:
        await run_conformance(broken, time_limit=1.0, loop_limit=0.05 if broken in BLOCKING else 0.25)
    assert caught.value.rule == BROKEN[broken], caught.value
    assert caught.value.detail
    left = [task for task in asyncio.all_tasks() if task.get_name() == "forgotten"]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


def test_each_rule_is_a_case_of_the_suite() -> None:
    """Whoever subclasses it is held to the same as whoever calls `run_conformance`."""
    held: list[str] = []

    class Noting(EngineSuite):
        def make(self) -> LLMEngine:
            raise NotImplementedError

        async def _hold(self, rule: str) -> None:
            held.append(rule)

    suite = Noting()
    for name in dir(suite):
        if name.startswith("test_"):
            asyncio.run(getattr(suite, name)())
    assert sorted(held) == sorted(CASES)
