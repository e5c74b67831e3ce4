"""What every engine must do (`spec/45 §1, §14`), in two forms. Subclass `EngineSuite`, say how to make an engine, and pytest collects
the cases:

    class TestMyEngine(EngineSuite):
        def make(self): return MyEngine(MyOptions(model="tiny"))

Or, anywhere: `await run_conformance(MyEngine)`, which raises `ConformanceFailure` at the first rule that is broken.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

from stator.llm.request import PreprocessedRequest
from stator.testing.engine_cases import CASES
from stator.testing.engine_kit import INSTANCE, ConformanceFailure, EngineKit, RunningEngine, check_answer, collect
from stator.worker.engine import LLMEngine

__all__ = ["INSTANCE", "ConformanceFailure", "EngineSuite", "RunningEngine", "check_answer", "collect", "run_conformance"]


async def run_conformance(
    factory: Callable[[], LLMEngine],
    *,
    prompt: Sequence[int] = tuple(range(1, 33)),
    time_limit: float = 60.0,
    loop_limit: float = 0.25,
) -> None:
    """Hold engines made by `factory` to every rule. Raises `ConformanceFailure`, naming the rule, at the first that is broken.

    `prompt`: token ids the model knows, answered with several items and, for 10 000 tokens, in no less than half a second.
    `time_limit` (seconds) bounds a start and each answer, `loop_limit` how long the event loop may have to wait for its turn.
    """
    kit = EngineKit(make=factory, prompt=prompt, time_limit=time_limit, loop_limit=loop_limit)
    for case in CASES.values():
        await case.hold(kit)


class EngineSuite(ABC):
    """The contract, one case each. Override the class attributes where the engine's model needs other values."""

    prompt: Sequence[int] = tuple(range(1, 33))
    """token ids the model knows; answering it with `max_tokens` of 10 000 must take several items and at least half a second"""
    time_limit: float = 60.0
    """seconds a start, or any one answer, may take"""
    loop_limit: float = 0.25
    """seconds that the event loop may have to wait for its turn while the engine generates"""

    @abstractmethod
    def make(self) -> LLMEngine:
        """A fresh engine, not started."""
        ...

    @property
    def kit(self) -> EngineKit:
        """What the cases need."""
        return EngineKit(make=self.make, prompt=self.prompt, time_limit=self.time_limit, loop_limit=self.loop_limit)

    @asynccontextmanager
    async def started(self) -> AsyncGenerator[RunningEngine]:
        """An engine from start to clean-up."""
        async with self.kit.started() as running:
            yield running

    def request(self, max_tokens: int) -> PreprocessedRequest:
        """A request that runs to `max_tokens` or the end of the context."""
        return self.kit.request(max_tokens)

    async def _hold(self, rule: str) -> None:
        await CASES[rule].hold(self.kit)

    async def test_start_describes_the_model(self) -> None:
        await self._hold("start describes the model")

    async def test_last_item_alone_has_the_finish_reason(self) -> None:
        await self._hold("an answer has items, and the last alone has the finish reason")

    async def test_max_tokens_ends_the_answer(self) -> None:
        await self._hold("max_tokens ends the answer")

    async def test_ranks_are_the_same_at_each_call(self) -> None:
        await self._hold("ranks are the same at each call")

    async def test_the_metrics_page_can_be_read(self) -> None:
        await self._hold("the metrics hook leaves a page that can be read")

    async def test_snapshots_are_possible(self) -> None:
        await self._hold("snapshots are of declared ranks and possible")

    async def test_commands_have_names(self) -> None:
        await self._hold("commands have names")

    async def test_eight_answers_at_once(self) -> None:
        await self._hold("eight answers at once are whole")

    async def test_the_event_loop_is_never_blocked(self) -> None:
        await self._hold("the event loop is never blocked")

    async def test_a_reader_that_pauses_delays_nobody(self) -> None:
        await self._hold("a reader that pauses delays nobody")

    async def test_a_request_at_fault_is_an_invalid_argument(self) -> None:
        await self._hold("a request at fault is an invalid argument")

    async def test_the_health_probe_is_answered(self) -> None:
        await self._hold("the health probe is answered")

    async def test_a_healthy_engine_does_not_say_that_it_failed(self) -> None:
        await self._hold("a healthy engine does not say that it failed")

    async def test_stopped_before_the_first_item(self) -> None:
        await self._hold("a request stopped before its first item ends as cancelled")

    async def test_stopped_in_mid_stream(self) -> None:
        await self._hold("a request stopped in mid-stream ends as cancelled")

    async def test_nothing_is_yielded_after_a_kill(self) -> None:
        await self._hold("nothing is yielded after a kill")

    async def test_killed_requests_free_their_slots(self) -> None:
        await self._hold("killed requests free their slots")

    async def test_abandoned_requests_free_their_slots(self) -> None:
        await self._hold("abandoned requests free their slots")

    async def test_aborting_what_is_over_does_no_harm(self) -> None:
        await self._hold("aborting what is over does no harm")

    async def test_cleanup_leaves_no_task_and_no_thread(self) -> None:
        await self._hold("cleanup leaves no task and no thread")

    async def test_cleanup_twice(self) -> None:
        await self._hold("a second cleanup does no harm")

    async def test_cleanup_without_start(self) -> None:
        await self._hold("cleanup without start does no harm")
