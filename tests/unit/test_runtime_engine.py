"""What may be served, and how operators and engines link into pipelines."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from stator.errors import UsageError
from stator.runtime.context import Context
from stator.runtime.engine import Engine, Operator, generate_function, pipeline

pytestmark = pytest.mark.timeout(10)


async def items_of(stream: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in stream]


async def with_context(request: Any, context: Context) -> AsyncIterator[Any]:
    yield request
    yield context.id


async def without_context(request: Any) -> AsyncIterator[Any]:
    yield request


class Words:
    """An engine: the words of a text."""

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        for word in request["text"].split():
            yield word


class Upper:
    """An operator that changes the request on the way in and the items on the way out."""

    async def generate(self, request: Any, next: Engine, context: Context) -> AsyncIterator[Any]:
        async for item in next.generate({"text": request["text"] + " end"}, context):
            yield item.upper()


class Twice:
    """An operator that asks its engine two times."""

    async def generate(self, request: Any, next: Engine, context: Context) -> AsyncIterator[Any]:
        for number in (1, 2):
            async for item in next.generate(request, context.child(f"{context.id}-{number}")):
                yield item


class Whisper:
    """An operator that leaves the engine out."""

    async def generate(self, request: Any, next: Engine, context: Context) -> AsyncIterator[Any]:
        yield "hush"


# -- what may be served


async def test_a_function_of_request_and_context() -> None:
    assert await items_of(generate_function(with_context)(1, Context("r"))) == [1, "r"]


async def test_a_function_of_the_request_alone() -> None:
    assert await items_of(generate_function(without_context)(1, Context("r"))) == [1]


async def test_a_method_and_a_callable_object() -> None:
    class Model:
        async def answer(self, request: Any, context: Context) -> AsyncIterator[Any]:
            yield context.id

        async def __call__(self, request: Any) -> AsyncIterator[Any]:
            yield request

    assert await items_of(generate_function(Model().answer)(1, Context("r"))) == ["r"]
    assert await items_of(generate_function(Model())(7, Context("r"))) == [7]


async def test_an_engine() -> None:
    assert await items_of(generate_function(Words())({"text": "a b"}, Context("r"))) == ["a", "b"]


async def test_a_function_that_returns_an_iterator() -> None:
    def handler(request: Any, context: Context) -> AsyncIterator[Any]:
        return with_context(request, context)

    assert await items_of(generate_function(handler)(1, Context("r"))) == [1, "r"]


async def test_parameters_with_defaults_and_keywords_are_left_alone() -> None:
    async def handler(request: Any, context: Context | None = None, *, loud: bool = False) -> AsyncIterator[Any]:
        yield context is not None and not loud

    assert await items_of(generate_function(handler)(1, Context("r"))) == [True]


async def test_a_second_parameter_with_a_default_is_the_handlers_own() -> None:
    async def handler(request: Any, voice: str = "alto") -> AsyncIterator[Any]:
        yield voice

    assert await items_of(generate_function(handler)(1, Context("r"))) == ["alto"]


async def test_a_function_of_anything_gets_both() -> None:
    async def handler(*arguments: Any) -> AsyncIterator[Any]:
        yield len(arguments)

    assert await items_of(generate_function(handler)(1, Context("r"))) == [2]


async def coroutine(request: Any, context: Context) -> list[Any]:
    return [request]


async def no_parameters() -> AsyncIterator[Any]:
    yield 1


async def needs_three(request: Any, context: Context, temperature: float) -> AsyncIterator[Any]:
    yield temperature


async def needs_keyword(request: Any, *, temperature: float) -> AsyncIterator[Any]:
    yield temperature


def plain_generator(request: Any, context: Context) -> Any:
    yield request


class CallableCoroutine:
    async def __call__(self, request: Any) -> Any:
        return request


@pytest.mark.parametrize(
    "handler",
    [None, 7, "generate", coroutine, no_parameters, needs_three, needs_keyword, plain_generator, CallableCoroutine(), Upper()],
    ids=lambda handler: getattr(handler, "__name__", type(handler).__name__),
)
def test_what_cannot_be_served_is_refused_at_once(handler: Any) -> None:
    with pytest.raises(UsageError):
        generate_function(handler)


# -- pipelines


async def test_a_pipeline_of_one_engine_is_that_engine() -> None:
    engine = Words()
    assert pipeline(engine) is engine


async def test_operators_meet_the_request_in_order() -> None:
    engine = pipeline(Upper(), Twice(), Words())
    assert isinstance(engine, Engine)
    assert await items_of(engine.generate({"text": "a"}, Context("r"))) == ["A", "END", "A", "END"]
    other = pipeline(Twice(), Upper(), Words())
    assert await items_of(other.generate({"text": "a"}, Context("r"))) == ["A", "END", "A", "END"]


async def test_a_pipeline_may_be_a_stage_of_another() -> None:
    inner = pipeline(Upper(), Words())
    outer = pipeline(Twice(), inner)
    assert await items_of(outer.generate({"text": "x"}, Context("r"))) == ["X", "END", "X", "END"]


async def test_an_operator_may_answer_by_itself() -> None:
    assert await items_of(pipeline(Whisper(), Words()).generate({"text": "a"}, Context("r"))) == ["hush"]


async def test_a_pipeline_can_be_served() -> None:
    generate = generate_function(pipeline(Upper(), Words()))
    assert await items_of(generate({"text": "a"}, Context("r"))) == ["A", "END"]


async def test_the_context_reaches_every_stage() -> None:
    seen: list[Context] = []

    class Note:
        async def generate(self, request: Any, next: Engine, context: Context) -> AsyncIterator[Any]:
            seen.append(context)
            async for item in next.generate(request, context):
                yield item

    class End:
        async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
            seen.append(context)
            yield 1

    context = Context("r")
    await items_of(pipeline(Note(), Note(), End()).generate(None, context))
    assert seen == [context] * 3


def test_an_operator_is_told_from_an_engine_by_its_parameters() -> None:
    assert isinstance(Upper(), Operator)
    with pytest.raises(UsageError, match="no operator"):
        pipeline(Words(), Words())  # the first one takes no `next`
    with pytest.raises(UsageError, match="last stage"):
        pipeline(Upper(), Upper())  # nobody behind the last one


@pytest.mark.parametrize("stages", [(), (Upper(), object()), (object(), Words()), (with_context, Words()), (Upper(), None)])
def test_stages_in_the_wrong_place_are_refused(stages: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        pipeline(*stages)
