"""What the guard makes of engines that forget something."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from stator.errors import EngineError
from stator.llm.card import ModelCard
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest, SamplingOptions
from stator.runtime.context import Context
from stator.tasks import Scope
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.guard import Guard

pytestmark = pytest.mark.timeout(10)

REQUEST = PreprocessedRequest(token_ids=[1])


class Endless(LLMEngine):
    """Yields what it was given, then waits for ever; notes how it ends."""

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.closed = 0
        self.aborted: list[Context] = []
        self.abort_error: Exception | None = None

    async def start(self, instance_id: int) -> EngineConfig:
        return EngineConfig(model="m", card=ModelCard(display_name="m"))

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        try:
            for item in self.items:
                if isinstance(item, BaseException):
                    raise item
                yield item
            await asyncio.Event().wait()
        finally:
            self.closed += 1

    async def abort(self, context: Context) -> None:
        self.aborted.append(context)
        if self.abort_error is not None:
            raise self.abort_error


def item(token: int, reason: str | None = None) -> EngineOutput:
    return EngineOutput(token_ids=[token], finish_reason=reason)


async def test_the_stream_ends_after_the_finish_reason() -> None:
    engine = Endless(item(1), item(2, "stop"), item(3))
    async with Scope("test") as scope:
        items = [output async for output in Guard(engine, scope).generate(REQUEST, Context("r"))]
    assert [output.token_ids for output in items] == [[1], [2]]
    assert engine.closed == 1
    assert engine.aborted == [], "a normal end is no abort"


async def test_an_engine_with_choices_of_its_own_ends_after_the_last() -> None:
    class Native(Endless):
        native_choices = True

    engine = Native(item(1, "stop"), item(2), item(3, "length"), item(4))
    request = PreprocessedRequest(token_ids=[1], sampling_options=SamplingOptions(n=2))
    async with Scope("test") as scope:
        items = [output async for output in Guard(engine, scope).generate(request, Context("r"))]
    assert [output.token_ids for output in items] == [[1], [2], [3]]


async def test_items_of_another_shape_are_the_engines_error() -> None:
    engine = Endless({"token_ids": [1]})
    async with Scope("test") as scope:
        with pytest.raises(EngineError, match="invalid chunk shape: the engine yielded dict") as caught:
            await anext(Guard(engine, scope).generate(REQUEST, Context("r")))
    assert caught.value.kind == "InvalidArgument"
    assert engine.closed == 1


async def test_an_exit_of_the_engine_does_not_end_the_process() -> None:
    async with Scope("test") as scope:
        with pytest.raises(EngineError, match="SystemExit: 3"):
            await anext(Guard(Endless(SystemExit(3)), scope).generate(REQUEST, Context("r")))


@pytest.mark.parametrize("end", [Context.stop, Context.kill])
async def test_stop_and_kill_abort_once(end: Any) -> None:
    engine = Endless(item(1))
    async with Scope("test") as scope:
        context = Context("r")
        stream = Guard(engine, scope).generate(REQUEST, context)
        await anext(stream)
        end(context)
        context.kill()
        await scope.join()
        assert engine.aborted == [context]
        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert engine.closed == 1


async def test_a_request_stopped_before_it_began_is_aborted_too() -> None:
    engine = Endless(item(1, "stop"))
    async with Scope("test") as scope:
        context = Context("r")
        context.stop()
        assert [output async for output in Guard(engine, scope).generate(REQUEST, context)]
        await scope.join()
    assert engine.aborted == [context]


async def test_a_failing_abort_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine = Endless(item(1))
    engine.abort_error = RuntimeError("no")
    async with Scope("test") as scope:
        context = Context("some-request")
        stream = Guard(engine, scope).generate(REQUEST, context)
        await anext(stream)
        context.stop()
        await scope.join()
        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert "failed to abort request some-request" in caplog.text


async def test_closing_the_stream_closes_the_engines() -> None:
    engine = Endless(item(1))
    async with Scope("test") as scope:
        stream = Guard(engine, scope).generate(REQUEST, Context("r"))
        await anext(stream)
        await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert engine.closed == 1
    assert engine.aborted == []
