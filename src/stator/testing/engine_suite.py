"""What every engine must do (`spec/45 §1, §14`): subclass `EngineSuite`, say how to make one, and pytest collects the cases.

    class TestMyEngine(EngineSuite):
        def make(self): return MyEngine(MyOptions(model="tiny"))

The cases call the engine as a worker does, through `Guard`, so that stop and kill reach `abort`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from stator.errors import EngineError, UsageError
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest, SamplingOptions, StopConditions
from stator.runtime.context import Context
from stator.tasks import Scope
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.guard import Guard

__all__ = ["EngineSuite", "RunningEngine", "collect"]

INSTANCE = 0x123456789ABCDEF
_SOON = 2.0
"""seconds within which a stopped or killed request must be over (`spec/45 §14`)"""


async def collect(stream: AsyncIterator[EngineOutput]) -> list[EngineOutput]:
    """All items of a stream."""
    return [output async for output in stream]


class RunningEngine:
    """An engine that has started, called as a worker calls it."""

    def __init__(self, engine: LLMEngine, config: EngineConfig, scope: Scope) -> None:
        self.engine = engine
        self.config = config
        self.scope = scope
        self._guard = Guard(engine, scope)
        self._count = 0

    def generate(self, request: PreprocessedRequest, context: Context | None = None) -> AsyncIterator[EngineOutput]:
        """One answer, as the endpoint's handler gives it."""
        self._count += 1
        return self._guard.generate(request, context or Context(f"request-{self._count}"))

    async def answer(self, request: PreprocessedRequest, context: Context | None = None) -> list[EngineOutput]:
        """The whole answer, at most `time_limit` seconds."""
        async with asyncio.timeout(EngineSuite.time_limit):
            return await collect(self.generate(request, context))


class EngineSuite(ABC):
    """The contract, one case each. Override the class attributes where the engine's model needs other values."""

    prompt: Sequence[int] = tuple(range(1, 33))
    """token ids the model knows; answering it with `max_tokens` of 10 000 must take several items and at least half a second"""
    time_limit: float = 60.0
    """seconds any one answer may take"""

    @abstractmethod
    def make(self) -> LLMEngine:
        """A fresh engine, not started."""
        ...

    @asynccontextmanager
    async def started(self) -> AsyncGenerator[RunningEngine]:
        """An engine from start to clean-up."""
        engine = self.make()
        async with Scope("engine suite") as scope:
            try:
                async with asyncio.timeout(self.time_limit):
                    config = await engine.start(INSTANCE)
                yield RunningEngine(engine, config, scope)
            finally:
                await engine.cleanup()

    def request(self, max_tokens: int) -> PreprocessedRequest:
        """A request that runs to `max_tokens` or the end of the context."""
        return PreprocessedRequest(
            token_ids=list(self.prompt),
            stop_conditions=StopConditions(max_tokens=max_tokens, ignore_eos=True),
            sampling_options=SamplingOptions(temperature=0.0),
        )

    async def test_start_describes_the_model(self) -> None:
        reports: list[str] = []
        engine = self.make()
        engine.follow_progress(reports.append)
        try:
            config = await engine.start(INSTANCE)
        finally:
            await engine.cleanup()
        assert config.model
        assert config.card.display_name
        assert all(reports), "a progress report must say something"

    async def test_last_item_alone_has_the_finish_reason(self) -> None:
        async with self.started() as running:
            check_answer(await running.answer(self.request(4)))

    async def test_max_tokens_ends_the_answer(self) -> None:
        async with self.started() as running:
            for limit in (1, 3):
                items = await running.answer(self.request(limit))
                check_answer(items)
                assert sum(len(item.token_ids) for item in items) == limit
                assert items[-1].finish_reason == "length"

    async def test_eight_answers_at_once(self) -> None:
        async with self.started() as running:
            answers = await asyncio.gather(*(running.answer(self.request(5)) for _ in range(8)))
        for items in answers:
            check_answer(items)
        tokens = [[token for item in items for token in item.token_ids] for items in answers]
        assert all(answer == tokens[0] for answer in tokens), "the same greedy request must have the same answer"

    async def test_stopped_before_the_first_item(self) -> None:
        async with self.started() as running:
            context = Context("stopped early")
            context.stop()
            async with asyncio.timeout(_SOON):
                items = await collect(running.generate(self.request(10_000), context))
        assert items[-1].finish_reason == "cancelled"

    async def test_stopped_in_mid_stream(self) -> None:
        async with self.started() as running:
            context = Context("stopped")
            stream = running.generate(self.request(10_000), context)
            first = await anext(stream)
            assert first.finish_reason is None, "the prompt is too short for this suite: set `prompt`"
            context.stop()
            async with asyncio.timeout(_SOON):
                rest = await collect(stream)
        assert rest[-1].finish_reason == "cancelled"

    async def test_killed_requests_free_their_slots(self) -> None:
        async with self.started() as running:
            await self._fill_and_empty(running, _kill)

    async def test_abandoned_requests_free_their_slots(self) -> None:
        async with self.started() as running:
            await self._fill_and_empty(running, _cancel)

    async def _fill_and_empty(self, running: RunningEngine, end: Callable[[Context, asyncio.Task[None]], None]) -> None:
        """Occupy all slots, end the requests in mid-stream, and have as many answered as there are slots."""
        slots = running.config.max_num_seqs or 8
        began = [asyncio.Event() for _ in range(slots)]
        contexts = [Context(f"occupant-{index}") for index in range(slots)]

        async def occupy(index: int) -> None:
            async for _ in running.generate(self.request(10_000), contexts[index]):
                began[index].set()
                await asyncio.sleep(0)

        occupants = [running.scope.spawn(occupy(index)) for index in range(slots)]
        async with asyncio.timeout(self.time_limit):
            await asyncio.gather(*(event.wait() for event in began))
        for context, occupant in zip(contexts, occupants, strict=True):
            assert not occupant.done(), "the prompt is too short for this suite: set `prompt`"
            end(context, occupant)
        async with asyncio.timeout(_SOON):
            await asyncio.wait(occupants)
        for items in await asyncio.gather(*(running.answer(self.request(2)) for _ in range(slots))):
            check_answer(items)

    async def test_a_request_at_fault_is_an_invalid_argument(self) -> None:
        async with self.started() as running:
            try:
                items = await running.answer(PreprocessedRequest(token_ids=[]))
            except (UsageError, ValueError):
                pass
            except EngineError as error:
                assert error.kind == "InvalidArgument", f"expected kind InvalidArgument, got {error.kind}"
            else:
                raise AssertionError(f"a prompt without tokens was answered with {items}")
            check_answer(await running.answer(self.request(2)))

    async def test_cleanup_twice(self) -> None:
        engine = self.make()
        await engine.start(INSTANCE)
        await engine.drain()
        await engine.cleanup()
        await engine.cleanup()

    async def test_cleanup_without_start(self) -> None:
        await self.make().cleanup()


def check_answer(items: list[EngineOutput]) -> None:
    """At least one item; the last one, and no other, has a finish reason; choice 0 only."""
    assert items, "an answer needs at least one item"
    assert all(item.finish_reason is None for item in items[:-1]), "only the last item may have a finish reason"
    assert items[-1].finish_reason is not None, "the last item needs a finish reason"
    assert all(not item.index for item in items), "the worker numbers the choices"


def _kill(context: Context, task: asyncio.Task[None]) -> None:
    """What the runtime does when a client kills a request."""
    context.kill()
    task.cancel()


def _cancel(context: Context, task: asyncio.Task[None]) -> None:
    """A caller that goes away without a word."""
    task.cancel()
