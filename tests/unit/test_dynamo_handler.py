"""What may be served under the reference's names, and how its errors are said."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from pydantic import BaseModel

from stator.dynamo.context import Context
from stator.dynamo.decorators import dynamo_endpoint, dynamo_worker
from stator.dynamo.errors import call_failed, is_of_stream, stream_failed
from stator.dynamo.exceptions import DynamoException, EngineShutdown, HttpError, InvalidArgument
from stator.dynamo.handler import bidirectional, unary
from stator.errors import ConnectFailed, EngineError, Overloaded, StatorError, StreamIncomplete, Timeout, Unavailable
from stator.runtime import Context as StatorContext

pytestmark = pytest.mark.timeout(30)


async def answer(handler: Any, request: Any = 1) -> list[Any]:
    return [item async for item in unary(handler)(request, StatorContext("r"))]


async def test_the_context_is_passed_by_its_name() -> None:
    async def plain(request: Any) -> AsyncIterator[Any]:
        yield "plain"

    async def named(request: Any, context: Context) -> AsyncIterator[Any]:
        yield context.id()

    async def optional(request: Any, context: Context | None = None) -> AsyncIterator[Any]:
        yield context and context.id()

    async def keyword(request: Any, *, context: Context) -> AsyncIterator[Any]:
        yield context.id()

    async def other(request: Any, other: str = "default") -> AsyncIterator[Any]:
        yield other

    assert [await answer(each) for each in (plain, named, optional, keyword, other)] == [
        ["plain"],
        ["r"],
        ["r"],
        ["r"],
        ["default"],
    ]


def synchronous(request: Any) -> Any:
    yield 1


async def coroutine(request: Any) -> int:
    return 1


def missing(request: Any, other: Any) -> Any:
    raise AssertionError("not called")


@pytest.mark.parametrize(
    ("handler", "kind", "says"),
    [
        (synchronous, "Unknown", "AttributeError: 'generator' object has no attribute '__anext__'"),
        (coroutine, "Unknown", "AttributeError: 'coroutine' object has no attribute '__anext__'"),
        (missing, "InvalidArgument", "TypeError: missing() missing 1 required positional argument: 'other'"),
        (3, "InvalidArgument", "TypeError: 'int' object is not callable"),
    ],
)
def test_what_cannot_be_called_fails_the_call(handler: Any, kind: str, says: str) -> None:
    with pytest.raises(EngineError) as raised:
        unary(handler)(1, StatorContext("r"))
    assert (raised.value.kind, raised.value.message, raised.value.phase) == (kind, says, "prologue")


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: InvalidArgument("why"), "InvalidArgument", "why"),
        (lambda: DynamoException("a", 2), "Unknown", "('a', 2)"),
        (lambda: EngineShutdown(), "EngineShutdown", ""),
        (lambda: GeneratorExit(), "EngineShutdown", "engine shutting down"),
        (lambda: HttpError(422, 'ö"'), "InvalidArgument", '{"message":"ö\\"","code":422}'),
    ],
)
async def test_typed_errors_have_their_kind_and_text(make: Callable[[], BaseException], kind: str, says: str) -> None:
    async def fails(request: Any) -> AsyncIterator[Any]:
        yield 1
        raise make()

    with pytest.raises(EngineError) as raised:
        await answer(fails)
    assert (raised.value.kind, raised.value.message) == (kind, says)


async def test_other_errors_pass_as_they_are_and_the_handler_is_closed() -> None:
    closed: list[str] = []

    async def endless(request: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield 1
                if request:
                    raise KeyError("k")
        finally:
            closed.append("closed")

    with pytest.raises(KeyError):
        await answer(endless)
    stream = unary(endless)(0, StatorContext("r"))
    await anext(stream)
    await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]
    assert closed == ["closed", "closed"]


async def test_a_cancelled_handler_is_cancelled_where_it_waits() -> None:
    async def waits(request: Any) -> AsyncIterator[Any]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            request.append("cancelled")
            raise
        yield 1

    seen: list[str] = []
    task = asyncio.create_task(answer(waits, seen))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert seen == ["cancelled"] and task.cancelled()


async def test_inputs_are_read_through_the_references_class() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        yield 2

    async def double(inputs: Any, context: Context) -> AsyncIterator[Any]:
        assert aiter(inputs) is inputs and type(inputs).__name__ == "PyAsyncRequestStream"
        async for number in inputs:
            yield 2 * number

    assert [item async for item in bidirectional(double)(numbers(), StatorContext("r"))] == [2, 4]


# -- errors as callers see them -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "of_stream", "text"),
    [
        (EngineError("ValueError: bad", kind="InvalidArgument"), True, "BackendInvalidArgument: ValueError: bad"),
        (StreamIncomplete("cut"), False, "Disconnected: Stream ended before generation completed: cut"),
        (StreamIncomplete("Stream ended before generation completed", phase="items"), True, None),
        (Overloaded("full"), False, "ResourceExhausted: full"),
        (Timeout("slow", phase="first item"), True, "ResponseTimeout: slow"),
        (Timeout("slow", phase="connect"), False, "ConnectionTimeout: slow"),
    ],
)
def test_texts_begin_with_the_references_kind(error: StatorError, of_stream: bool, text: str | None) -> None:
    failed = stream_failed(error)
    assert isinstance(failed, ValueError)
    assert str(failed) == (text or "Disconnected: Stream ended before generation completed")
    assert is_of_stream(error) == of_stream


def test_a_call_that_finds_nobody_says_it_as_the_reference_does() -> None:
    error = Unavailable("nobody")
    assert str(call_failed(error, endpoint="a/b/c", listed=False)) == "Unavailable: No workers available for endpoint a/b/c"
    assert "instance_id=7 not found for endpoint a/b/c" in str(call_failed(error, endpoint="a/b/c", listed=False, wanted=7))
    assert str(call_failed(error, endpoint="a/b/c", listed=True)) == "Unavailable: nobody"
    refused = ConnectFailed("the worker failed before the response stream: Generate Error: x: y", phase="prologue")
    begins = "CannotConnect: Worker generate() failed before response stream: "
    assert str(call_failed(refused, endpoint="a/b/c", listed=True)) == f"{begins}Generate Error: x: y"
    broken = EngineError("TypeError: no", phase="prologue")
    assert str(call_failed(broken, endpoint="a/b/c", listed=True)) == f"{begins}Generate Error: TypeError: no"
    assert not isinstance(call_failed(broken, endpoint="a/b/c", listed=True), ValueError)


def test_an_http_error_is_checked_and_cut(caplog: pytest.LogCaptureFixture) -> None:
    assert (str(HttpError(404, "x")), HttpError(404, "x").code, HttpError(404, "x").message) == ("HTTP 404: x", 404, "x")
    for code, message in ((True, "x"), ("4", "x"), (600, "x"), (-1, "x"), (400, 5)):
        with pytest.raises(ValueError, match="HttpError|HTTP"):  # noqa: RUF043
            HttpError(code, message)  # type: ignore[arg-type]
    long = HttpError(400, "x" * 9000).message
    assert len(long) == 8192 and long.endswith("x...")
    assert "9000 characters" in caplog.text


# -- decorators ---------------------------------------------------------------------------------------------------------------


class Question(BaseModel):
    text: str


async def test_requests_become_models() -> None:
    @dynamo_endpoint(Question, Question)
    async def ask(request: Question, context: Context) -> AsyncIterator[str]:
        yield request.text

    class Service:
        @dynamo_endpoint(Question, Question)
        async def ask(self, request: Question) -> AsyncIterator[str]:
            yield request.text

    assert await answer(ask, {"text": "a"}) == await answer(ask, json.dumps({"text": "a"})) == ["a"]
    assert await answer(Service().ask, {"text": "b"}) == ["b"]
    for wrong in ({"tex": "a"}, "{", 5, None):
        with pytest.raises(ValueError, match="^Invalid request: "):  # noqa: RUF043
            await answer(ask, wrong)


async def test_what_is_no_model_changes_nothing() -> None:
    @dynamo_endpoint(dict, dict)
    async def ask(request: Any) -> AsyncIterator[Any]:
        yield request

    assert await answer(ask, 5) == [5]
    assert ask.__name__ == "ask"


def test_an_old_argument_is_ignored_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="enable_nats"):
        dynamo_worker(enable_nats=True)
