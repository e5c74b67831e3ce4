"""The life of a worker: the order of things, and what is left behind when one of them fails."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from stator.errors import ConfigError, EngineError, Overloaded, Unavailable
from stator.llm.card import ModelCard
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.testing.worker_host import INSTANCE
from stator.worker import EXIT_DEADLINE, EXIT_FAILED, EXIT_OK, EngineConfig, LLMEngine
from unit.worker_stage import WorkerStage

pytestmark = pytest.mark.timeout(20)


class ScriptedEngine(LLMEngine):
    """Notes what is called; does what a test hands in."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.report: Callable[[str], None] | None = None
        self.on_start: Callable[[], Any] = _nothing
        self.on_cleanup: Callable[[], Any] = _nothing
        self.on_drain: Callable[[], Any] = _nothing

    def follow_progress(self, report: Callable[[str], None]) -> None:
        self.report = report

    async def start(self, instance_id: int) -> EngineConfig:
        self.log.append(f"start {instance_id:x}")
        await self.on_start()
        return EngineConfig(model="m", card=ModelCard(display_name="word"), context_length=77, max_num_seqs=3)

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        yield EngineOutput(token_ids=request.token_ids, finish_reason="stop")

    async def drain(self) -> None:
        self.log.append("drain engine")
        await self.on_drain()

    async def cleanup(self) -> None:
        self.log.append("cleanup")
        await self.on_cleanup()


async def _nothing() -> None:
    pass


class Stage(WorkerStage[ScriptedEngine]):
    """One worker with everything around it."""

    def __init__(self, **config: Any) -> None:
        self.progress: list[str] = []
        log: list[str] = []
        super().__init__(ScriptedEngine(log), log, progress=self.progress.append, **config)


START = ["start abc", "publish", "serve dynamo.backend.generate"]
END = ["unregister", "withdraw", "refuse", "drain engine", "cleanup", "close"]


async def test_everything_happens_in_order_and_once() -> None:
    stage = Stage()
    async with stage.running() as task:
        assert stage.log == START
        assert stage.worker.is_ready
        assert stage.progress == ["ready"]
        stage.worker.shutdown()
        assert not stage.worker.is_ready
    assert stage.log == START + END
    assert task.result() == EXIT_OK
    assert stage.host.records == []


async def test_the_model_record_has_the_name_and_the_limits() -> None:
    stage = Stage(namespace="demo", served_name="shown")
    async with stage.running():
        [record] = stage.host.records
    assert (record.namespace, record.component, record.endpoint, record.instance_id) == (
        "demo",
        "backend",
        "generate",
        INSTANCE,
    )
    assert record.card_json["display_name"] == "shown"
    assert record.card_json["slug"] == "shown"
    assert record.card_json["runtime_config"]["context_length"] == 77
    assert record.card_json["runtime_config"]["max_num_seqs"] == 3


async def test_progress_of_the_engine_is_passed_on() -> None:
    stage = Stage()

    async def load() -> None:
        assert stage.engine.report is not None
        stage.engine.report("reading weights")

    stage.engine.on_start = load
    async with stage.running():
        assert stage.progress == ["reading weights", "ready"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("no such model: x\ntry y"), "worker cannot start: no such model: x try y"),
        (RuntimeError("weights are broken"), "worker cannot start: RuntimeError: weights are broken"),
    ],
)
async def test_a_start_that_fails_is_one_line_and_status_1(
    error: Exception, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage()

    async def fail() -> None:
        raise error

    stage.engine.on_start = fail
    with caplog.at_level(logging.INFO):
        assert await stage.worker.run() == EXIT_FAILED
    assert stage.log == ["start abc", "cleanup"]
    assert [record.getMessage() for record in caplog.records] == [line]


@pytest.mark.parametrize("step", ["serve", "publish"])
async def test_what_was_started_is_undone_when_serving_fails(step: str) -> None:
    """A record whose registration failed may be there all the same."""
    stage = Stage(grace_period=3600)
    stage.host.fail = {step: Unavailable("discovery is gone"), "withdraw": Unavailable("still gone")}
    async with asyncio.timeout(5):
        assert await stage.worker.run() == EXIT_FAILED
    started = START[: START.index(next(s for s in START if s.startswith(step))) + 1]
    assert stage.log == [*started, "withdraw", "cleanup"]


async def test_shutdown_before_the_start_starts_nothing() -> None:
    stage = Stage()
    stage.worker.shutdown()
    assert await stage.worker.run() == EXIT_OK
    assert stage.log == []


async def test_shutdown_during_the_start_awaits_it_and_serves_nothing() -> None:
    stage = Stage()
    loading, loaded = asyncio.Event(), asyncio.Event()

    async def load() -> None:
        loading.set()
        await loaded.wait()

    stage.engine.on_start = load
    task = asyncio.ensure_future(stage.worker.run())
    await loading.wait()
    stage.worker.shutdown()
    loaded.set()
    assert await task == EXIT_OK
    assert stage.log == ["start abc", "cleanup"]


async def test_running_requests_finish_before_the_engine_is_cleaned_up() -> None:
    stage = Stage()
    async with stage.running() as task:
        stage.served.inflight = 2
        stage.worker.shutdown()
        while "refuse" not in stage.log:
            await asyncio.sleep(0)
        assert "cleanup" not in stage.log
        stage.served.finish()
    assert task.result() == EXIT_OK
    assert stage.log == START + END


async def test_requests_that_outlast_the_drain_are_killed() -> None:
    stage = Stage(drain_timeout=0.02)
    async with stage.running():
        stage.served.inflight = 1
    assert stage.log == [*START, "unregister", "withdraw", "refuse", "drain engine", "kill", "cleanup", "close"]


async def test_a_second_shutdown_ends_grace_and_drain_at_once() -> None:
    stage = Stage(grace_period=3600, drain_timeout=3600)
    async with stage.running():
        stage.served.inflight = 1
        stage.worker.shutdown()
        while "withdraw" not in stage.log:
            await asyncio.sleep(0)
        assert "refuse" not in stage.log, "requests are served during the grace period"
        stage.worker.shutdown()
    assert "kill" in stage.log


async def test_cancelling_the_worker_cleans_up_and_stays_cancelled() -> None:
    stage = Stage(grace_period=3600)
    task = asyncio.ensure_future(stage.worker.run())
    await stage.worker.ready()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stage.log == START + END


async def test_errors_of_the_engines_end_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()

    async def fail() -> None:
        raise RuntimeError("stuck")

    stage.engine.on_cleanup = stage.engine.on_drain = fail
    async with stage.running() as task:
        pass
    assert task.result() == EXIT_OK
    assert stage.log == START + END
    assert "failed to clean up" in caplog.text


async def test_a_cleanup_without_end_has_its_own_status() -> None:
    stage = Stage(cleanup_timeout=0.02)
    stage.engine.on_cleanup = asyncio.Event().wait
    async with stage.running() as task:
        pass
    assert task.result() == EXIT_DEADLINE


async def test_a_request_is_typed_once_and_answered() -> None:
    stage = Stage()
    async with stage.running():
        body = {"token_ids": [1, 2], "unknown": 1}
        items = [item async for item in stage.served.generate(body, Context("r"))]
    assert items == [EngineOutput(token_ids=[1, 2], finish_reason="stop")]


@pytest.mark.parametrize("body", [{"token_ids": "text"}, {}, None, {"token_ids": [1], "stop_conditions": {"max_tokens": "x"}}])
async def test_a_request_that_cannot_be_read_fails_while_iterating(body: Any) -> None:
    """Not before: it would count as refused, and be tried elsewhere."""
    stage = Stage()
    async with stage.running():
        stream = stage.served.generate(body, Context("r"))
        with pytest.raises(EngineError) as caught:
            await anext(stream)
    assert caught.value.kind == "InvalidArgument"


async def test_an_engine_at_capacity_refuses_before_iterating(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ScriptedEngine, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        raise Overloaded("full")

    monkeypatch.setattr(ScriptedEngine, "generate", full)
    stage = Stage()
    async with stage.running():
        with pytest.raises(Overloaded):
            stage.served.generate({"token_ids": [1]}, Context("r"))
