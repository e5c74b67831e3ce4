"""Clients in front of busy workers: who waits, who is told to come back, and that nothing is left behind."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import openai
import pytest

from stator.errors import Overloaded
from stator.llm.output import EngineOutput
from stator.testing.fake_models import EngineCall, FakeEngine, FakeModels
from stator.testing.frontend_kit import RawClient, RunningFrontend, chat_body, frontend

pytestmark = pytest.mark.timeout(30)

COUNTS = "dynamo_frontend_requests_total"


class Held:
    """A script whose calls run until they are let go, one by one or all."""

    def __init__(self) -> None:
        self.running: list[tuple[EngineCall, asyncio.Event]] = []
        self.all = asyncio.Event()

    async def __call__(self, call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        own = asyncio.Event()
        self.running.append((call, own))
        done, pending = await asyncio.wait(
            [asyncio.ensure_future(own.wait()), asyncio.ensure_future(self.all.wait())],
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in (*done, *pending):
            task.cancel()
        yield [EngineOutput(token_ids=[97], finish_reason="stop")]

    def end(self, number: int = 0) -> None:
        """Let the oldest call go."""
        self.running.pop(number)[1].set()


class Bench:
    """A frontend before one model of `places`, and the official client."""

    def __init__(self, running: RunningFrontend, engine: FakeEngine, held: Held) -> None:
        self.frontend = running
        self.engine = engine
        self.held = held
        self.tasks: list[asyncio.Task[Any]] = []

    def client(self, *, key: str = "none", retries: int = 0) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.frontend.url}/v1", api_key=key, max_retries=retries, timeout=15)

    async def ask(self, *, key: str = "none", retries: int = 0, stream: bool = False, **more: Any) -> str:
        """One request; the text of its answer."""
        async with self.client(key=key, retries=retries) as client:
            options: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}], **more}
            if stream:
                parts = [
                    chunk.choices[0].delta.content or ""
                    async for chunk in await client.chat.completions.create(stream=True, **options)
                ]
                return "".join(parts)
            answer = await client.chat.completions.create(**options)
            return "".join(choice.message.content or "" for choice in answer.choices)

    def start(self, **options: Any) -> asyncio.Task[str]:
        task = asyncio.ensure_future(self.ask(**options))
        self.tasks.append(task)
        return task

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)

    async def fill(self, places: int, waiting: int = 0, **options: Any) -> None:
        """So many calls run, and so many wait."""
        for _ in range(places + waiting):
            self.start(**options)
        await self.until(lambda: len(self.held.running) >= places and self.waiting() >= waiting)

    def waiting(self, priority: str = "normal") -> int:
        return int(self.frontend.sample("stator_frontend_waiting_calls", model="m", priority=priority))

    def refusals(self, reason: str) -> int:
        return int(self.frontend.sample("stator_frontend_refusals_total", model="m", reason=reason))

    async def clear(self) -> None:
        """Everybody is answered, and nothing is left."""
        self.held.all.set()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.frontend.until_idle()
        page = self.frontend.metrics()
        for line in page.splitlines():
            if line.startswith(
                ("stator_frontend_waiting_calls{", "dynamo_frontend_queued_requests{", "dynamo_frontend_inflight")
            ):
                assert line.endswith((" 0", " 0.0")), line
        assert self.engine.running == 0
        await self.until(lambda: not self.engine.listeners)


Start = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with asyncio.timeout(25):
        open_frontends: list[Any] = []
        benches: list[Bench] = []

        async def begin(places: int | None = 2, **settings: Any) -> Bench:
            models, held = FakeModels(), Held()
            engine = models.add("m", FakeEngine(held, places=places))
            context = frontend(models, **settings)
            bench = Bench(await context.__aenter__(), engine, held)
            open_frontends.append(context)
            benches.append(bench)
            return bench

        yield begin
        for bench in benches:
            await bench.clear()
        for context in open_frontends:
            await context.__aexit__(None, None, None)


async def test_a_burst_waits_in_order_and_is_answered(start: Start) -> None:
    bench = await start(2)
    await bench.fill(2, waiting=4)
    assert bench.frontend.sample("dynamo_frontend_queued_requests", model="m") == 6
    while bench.held.running:
        bench.held.end()
        await asyncio.sleep(0.01)
    assert await asyncio.gather(*bench.tasks) == ["a"] * 6
    assert bench.engine.most == 2, "never more than there are places"
    assert bench.frontend.sample("stator_frontend_queue_wait_seconds_count", model="m", priority="normal") == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_who_would_wait_too_long_is_told_at_once_what_and_when(start: Start, stream: bool) -> None:
    bench = await start(2, queue=3)
    await bench.fill(2, waiting=1)
    begin = time.perf_counter()
    with pytest.raises(openai.InternalServerError) as raised:
        await bench.ask(stream=stream)
    assert time.perf_counter() - begin < 1.0
    error = raised.value
    assert (error.status_code, error.code, error.type) == (503, "overloaded", "server_error")
    assert "2 of 2 places taken" in error.message, "which limit and value"
    assert "http.queue = 3" in error.message
    assert error.request_id is not None
    assert error.request_id in error.message
    assert int(error.response.headers["retry-after"]) >= 1
    assert bench.refusals("queue") == 1
    kind = "stream" if stream else "unary"
    labels = {"model": "m", "endpoint": "chat_completions", "request_type": kind, "status": "error", "error_type": "overload"}
    assert bench.frontend.sample(COUNTS, **labels) == 1
    rejections = bench.frontend.sample("dynamo_frontend_model_rejection_total", model="m", endpoint="chat_completions")
    assert rejections == 1


async def test_refusals_are_fast(start: Start) -> None:
    bench = await start(2, queue=3)
    await bench.fill(2, waiting=1)
    times: list[float] = []
    async with RawClient(bench.frontend.port) as client:
        for _ in range(50):
            begin = time.perf_counter()
            await client.request("POST", "/v1/chat/completions", chat_body("x", model="m"), authorization="Bearer none")
            assert (await client.answer()).status == 503
            times.append(time.perf_counter() - begin)
    assert sorted(times)[25] < 0.05, "10 ms, five times over"


async def test_the_clients_own_retries_get_it_in(start: Start) -> None:
    bench = await start(1, queue=1, retry_after=1)
    await bench.fill(1)
    await bench.until(lambda: len(bench.held.running) == 1)
    waits = bench.start()
    await bench.until(lambda: bench.waiting() == 1)
    begin = time.perf_counter()
    retried = bench.start(retries=3)
    await bench.until(lambda: bench.refusals("queue") >= 1)
    bench.held.all.set()
    assert await retried == "a"
    assert await waits == "a"
    assert time.perf_counter() - begin >= 0.9, "it waited as long as Retry-After said"


async def test_the_status_is_a_setting(start: Start) -> None:
    bench = await start(1, queue=1, overload_status=529)
    await bench.fill(1, waiting=1)
    with pytest.raises(openai.APIStatusError) as raised:
        await bench.ask()
    assert (raised.value.status_code, raised.value.code) == (529, "overloaded")


async def test_who_waits_too_long_is_refused_before_the_stream_begins(start: Start) -> None:
    bench = await start(1, queue_timeout=0.3)
    await bench.fill(1)
    with pytest.raises(openai.InternalServerError) as raised:
        await bench.ask(stream=True)
    assert "http.queue_timeout = 0.3 s" in raised.value.message
    assert bench.refusals("timeout") == 1


async def test_a_client_that_leaves_gives_up_its_place(start: Start) -> None:
    bench = await start(1)
    await bench.fill(1)
    leaves = bench.start()
    await bench.until(lambda: bench.waiting() == 1)
    stays = bench.start()
    await bench.until(lambda: bench.waiting() == 2)
    leaves.cancel()
    await bench.until(lambda: bench.waiting() == 1)
    bench.held.end()
    await bench.until(lambda: len(bench.held.running) == 1)
    bench.held.end()
    assert await stays == "a"
    assert len(bench.engine.calls) == 2, "the one that left was never sent"


async def test_urgent_requests_go_first(start: Start) -> None:
    bench = await start(1)
    await bench.fill(1)
    normal = bench.start()
    await bench.until(lambda: bench.waiting() == 1)
    low = bench.start(service_tier="flex")
    await bench.until(lambda: bench.waiting("low") == 1)
    high = bench.start(extra_headers={"x-stator-priority": "high"})
    await bench.until(lambda: bench.waiting("high") == 1)
    finished: list[str] = []
    for name, task in (("normal", normal), ("low", low), ("high", high)):
        task.add_done_callback(lambda _, name=name: finished.append(name))
    for number in range(4):
        await bench.until(lambda: len(bench.held.running) == 1)
        bench.held.end()
        await bench.until(lambda number=number: len(finished) == number)
    assert finished == ["high", "normal", "low"]


async def test_a_priority_that_does_not_exist_is_the_clients_mistake(start: Start) -> None:
    bench = await start(1)
    with pytest.raises(openai.BadRequestError, match="high, normal, low"):
        await bench.ask(extra_headers={"x-stator-priority": "asap"})


async def test_a_flooding_key_does_not_lock_out_another(start: Start) -> None:
    bench = await start(2, queue=8)
    await bench.fill(2, waiting=4, key="loud")
    with pytest.raises(openai.InternalServerError):
        await bench.ask(key="loud")
    quiet = bench.start(key="quiet")
    await bench.until(lambda: bench.waiting() == 5)
    bench.held.end()
    await bench.until(lambda: len(bench.held.running) == 2)
    bench.held.end(1)
    await bench.until(lambda: len(bench.held.running) == 2)
    bench.held.end(1)
    assert await asyncio.wait_for(quiet, 5) == "a", "among the first two, not behind the four"
    assert "loud" not in bench.frontend.metrics()


async def test_choices_begin_with_those_that_fit(start: Start) -> None:
    bench = await start(2)
    many = bench.start(n=5)
    await bench.until(lambda: len(bench.held.running) == 2)
    assert bench.waiting() == 3
    bench.held.all.set()
    assert await many == "aaaaa"
    assert bench.engine.most == 2


async def test_draining_refuses_those_that_wait_and_finishes_those_that_run(start: Start) -> None:
    bench = await start(1, graceful_shutdown=5.0)
    await bench.fill(1, waiting=2)
    drain = asyncio.ensure_future(bench.frontend.server.drain())
    (runs, *waiting) = bench.tasks
    for task in waiting:
        with pytest.raises(openai.InternalServerError, match="shutting down") as raised:
            await task
        assert raised.value.status_code == 503
    bench.held.end()
    assert await runs == "a"
    await asyncio.wait_for(drain, 2)


async def test_the_last_worker_leaves(start: Start) -> None:
    models, held = FakeModels(), Held()
    engine = models.add("m", FakeEngine(held, places=1))
    async with frontend(models) as running:
        bench = Bench(running, engine, held)
        await bench.fill(1, waiting=1)
        models.remove("m")
        with pytest.raises(openai.InternalServerError) as raised:
            await asyncio.wait_for(bench.tasks[1], 5)
        assert (raised.value.status_code, raised.value.code) == (503, "unavailable")
        await bench.clear()


async def test_a_worker_that_refuses_is_asked_again(start: Start) -> None:
    bench = await start(None)
    refusals = 0

    async def refuses_twice(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        nonlocal refusals
        if refusals < 2:
            refusals += 1
            raise Overloaded("somebody else took the place")
        yield [EngineOutput(token_ids=[98], finish_reason="stop")]

    bench.engine.script = refuses_twice
    assert await bench.ask() == "b"
    assert [call.outcome for call in bench.engine.calls] == ["failed", "failed", "complete"]


async def test_a_worker_that_always_refuses_is_believed(start: Start) -> None:
    bench = await start(None)
    bench.engine.refusal = Overloaded("secret")
    with pytest.raises(openai.InternalServerError) as raised:
        await bench.ask(stream=True)
    assert raised.value.code == "overloaded"
    assert "secret" not in raised.value.message
    assert 1 < len(bench.engine.calls) < 6
    assert bench.refusals("worker") == 1


async def test_nothing_is_sent_again_once_something_was_delivered(start: Start) -> None:
    bench = await start(None)

    async def late(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        yield [EngineOutput(token_ids=[97])]
        raise Overloaded("too late")

    bench.engine.script = late
    with pytest.raises(openai.APIError):
        await bench.ask(stream=True)
    assert len(bench.engine.calls) == 1


async def test_without_a_queue_workers_refuse_for_themselves(start: Start) -> None:
    bench = await start(1, queue=0)
    await bench.fill(4)
    assert bench.engine.most == 4
    bench.engine.refusal = Overloaded("full")
    with pytest.raises(openai.InternalServerError) as raised:
        await bench.ask()
    assert raised.value.code == "overloaded"
    assert len(bench.engine.calls) == 5


async def test_a_request_that_is_refused_is_not_tokenised(start: Start) -> None:
    """A prompt of a megabyte takes a second to tokenise: refusing it must not."""
    bench = await start(1, queue=1)
    await bench.fill(1, waiting=1)
    with pytest.raises(openai.InternalServerError):
        await bench.ask(messages=[{"role": "user", "content": "x" * 1_000_000}])
    assert bench.frontend.sample("dynamo_frontend_input_sequence_tokens_count", model="m") == 2


async def test_the_log_says_how_long_it_waited(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    bench = await start(1)
    caplog.set_level("INFO", "stator.request")
    bench.frontend.state.log.refresh()
    await bench.fill(1, waiting=1)
    await asyncio.sleep(0.05)
    bench.held.all.set()
    await asyncio.gather(*bench.tasks)
    await bench.frontend.until_logged()
    waits = [record.__dict__.get("queue_ms") for record in caplog.records if record.name == "stator.request"]
    assert sum(wait is not None and wait >= 40 for wait in waits) == 1, waits
