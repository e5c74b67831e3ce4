"""A plain async generator as an engine: what it may yield, and the parts of the contract it need not know."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stator.engines import create_engine, load_engine
from stator.errors import ConfigError, EngineError, UsageError
from stator.llm.card import byte_card
from stator.llm.output import CompletionUsage, EngineOutput
from stator.llm.request import PreprocessedRequest, StopConditions
from stator.runtime.context import Context
from stator.tasks import Scope
from stator.testing.engine_suite import EngineSuite, RunningEngine, check_answer
from stator.testing.tiny_tokenizers import build_model_directory
from stator.worker import FunctionEngine, FunctionOptions

pytestmark = pytest.mark.timeout(30)


async def letters(request: PreprocessedRequest, context: Context) -> AsyncIterator[str]:
    """A slow alphabet."""
    for number in range(10_000):
        await asyncio.sleep(0.0005)
        yield chr(ord("a") + number % 26)


class TestFunctionContract(EngineSuite):
    """A function that knows nothing of the contract keeps all of it."""

    def make(self) -> FunctionEngine:
        return FunctionEngine(letters, FunctionOptions(max_num_seqs=8))


@asynccontextmanager
async def started(function: Any, **options: Any) -> AsyncGenerator[RunningEngine]:
    class Suite(EngineSuite):
        def make(self) -> FunctionEngine:
            return FunctionEngine(function, FunctionOptions(**options))

    async with Suite().started() as running:
        yield running


def yielding(*items: Any) -> Any:
    async def function(request: PreprocessedRequest) -> AsyncIterator[Any]:
        for item in items:
            yield item

    return function


def request(max_tokens: int | None = None, **stop: Any) -> PreprocessedRequest:
    return PreprocessedRequest(
        token_ids=[1, 2, 3],
        eos_token_ids=stop.pop("eos", []),
        stop_conditions=StopConditions(max_tokens=max_tokens, **stop),
    )


def tokens(items: list[EngineOutput]) -> list[int]:
    return [token for item in items for token in item.token_ids]


async def test_all_forms_are_items() -> None:
    forms = ["é", 7, [8, 9], {"token_ids": [10]}, {"text": "x"}, EngineOutput(token_ids=[11])]
    async with started(yielding(*forms)) as running:
        items = await running.answer(request())
    assert tokens(items) == [*"é".encode(), 7, 8, 9, 10, 11]
    assert [item.text for item in items if item.text] == ["x"]
    check_answer(items)
    assert items[-1].finish_reason == "stop"
    assert items[-1].completion_usage == CompletionUsage(prompt_tokens=3, completion_tokens=7, total_tokens=10)


@pytest.mark.parametrize("item", [None, 1.5, b"bytes", [1, "x"], {"token_ids": "x"}, -1, [2**32], object()])
async def test_what_is_no_form_is_the_functions_error(item: Any) -> None:
    async with started(yielding("a", item)) as running:
        with pytest.raises(EngineError):
            await running.answer(request())


async def test_the_functions_own_end_stands() -> None:
    usage = CompletionUsage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    last = EngineOutput(token_ids=[5], finish_reason="content_filter", completion_usage=usage)
    async with started(yielding("a", last, "never seen")) as running:
        items = await running.answer(request())
    assert items[-1] == last
    async with started(yielding({"token_ids": [5], "finish_reason": "eos"})) as running:
        [item] = await running.answer(request())
    assert item.finish_reason == "eos"
    assert item.completion_usage == CompletionUsage(prompt_tokens=3, completion_tokens=1, total_tokens=4)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5])
async def test_max_tokens_cuts_an_item_where_it_must(limit: int) -> None:
    closed: list[bool] = []

    async def function(request: PreprocessedRequest) -> AsyncIterator[list[int]]:
        try:
            for number in range(5):
                yield [number, number, number]
        finally:
            closed.append(True)

    async with started(function) as running:
        items = await running.answer(request(limit))
    assert tokens(items) == [0, 0, 0, 1, 1][:limit]
    assert items[-1].finish_reason == "length"
    assert items[-1].completion_usage == CompletionUsage(prompt_tokens=3, completion_tokens=limit, total_tokens=3 + limit)
    assert closed == [True]


async def test_no_token_wanted_is_no_call() -> None:
    async def function(request: PreprocessedRequest) -> AsyncIterator[str]:
        raise AssertionError("nobody asked")
        yield ""

    async with started(function) as running:
        [item] = await running.answer(request(0))
    assert (item.token_ids, item.finish_reason) == ([], "length")


async def test_per_token_fields_are_cut_with_the_tokens() -> None:
    item = EngineOutput(token_ids=[1, 2, 3], log_probs=[-1.0, -2.0, -3.0], top_logprobs=[[], [], []])
    async with started(yielding(item)) as running:
        [found] = await running.answer(request(2))
    assert (found.token_ids, found.log_probs, found.top_logprobs) == ([1, 2], [-1.0, -2.0], [[], []])


@pytest.mark.parametrize(
    ("stop", "expected", "reason"),
    [
        ({"stop_token_ids": [3]}, [1, 2, 3], 3),
        ({"stop_token_ids_visible": [3]}, [1, 2, 3], 3),
        ({"stop_token_ids_hidden": [3]}, [1, 2, 3], None),
        ({"eos": [3]}, [1, 2, 3], None),
        ({"eos": [3], "ignore_eos": True}, [1, 2, 3, 3, 4], None),
        ({"stop_token_ids": [3], "min_tokens": 4}, [1, 2, 3, 3], 3),
    ],
)
async def test_stop_tokens_end_the_answer(stop: dict[str, Any], expected: list[int], reason: int | None) -> None:
    async with started(yielding([1, 2], [3, 3, 4])) as running:
        items = await running.answer(request(**stop))
    assert tokens(items) == expected
    assert (items[-1].finish_reason, items[-1].stop_reason) == ("stop", reason)


async def test_a_stopped_request_ends_the_functions_wait() -> None:
    waiting, cancelled = asyncio.Event(), asyncio.Event()

    async def function(request: PreprocessedRequest) -> AsyncIterator[str]:
        yield "a"
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with started(function) as running:
        context = Context("r")
        answer = running.scope.spawn(running.answer(request(), context))
        await waiting.wait()
        context.stop()
        async with asyncio.timeout(2):
            items = await answer
        assert not answer.cancelling()
    assert cancelled.is_set()
    assert [item.finish_reason for item in items] == [None, "cancelled"]
    assert items[-1].completion_usage == CompletionUsage(prompt_tokens=3, completion_tokens=1, total_tokens=4)


async def test_a_function_that_swallows_the_end_of_its_wait_ends_all_the_same() -> None:
    asked = asyncio.Event()

    async def function(request: PreprocessedRequest) -> AsyncIterator[str]:
        while True:
            try:
                asked.set()
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                pass
            yield "still here"

    async with started(function) as running:
        context = Context("r")
        answer = running.scope.spawn(running.answer(request(), context))
        await asyncio.wait_for(asked.wait(), 5)
        context.stop()
        async with asyncio.timeout(2):
            items = await answer
        assert not answer.cancelling()
    assert [item.finish_reason for item in items] == ["cancelled"]


async def test_a_function_may_look_itself() -> None:
    async def function(request: PreprocessedRequest, context: Context) -> AsyncIterator[str]:
        yield "a"
        context.stop()
        if context.is_stopped:
            return
        yield "b"

    async with started(function) as running:
        items = await running.answer(request())
    assert [item.finish_reason for item in items] == [None, "cancelled"]


async def test_a_killed_request_cancels_the_function() -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def function(request: PreprocessedRequest) -> AsyncIterator[str]:
        try:
            asked.set()
            await asyncio.Event().wait()
            yield ""
        finally:
            ended.set()

    async with started(function) as running, Scope("test") as scope:
        context = Context("r")
        answer = scope.spawn(running.answer(request(), context))
        await asyncio.wait_for(asked.wait(), 5)
        context.kill()
        answer.cancel()
        await asyncio.wait({answer}, timeout=1)
        assert answer.cancelled()
    assert ended.is_set()


async def test_what_the_function_raises_is_raised() -> None:
    async def function(request: PreprocessedRequest) -> AsyncIterator[str]:
        yield "a"
        raise ValueError("bad prompt")

    async with started(function) as running:
        with pytest.raises(ValueError, match="bad prompt"):
            await running.answer(request())


async def test_its_name_is_the_models_unless_another_is_given() -> None:
    async with started(letters, context_length=77, max_num_seqs=3) as running:
        config = running.config
    assert (config.model, config.card.display_name, config.served_name) == ("letters", "letters", None)
    assert (config.context_length, config.max_num_seqs) == (77, 3)
    async with started(letters, name="abc") as running:
        assert running.config.served_name == "abc"


async def test_a_card_says_which_tokenizer_reads_the_text(tmp_path: Path) -> None:
    directory = await asyncio.to_thread(build_model_directory, tmp_path)
    async with started(yielding("hello world"), model=str(directory)) as running:
        items = await running.answer(request())
        assert running.config.card.model_info is not None
    engine = FunctionEngine(letters)
    assert await engine.start(1)
    assert tokens(items) != list(b"hello world")
    card = await asyncio.to_thread(byte_card, "given")
    given = FunctionEngine(yielding("a"), card=card)
    assert (await given.start(1)).card is card


async def test_a_directory_without_a_model_is_the_operators_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model directory"):
        await FunctionEngine(letters, FunctionOptions(model=str(tmp_path))).start(1)


async def no_generator(request: PreprocessedRequest) -> str:
    return ""


def test_what_is_no_generator_is_refused() -> None:
    with pytest.raises(UsageError, match="is no async generator"):
        FunctionEngine(no_generator)  # type: ignore[arg-type]


async def test_a_function_is_named_by_its_module() -> None:
    engine = create_engine(f"{__name__}:letters", {"name": "abc", "max_num_seqs": "5"})
    assert isinstance(engine, FunctionEngine)
    assert (engine.options.name, engine.options.max_num_seqs) == ("abc", 5)
    with pytest.raises(ConfigError, match="speed"):
        create_engine(f"{__name__}:letters", {"speed": "1"})


@pytest.mark.parametrize("name", ["no_generator", "pytestmark", "yielding"])
def test_a_function_of_another_kind_is_no_engine(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no engine: expected a class with generate\(\), or an async generator function"):
        create_engine(f"{__name__}:{name}")


def test_a_function_has_no_class() -> None:
    with pytest.raises(ConfigError, match=r"expected a class with generate\(\)"):
        load_engine(f"{__name__}:letters")
