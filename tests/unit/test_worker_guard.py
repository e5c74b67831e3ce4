"""What the guard makes of engines that forget something."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from stator.errors import EngineError, Unavailable
from stator.llm.card import ModelCard
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest, SamplingOptions
from stator.runtime.context import Context
from stator.tasks import Scope
from stator.testing.plane_suite import eventually
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.guard import Guard

pytestmark = pytest.mark.timeout(10)

REQUEST = PreprocessedRequest(token_ids=[1])


class Endless(LLMEngine):
    """Yields what it was given, then waits for ever; notes how it ends."""

    def __init__(self, *items: Any) -> None:
        self.items = items
        self.given = 0
        """requests that have got all items, and wait"""
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
            self.given += 1
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


class Waiting(Endless):
    """One item, and then a wait that a test can end."""

    def __init__(self) -> None:
        super().__init__(item(1))
        self.ended = 0

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        try:
            async for each in super().generate(request, context):
                yield each
        finally:
            self.ended += 1


async def waiting(guard: Guard, context: Context) -> list[EngineOutput]:
    return [output async for output in guard.generate(REQUEST, context)]


async def test_a_failed_engine_ends_what_runs_at_once_and_refuses_what_comes() -> None:
    engine = Waiting()
    async with Scope("test") as scope:
        guard = Guard(engine, scope)
        answers = [scope.spawn(waiting(guard, Context(f"r{number}"))) for number in range(3)]
        await eventually(lambda: engine.given == 3)
        guard.fail("its process died")
        async with asyncio.timeout(1):
            found = await asyncio.gather(*answers, return_exceptions=True)
        for error in found:
            assert isinstance(error, EngineError)
            assert (error.kind, error.message) == ("EngineShutdown", "the engine has failed: its process died")
        assert engine.ended == engine.closed == 3
        assert not any(task.cancelling() for task in answers)
        with pytest.raises(Unavailable, match="its process died"):
            guard.generate(REQUEST, Context("late"))


async def test_an_answer_whose_reader_pauses_ends_when_the_reader_goes_on() -> None:
    """The pausing reader itself is not cancelled."""
    engine = Waiting()
    async with Scope("test") as scope:
        guard = Guard(engine, scope)
        stream = guard.generate(REQUEST, Context("r"))
        assert (await anext(stream)).token_ids == [1]
        guard.fail("gone")
        await asyncio.sleep(0.01)  # the reader does something else
        with pytest.raises(EngineError, match="the engine has failed: gone"):
            await anext(stream)
    assert engine.ended == 1


async def test_an_answer_that_is_complete_stays_so() -> None:
    engine = Endless(item(1), item(2, "stop"))
    async with Scope("test") as scope:
        guard = Guard(engine, scope)
        stream = guard.generate(REQUEST, Context("r"))
        await anext(stream)
        last = await anext(stream)
        guard.fail("gone")
        assert last.finish_reason == "stop"
        assert [output async for output in stream] == []


async def test_a_caller_that_cancels_while_the_engine_fails_is_cancelled() -> None:
    """Its cancellation is not taken for the engine's failure."""
    engine = Waiting()
    async with Scope("test") as scope:
        guard = Guard(engine, scope)
        answer = scope.spawn(waiting(guard, Context("r")))
        await eventually(lambda: engine.given == 1)
        guard.fail("gone")
        answer.cancel()
        await asyncio.wait({answer}, timeout=1)
        assert answer.cancelled()


async def test_an_engine_that_catches_the_end_of_its_wait_ends_all_the_same() -> None:
    asked = asyncio.Event()

    class Stubborn(Endless):
        async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
            try:
                asked.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                yield item(7)
            yield item(8)

    async with Scope("test") as scope:
        guard = Guard(Stubborn(), scope)
        answer = scope.spawn(waiting(guard, Context("r")))
        await asyncio.wait_for(asked.wait(), 5)
        guard.fail("gone")
        await asyncio.wait({answer}, timeout=1)
        assert isinstance(answer.exception(), EngineError)
        assert not answer.cancelling(), "the task can go on to wait for other things"


async def test_an_engine_that_says_it_shuts_down_is_heard_and_ends_the_others() -> None:
    class Dying(Endless):
        async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
            if context.id == "last straw":
                await other_waits.wait()
                raise EngineError("out of memory", kind="EngineShutdown")
            other_waits.set()
            await asyncio.Event().wait()
            yield item(1)

    other_waits = asyncio.Event()
    heard: list[str] = []
    async with Scope("test") as scope:
        guard = Guard(Dying(), scope, died=lambda reason: (heard.append(reason), guard.fail(reason))[0])
        other = scope.spawn(waiting(guard, Context("other")))
        with pytest.raises(EngineError, match=r"^out of memory$"):
            await waiting(guard, Context("last straw"))
        await asyncio.wait({other}, timeout=1)
        assert isinstance(other.exception(), EngineError)
    assert heard == ["out of memory"]


async def test_an_error_of_one_request_is_no_end_of_the_engine() -> None:
    heard: list[str] = []
    async with Scope("test") as scope:
        guard = Guard(Endless(EngineError("bad luck")), scope, died=heard.append)
        with pytest.raises(EngineError, match="bad luck"):
            await waiting(guard, Context("r"))
    assert heard == []


async def test_a_stream_that_is_dropped_without_a_word_is_closed() -> None:
    engine = Endless(item(1))
    async with Scope("test") as scope:
        guard = Guard(engine, scope)
        stream = guard.generate(REQUEST, Context("dropped"))
        assert (await anext(stream)).token_ids == [1]
        del stream
        async with asyncio.timeout(5):
            while not engine.closed:
                await asyncio.sleep(0)
