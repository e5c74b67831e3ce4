"""The worker's side of a request: every request that was taken is answered exactly once, whatever its handler does."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from stator.errors import (
    Cancelled,
    ConnectFailed,
    Disconnected,
    EngineError,
    Overloaded,
    StatorError,
    StreamIncomplete,
    Timeout,
    Unavailable,
)
from stator.protocol.envelope import IncomingRequest
from stator.runtime import serving as serving_module
from stator.runtime.context import Context
from stator.runtime.engine import Handler, generate_function
from stator.runtime.serving import Serving
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(20)


class Answer:
    """A `Responder` that writes down what it is told. `room` items fit before `ready` must be awaited."""

    def __init__(self, *, room: int = 1_000_000) -> None:
        self.log: list[Any] = []
        self.dead = False
        self.room = room
        self.made_room = asyncio.Event()
        self.sent_items = 0
        self.sent_bytes = 0

    def wait(self) -> None:
        self.note("wait")

    def start(self) -> None:
        self.note("start")

    def accept(self) -> None:
        self.note("accept")

    def refuse(self, error: StatorError) -> None:
        self.note("refuse")
        self.note(error)
        self.dead = True

    def send(self, item: Any) -> bool:
        if self.dead:
            return False
        self.note(item)
        self.room -= 1
        return self.room > 0

    async def ready(self) -> None:
        await asyncio.sleep(0)
        while self.room <= 0 and not self.dead:
            self.made_room.clear()
            await self.made_room.wait()

    def end(self, error: StatorError | None = None) -> None:
        self.note("end")
        self.note(error)
        self.dead = True

    def note(self, what: Any) -> None:
        if not self.dead:
            self.log.append(what)

    @property
    def items(self) -> list[Any]:
        assert self.log[0] == "accept"
        return self.log[1 : self.log.index("end")] if "end" in self.log else self.log[1:]

    @property
    def error(self) -> Any:
        """The error of the sentinel or the refusal."""
        assert self.log[-2] in ("end", "refuse"), f"not answered: {self.log}"
        return self.log[-1]


def request(body: Any = None, **facts: Any) -> IncomingRequest:
    return IncomingRequest(id=facts.pop("id", "r1"), body=body, **facts)


def serve(handler: Handler) -> Serving:
    return Serving(generate_function(handler), name="test.backend.generate")


async def answered(serving: Serving, answer: Answer) -> Answer:
    """Wait until the request is over; exactly one of refuse and end was called."""
    await asyncio.wait_for(serving.idle(), 10)
    assert sum(entry in ("refuse", "end") for entry in answer.log if isinstance(entry, str)) == 1
    return answer


async def call(handler: Handler, body: Any = None, **facts: Any) -> Answer:
    serving, answer = serve(handler), Answer()
    serving(request(body, **facts), answer)
    return await answered(serving, answer)


async def numbers(request: Any) -> AsyncIterator[Any]:
    for number in range(request):
        yield number


async def waits(request: Any, context: Context) -> AsyncIterator[Any]:
    yield "first"
    await asyncio.Event().wait()


# -- one request


async def test_items_and_the_sentinel() -> None:
    assert (await call(numbers, 3)).log == ["accept", 0, 1, 2, "end", None]


async def test_an_empty_stream() -> None:
    assert (await call(numbers, 0)).log == ["accept", "end", None]


async def test_the_context_has_what_the_request_had() -> None:
    async def facts(request: Any, context: Context) -> AsyncIterator[Any]:
        now = asyncio.get_running_loop().time()
        yield context.id, context.metadata, context.headers, context.deadline is not None and context.deadline - now

    answer = await call(facts, id="abc", metadata={"a": "b"}, headers={"traceparent": "t"}, deadline=60.0)
    id, metadata, headers, left = answer.items[0]
    assert (id, metadata, headers) == ("abc", {"a": "b"}, {"traceparent": "t"})
    assert 50 < left <= 60
    assert (await call(facts)).items[0][3] is False


async def test_a_full_responder_pauses_the_handler() -> None:
    serving, answer = serve(numbers), Answer(room=2)
    serving(request(5), answer)
    await eventually(lambda: len(answer.log) == 3)
    for _ in range(10):
        await asyncio.sleep(0)
    assert answer.items == [0, 1]
    answer.room = 10
    answer.made_room.set()
    assert (await answered(serving, answer)).items == [0, 1, 2, 3, 4]


# -- errors


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("no such voice"), "InvalidArgument", "ValueError: no such voice"),
        (RuntimeError("gpu on fire"), "Unknown", "RuntimeError: gpu on fire"),
        (SystemExit(3), "Unknown", "SystemExit: 3"),
        (EngineError("out of blocks", kind="Unknown"), "Unknown", "out of blocks"),
    ],
)
async def test_what_a_handler_raises_ends_its_request(error: BaseException, kind: str, text: str) -> None:
    async def fails(request: Any) -> AsyncIterator[Any]:
        yield 1
        raise error

    answer = await call(fails)
    assert answer.items == [1]
    assert isinstance(answer.error, EngineError)
    assert (answer.error.kind, answer.error.message) == (kind, text)


@pytest.mark.parametrize("error", [Overloaded("no slot"), Unavailable("model not loaded yet")])
async def test_a_handler_may_send_callers_elsewhere(error: StatorError) -> None:
    async def refuses(request: Any) -> AsyncIterator[Any]:
        raise error
        yield

    answer = await call(refuses)
    assert answer.error is error
    assert answer.error.retryable


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Disconnected("x"), "Disconnected"),
        (ConnectFailed("x"), "CannotConnect"),
        (StreamIncomplete("x"), "Disconnected"),
        (Timeout("x", phase="connect"), "ConnectionTimeout"),
        (Timeout("x", phase="items"), "ResponseTimeout"),
    ],
)
async def test_trouble_of_a_call_the_handler_made_is_no_trouble_with_the_worker(error: StatorError, kind: str) -> None:
    async def calls_others(request: Any) -> AsyncIterator[Any]:
        raise error
        yield

    answer = await call(calls_others)
    assert isinstance(answer.error, EngineError)
    assert answer.error.kind == kind
    assert answer.error.message == f"{type(error).__name__}: x"


async def test_an_error_before_the_first_step_is_a_refusal() -> None:
    def starts_badly(request: Any, context: Context) -> AsyncIterator[Any]:
        raise Overloaded("full")

    answer = await call(starts_badly)
    assert answer.log[0] == "refuse"
    assert isinstance(answer.error, Overloaded)


async def test_a_handler_that_returns_no_iterator_is_an_engine_error() -> None:
    def returns_a_list(request: Any, context: Context) -> Any:
        return [1, 2]

    assert isinstance((await call(returns_a_list)).error, EngineError)


async def test_an_item_that_cannot_be_sent_ends_the_request_and_cleans_up() -> None:
    cleaned: list[bool] = []

    async def sends_rubbish(request: Any) -> AsyncIterator[Any]:
        try:
            yield 1
            yield object()
        finally:
            cleaned.append(True)

    class Picky(Answer):
        def send(self, item: Any) -> bool:
            if not isinstance(item, int):
                raise EngineError("no JSON form")
            return super().send(item)

    serving, answer = serve(sends_rubbish), Picky()
    serving(request(), answer)
    await answered(serving, answer)
    assert answer.items == [1]
    assert answer.error.message == "no JSON form"
    assert cleaned == [True]


async def test_one_failure_is_logged_once_with_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(request: Any) -> AsyncIterator[Any]:
        raise RuntimeError("boom")
        yield

    await call(fails, id="the-id")
    assert len([entry for entry in caplog.records if "the-id" in entry.getMessage()]) == 1


# -- stop and kill


async def test_stop_is_the_handlers_business() -> None:
    async def polite(request: Any, context: Context) -> AsyncIterator[Any]:
        yield "hello"
        await context.stopped()
        yield "goodbye"

    serving, answer = serve(polite), Answer()
    context = serving(request(), answer)
    await eventually(lambda: "hello" in answer.log)
    context.stop()
    assert (await answered(serving, answer)).log == ["accept", "hello", "goodbye", "end", None]


async def test_kill_cancels_the_handler_at_its_next_await() -> None:
    seen: list[bool] = []

    async def waits(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            yield "first"
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append(context.is_killed)
            raise

    serving, answer = serve(waits), Answer()
    context = serving(request(), answer)
    await eventually(lambda: "first" in answer.log)
    context.kill()
    context.kill()
    await answered(serving, answer)
    assert seen == [True]
    assert isinstance(answer.error, Cancelled)


async def test_a_kill_before_the_first_step_never_calls_the_handler() -> None:
    called: list[Any] = []

    async def handler(request: Any) -> AsyncIterator[Any]:
        called.append(request)
        yield request

    serving, answer = serve(handler), Answer()
    context = serving(request(1), answer)
    assert serving.inflight == 1
    answer.dead = True  # as a plane does before it kills
    context.kill()
    await asyncio.wait_for(serving.idle(), 5)
    assert called == []
    assert serving.inflight == 0


async def test_killed_by_the_worker_before_the_first_step_is_a_refusal() -> None:
    serving, answer = serve(waits), Answer()
    serving(request(), answer)
    serving.kill_all()
    await answered(serving, answer)
    assert answer.log[0] == "refuse"
    assert isinstance(answer.error, Unavailable)  # the handler was not called: another instance may take it


async def test_a_handler_that_swallows_its_cancellation_is_ended_nevertheless() -> None:
    sent = 0
    cleaned: list[bool] = []

    async def stubborn(request: Any) -> AsyncIterator[Any]:
        nonlocal sent
        try:
            while True:
                try:
                    await asyncio.sleep(0.001)
                except asyncio.CancelledError:
                    pass
                yield sent
                sent += 1
        finally:
            cleaned.append(True)

    serving, answer = serve(stubborn), Answer()
    context = serving(request(), answer)
    await eventually(lambda: sent > 3)
    answer.dead = True
    context.kill()
    await asyncio.wait_for(serving.idle(), 5)
    assert cleaned == [True]


async def test_cancellation_within_a_handler_is_its_own_error() -> None:
    async def cancels_itself(request: Any) -> AsyncIterator[Any]:
        yield 1
        raise asyncio.CancelledError

    answer = await call(cancels_itself)
    assert isinstance(answer.error, EngineError)
    assert answer.error.kind == "Cancelled"


# -- clean-up


async def test_the_answer_ends_before_a_slow_clean_up() -> None:
    release = asyncio.Event()

    async def slow_to_clean(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            yield 1
            yield object()
        finally:
            await release.wait()

    class Picky(Answer):
        def send(self, item: Any) -> bool:
            if item != 1:
                raise EngineError("no JSON form")
            return super().send(item)

    serving, answer = serve(slow_to_clean), Picky()
    serving(request(), answer)
    await eventually(lambda: "end" in answer.log)
    assert serving.inflight == 1  # it still holds what it holds
    release.set()
    await answered(serving, answer)


async def test_clean_up_is_bounded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(serving_module, "_CLOSE_LIMIT", 0.05)

    async def never_cleans(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            yield object()
        finally:
            await asyncio.Event().wait()

    class Picky(Answer):
        def send(self, item: Any) -> bool:
            raise EngineError("no JSON form")

    serving, answer = serve(never_cleans), Picky()
    serving(request(id="slow-1"), answer)
    await answered(serving, answer)
    assert any("slow-1" in entry.getMessage() and "clean up" in entry.getMessage() for entry in caplog.records)


async def test_a_clean_up_that_fails_is_logged_and_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def fails_to_clean(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            yield object()
        finally:
            raise RuntimeError("cannot clean")

    class Picky(Answer):
        def send(self, item: Any) -> bool:
            raise EngineError("no JSON form")

    serving, answer = serve(fails_to_clean), Picky()
    serving(request(), answer)
    await answered(serving, answer)
    assert "cannot clean" in caplog.text


# -- draining and closing


async def test_draining_refuses_and_lets_the_rest_finish() -> None:
    go = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[Any]:
        await go.wait()
        yield "done"

    serving, answer = serve(handler), Answer()
    serving(request(), answer)
    serving.drain()
    with pytest.raises(Unavailable, match="draining"):
        serving(request(id="late"), Answer())
    assert serving.inflight == 1
    go.set()
    assert (await answered(serving, answer)).items == ["done"]
    serving.resume()
    again = Answer()
    serving(request(), again)
    assert (await answered(serving, again)).items == ["done"]


async def test_inflight_counts_from_arrival_to_the_end() -> None:
    go = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[Any]:
        await go.wait()
        yield request

    serving = serve(handler)
    answers = [Answer() for _ in range(5)]
    for count, answer in enumerate(answers, 1):
        serving(request(), answer)
        assert serving.inflight == count
    go.set()
    await asyncio.wait_for(serving.idle(), 5)
    assert serving.inflight == 0
    assert all(answer.log[-2:] == ["end", None] for answer in answers)


async def test_waiting_for_idle_may_be_given_up() -> None:
    serving, answer = serve(waits), Answer()
    serving(request(), answer)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(serving.idle(), 0.01)
    assert serving.inflight == 1
    await serving.aclose()


async def test_closing_tells_callers_that_the_worker_shuts_down() -> None:
    serving, running, fresh = serve(waits), Answer(), Answer()
    serving(request(), running)
    await eventually(lambda: "first" in running.log)
    serving(request(), fresh)
    await serving.aclose()
    assert isinstance(running.error, EngineError)
    assert running.error.kind == "EngineShutdown"
    assert isinstance(fresh.error, Unavailable)  # was not started: may be tried elsewhere
    assert serving.inflight == 0
    with pytest.raises(Unavailable):
        serving(request(), Answer())
    await serving.aclose()


async def test_closing_is_bounded_and_the_caller_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_module, "_CLOSE_LIMIT", 0.05)
    release = asyncio.Event()

    async def deaf(request: Any) -> AsyncIterator[Any]:
        yield "first"
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass

    serving, answer = serve(deaf), Answer()
    serving(request(), answer)
    await eventually(lambda: "first" in answer.log)
    started = asyncio.get_running_loop().time()
    await serving.aclose()
    assert asyncio.get_running_loop().time() - started < 2
    assert answer.error.kind == "EngineShutdown"
    assert any(entry.levelno >= logging.ERROR for entry in caplog.records)
    release.set()
    await asyncio.wait_for(serving.idle(), 5)


async def test_a_handler_may_close_its_own_serving() -> None:
    serving: Serving

    async def ends_it_all(request: Any) -> AsyncIterator[Any]:
        await serving.aclose()
        yield "last words"

    serving, answer = serve(ends_it_all), Answer()
    serving(request(), answer)
    await asyncio.wait_for(serving.idle(), 5)
    assert serving.inflight == 0


async def test_many_requests_do_not_disturb_each_other() -> None:
    async def mixed(request: int, context: Context) -> AsyncIterator[Any]:
        yield request
        if request % 3 == 0:
            raise RuntimeError("third")
        if request % 3 == 1:
            await asyncio.Event().wait()
        yield -request

    serving = serve(mixed)
    answers: list[Answer] = []
    contexts: list[Any] = []
    for number in range(30):
        answers.append(Answer())
        contexts.append(serving(request(number, id=f"r{number}"), answers[-1]))
    await eventually(lambda: serving.inflight == 10)
    for context in contexts:
        context.kill()
    await asyncio.wait_for(serving.idle(), 5)
    kinds: list[Callable[[Any], bool]] = [
        lambda error: isinstance(error, EngineError),
        lambda error: isinstance(error, Cancelled),
        lambda error: error is None,
    ]
    assert all(kinds[number % 3](answer.error) for number, answer in enumerate(answers))
