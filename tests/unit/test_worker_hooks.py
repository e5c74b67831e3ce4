"""What a worker asks its engine for and tells of it: the order of the hooks, what becomes of those that raise, and an engine that fails."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import msgspec
import pytest

from stator.errors import EngineError, Unavailable
from stator.events.interface import Channel
from stator.health import EndpointState
from stator.kv.sources import KvEventSink, KvEventSource, PushSource, ZmqSource
from stator.llm.card import ModelCard
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.testing.plane_suite import eventually
from stator.testing.worker_host import INSTANCE
from stator.worker import (
    EXIT_DEADLINE,
    EXIT_FAILED,
    EXIT_OK,
    ComponentSnapshot,
    EngineConfig,
    EngineMetrics,
    LLMEngine,
    SnapshotSink,
    Worker,
    WorkerConfig,
)
from unit.worker_stage import WorkerStage

pytestmark = pytest.mark.timeout(20)

HOOKS = [
    "follow_progress",
    "start",
    "register_metrics",
    "snapshot_ranks",
    "kv_event_sources",
    "on_ready",
    "attach_snapshots",
    "publish",
    "controls",
    "updates",
    "health_payload",
    "serve dynamo.backend.generate",
]
END = ["unregister", "withdraw", "refuse", "cleanup", "close"]


class Telling(LLMEngine):
    """Notes each call, has something to tell for each hook, and raises where a test wants it."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.raising: dict[str, Exception] = {}
        self.config: dict[str, Any] = {"kv_cache_block_size": 16, "max_num_seqs": 3}
        self.report: Callable[[str], None] = lambda text: None
        self.metrics: EngineMetrics | None = None
        self.sink: SnapshotSink | None = None
        self.kv: KvEventSink | None = None
        self.sources: Sequence[KvEventSource] = (PushSource(on_ready=self.on_ready, dp_rank=1),)
        self.end: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.asked = asyncio.Event()
        """a request came that is not answered"""
        self.on_start: Callable[[], Any] = _nothing

    def note(self, step: str) -> None:
        self.log.append(step)
        if step in self.raising:
            raise self.raising[step]

    def follow_progress(self, report: Callable[[str], None]) -> None:
        self.note("follow_progress")
        self.report = report

    async def start(self, instance_id: int) -> EngineConfig:
        self.note("start")
        await self.on_start()
        return EngineConfig(model="m", card=ModelCard(display_name="word"), **self.config)

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        if request.token_ids == [13]:
            raise EngineError("out of memory", kind="EngineShutdown")
        if request.token_ids == [0]:
            self.asked.set()
            await asyncio.Event().wait()
        yield EngineOutput(token_ids=request.token_ids, finish_reason="stop")

    def register_metrics(self, metrics: EngineMetrics) -> None:
        self.note("register_metrics")
        self.metrics = metrics

    def snapshot_ranks(self) -> Sequence[int]:
        self.note("snapshot_ranks")
        return (1, 0)

    def kv_event_sources(self) -> Sequence[KvEventSource]:
        self.note("kv_event_sources")
        return self.sources

    def on_ready(self, sink: KvEventSink) -> None:
        self.note("on_ready")
        self.kv = sink

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        self.note("attach_snapshots")
        self.sink = sink

    def controls(self) -> Mapping[str, Any]:
        self.note("controls")
        return {"sleep": self.sleep}

    async def sleep(self, body: Any) -> Any:
        return {"slept": body}

    def updates(self) -> Mapping[str, Any]:
        self.note("updates")
        return {}

    def health_payload(self) -> Mapping[str, Any] | None:
        self.note("health_payload")
        return {"token_ids": [4]}

    async def failed(self) -> str:
        return await self.end

    async def cleanup(self) -> None:
        self.log.append("cleanup")


async def _nothing() -> None: ...


class Stage(WorkerStage[Telling]):
    """One worker with everything around it."""

    def __init__(self, **config: Any) -> None:
        self.failures: list[str] = []
        log: list[str] = []
        super().__init__(Telling(log), log, failed=self.failures.append, **config)

    @property
    def page(self) -> dict[str, Any]:
        """The health page."""
        return msgspec.json.decode(self.host.health.body())

    def metric(self, name: str) -> list[str]:
        """The lines of a family."""
        text = self.host.metrics.exposition().decode()
        return [line for line in text.splitlines() if line.startswith(name)]

    async def answer(self, *token_ids: int) -> list[EngineOutput]:
        stream = self.served.generate({"token_ids": list(token_ids)}, Context("r"))
        return [item async for item in stream]


# -- the order and what is made of it ---------------------------------------------------------------------------------------


async def test_the_hooks_are_called_in_order() -> None:
    stage = Stage()
    async with stage.running():
        assert stage.log == HOOKS
    assert stage.log == HOOKS + END


async def test_what_the_endpoint_is_served_with() -> None:
    stage = Stage(served_name="shown")
    async with stage.running():
        assert stage.served.options == {
            "slots": 3,
            "canary_payload": {"token_ids": [4], "_HEALTH_CHECK": True},
            "metrics_labels": (("model", "m"), ("model_name", "shown")),
        }


async def test_slots_are_those_of_all_ranks() -> None:
    stage = Stage()
    stage.engine.config |= {"data_parallel_size": 4}
    async with stage.running():
        assert stage.served.options["slots"] == 12


async def test_the_card_says_which_ranks_there_are_and_that_nobody_indexes() -> None:
    stage = Stage()
    stage.engine.config |= {"data_parallel_size": 4, "data_parallel_start_rank": 8, "total_kv_blocks": 1000}
    async with stage.running():
        runtime = stage.host.records[0].card_json["runtime_config"]
    assert (runtime["data_parallel_size"], runtime["data_parallel_start_rank"]) == (4, 8)
    assert runtime["enable_local_indexer"] is False
    assert (runtime["total_kv_blocks"], runtime["max_num_seqs"]) == (1000, 3)


async def test_snapshots_and_kv_events_go_out() -> None:
    stage = Stage()
    async with stage.running():
        assert stage.engine.sink is not None
        assert stage.engine.kv is not None
        assert list(stage.engine.sink.dp_ranks) == [0, 1]
        stage.engine.sink.publish(1, ComponentSnapshot(kv_used_blocks=5, kv_total_blocks=10, gpu_cache_usage=0.5))
        stage.engine.kv.stored(token_ids=list(range(16)), block_hashes=[77])
        async with asyncio.timeout(5):
            while len(stage.host.events.sent) < 2:
                await asyncio.sleep(0.001)
        [load] = stage.host.events.loads
        assert (load.worker_id, load.dp_rank, load.kv_used_blocks) == (INSTANCE, 1, 5)
        assert [line.rpartition(" ")[2] for line in stage.metric("dynamo_component_total_blocks{")] == ["0", "10"]
        [published] = [line for line in stage.metric("stator_kv_events_total") if 'outcome="published"' in line]
        assert published.endswith(" 1")
    channels = {
        Channel(namespace="dynamo", topic="kv_metrics"),
        Channel(namespace="dynamo", component="backend", topic="kv-events"),
    }
    assert set(stage.host.events.opened) == set(stage.host.events.closed) == channels
    assert stage.host.metrics.exposition() == b"", "the worker's metrics end with it"


async def test_an_engine_publishes_until_its_clean_up() -> None:
    stage = Stage()
    said: list[int] = []

    async def cleanup() -> None:
        said.append(len(stage.host.events.closed))

    stage.engine.cleanup = cleanup  # type: ignore[method-assign]
    async with stage.running():
        pass
    assert said == [0]


async def test_metrics_of_the_engine_are_on_the_page_with_the_workers_labels() -> None:
    stage = Stage()
    async with stage.running():
        metrics = stage.engine.metrics
        assert metrics is not None
        labels = {
            "dynamo_namespace": "dynamo",
            "dynamo_component": "backend",
            "dynamo_endpoint": "generate",
            "worker_id": "abc",
            "model": "m",
            "model_name": "word",
        }
        assert metrics.labels == labels
        metrics.level.create_gauge("steps", "Steps").set(3)
        metrics.on_scrape(lambda: "# TYPE own counter\nown 1\n")
        [line] = stage.metric("dynamo_component_steps{")
        assert all(f'{name}="{value}"' in line for name, value in labels.items())
        assert stage.metric("own") == ["own 1"]


async def test_the_times_of_start_drain_and_clean_up_are_measured() -> None:
    stage = Stage(drain_timeout=0.05)
    seen: dict[str, float] = {}

    async def slow() -> None:
        await asyncio.sleep(0.03)

    async def look() -> None:
        for name in ("model_load", "drain", "cleanup"):
            [line] = stage.metric(f"dynamo_component_{name}_time_seconds{{")
            seen[name] = float(line.rpartition(" ")[2])

    stage.engine.on_start = slow
    stage.engine.cleanup = slow  # type: ignore[method-assign]
    async with stage.running():
        stage.served.inflight = 1
        stage.served.aclose = look  # type: ignore[method-assign]
    assert seen["model_load"] >= 0.029
    assert seen["drain"] >= 0.049
    assert seen["cleanup"] >= 0.029


# -- what is left out -------------------------------------------------------------------------------------------------------


async def test_kv_events_may_be_switched_off() -> None:
    stage = Stage(enable_kv_events=False)
    async with stage.running():
        assert "kv_event_sources" not in stage.log
        assert [channel.topic for channel in stage.host.events.opened] == ["kv_metrics"]


async def test_kv_events_without_a_block_size_are_left_out_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    stage.engine.config["kv_cache_block_size"] = None
    async with stage.running():
        assert "on_ready" not in stage.log
    assert [record.getMessage() for record in caplog.records] == [
        "the engine does not say kv_cache_block_size: its KV events are not published"
    ]


async def test_an_engine_without_ranks_is_given_no_sink() -> None:
    stage = Stage()
    stage.engine.snapshot_ranks = lambda: ()  # type: ignore[method-assign]
    async with stage.running():
        assert "attach_snapshots" not in stage.log
        assert [channel.topic for channel in stage.host.events.opened] == ["kv-events"]


async def test_a_load_channel_that_cannot_be_opened_stops_nothing() -> None:
    stage = Stage(enable_kv_events=False)
    stage.host.events.opening_fails = Unavailable("no broker")
    async with stage.running():
        assert stage.engine.sink is not None
        stage.engine.sink.publish(0, ComponentSnapshot(kv_used_blocks=5, kv_total_blocks=10, gpu_cache_usage=0.5))
        assert await stage.answer(1, 2)


# -- hooks that raise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [*HOOKS[:7], "controls", "updates"])
async def test_a_hook_that_raises_ends_the_start(hook: str) -> None:
    stage = Stage()
    stage.engine.raising[hook] = RuntimeError("not today")
    async with asyncio.timeout(5):
        assert await stage.worker.run() == EXIT_FAILED
    assert stage.failures == ["RuntimeError: not today"]
    withdrawn = ["withdraw"] if "publish" in stage.log else []
    assert stage.log[HOOKS.index(hook) :] == [hook, *withdrawn, "cleanup"]
    assert stage.host.records == []
    assert set(stage.host.events.opened) == set(stage.host.events.closed)
    assert stage.page["status"] == "notready"
    assert stage.page["reason"] == "the worker cannot start: RuntimeError: not today"


async def test_a_health_payload_that_raises_means_no_canary(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    stage.engine.raising["health_payload"] = RuntimeError("not today")
    async with stage.running():
        assert stage.served.options["canary_payload"] is None
        assert stage.page["status"] == "ready", "the worker's own word decides then"
    assert "canary disabled" in caplog.text


async def test_an_endpoint_of_kv_events_that_cannot_be_used_ends_the_start() -> None:
    stage = Stage()
    stage.engine.sources = (ZmqSource(endpoint="nonsense"),)
    assert await stage.worker.run() == EXIT_FAILED
    assert "'nonsense'" in stage.failures[0]
    assert set(stage.host.events.opened) == set(stage.host.events.closed)


# -- health -----------------------------------------------------------------------------------------------------------------


async def test_health_follows_the_life() -> None:
    stage = Stage(grace_period=3600)
    seen: list[tuple[str, str]] = []

    async def load() -> None:
        seen.append((stage.page["status"], stage.page["reason"]))
        stage.engine.report("reading weights")
        seen.append((stage.page["status"], stage.page["reason"]))

    stage.engine.on_start = load
    async with stage.running() as task:
        assert stage.page["status"] == "ready"
        assert stage.page["endpoints"] == {"generate": "ready"}
        assert "reason" not in stage.page
        stage.worker.shutdown()
        await asyncio.sleep(0.01)  # nothing happens in it
        assert stage.page["status"] == "ready", "during the grace period requests are answered"
        stage.worker.shutdown()
        await task
    assert seen == [("notready", "the engine is starting"), ("notready", "the engine is starting: reading weights")]


# -- an engine that fails ---------------------------------------------------------------------------------------------------


async def test_an_engine_that_fails_ends_the_worker() -> None:
    stage = Stage(grace_period=3600, drain_timeout=3600)
    async with stage.running() as task:
        waiting = asyncio.ensure_future(stage.answer(0))
        await asyncio.wait_for(stage.engine.asked.wait(), 5)
        stage.engine.end.set_result("its process died\nof old age")
        with pytest.raises(EngineError, match="the engine has failed: its process died of old age") as caught:
            await asyncio.wait_for(waiting, 1)
        assert caught.value.kind == "EngineShutdown"
        assert not stage.worker.is_ready
        assert stage.page["status"] == "notready"
        assert stage.page["endpoints"] == {"generate": "notready"}
        assert stage.page["reason"] == "the engine has failed: its process died of old age"
        assert await asyncio.wait_for(task, 2) == EXIT_FAILED
    assert stage.log[len(HOOKS) :] == ["refuse", *END]
    assert stage.failures == ["the engine has failed: its process died of old age"]


async def test_new_requests_are_refused_while_discovery_is_told() -> None:
    """Whoever has not heard takes them elsewhere."""
    stage = Stage()
    async with stage.running() as task:
        told = asyncio.Event()

        async def slow() -> None:
            await told.wait()

        stage.served.unregister = slow  # type: ignore[method-assign]
        stage.engine.end.set_result("gone")
        await eventually(lambda: stage.log[-1] == "refuse")
        with pytest.raises(Unavailable, match="the engine has failed: gone"):
            stage.served.generate({"token_ids": [1]}, Context("late"))
        assert stage.log[-1] == "refuse"
        told.set()
        assert await task == EXIT_FAILED


async def test_a_request_may_be_the_first_to_notice() -> None:
    stage = Stage()
    async with stage.running() as task:
        with pytest.raises(EngineError, match="out of memory"):
            await stage.answer(13)
        assert await asyncio.wait_for(task, 2) == EXIT_FAILED
    assert stage.failures == ["the engine has failed: out of memory"]


async def test_a_watch_that_raises_counts_as_a_failure() -> None:
    stage = Stage()
    async with stage.running() as task:
        stage.engine.end.set_exception(OSError("no such process"))
        assert await asyncio.wait_for(task, 2) == EXIT_FAILED
    assert stage.failures == ["the engine has failed: OSError: no such process"]


async def test_an_engine_that_fails_before_it_is_served_is_not_served() -> None:
    stage = Stage()
    stage.engine.end.set_result("stillborn")
    async with asyncio.timeout(5):
        assert await stage.worker.run() == EXIT_FAILED
    assert not stage.worker.is_ready
    assert stage.host.records == []
    assert stage.page["status"] == "notready"
    assert stage.log[-len(END) :] == END


async def test_a_late_sign_of_life_does_not_make_it_well() -> None:
    stage = Stage()
    async with stage.running() as task:
        held = asyncio.Event()

        async def hold() -> None:
            await held.wait()

        stage.served.aclose = hold  # type: ignore[method-assign]
        stage.engine.end.set_result("gone")
        await eventually(lambda: stage.page["endpoints"] == {"generate": "notready"})
        stage.host.health.set_endpoint("generate", EndpointState.READY, "answered a request")
        assert stage.page["endpoints"] == {"generate": "notready"}
        held.set()
        await task


async def test_what_an_engine_says_at_its_end_is_no_failure() -> None:
    stage = Stage()

    async def drain() -> None:
        stage.engine.end.set_result("I was told to")
        await asyncio.sleep(0.01)  # in which it would be taken for one

    stage.engine.drain = drain  # type: ignore[method-assign]
    async with stage.running() as task:
        pass
    assert task.result() == EXIT_OK
    assert stage.failures == []


async def test_a_failed_engine_that_hangs_does_not_hold_the_process() -> None:
    stage = Stage(cleanup_timeout=0.05, drain_timeout=3600)
    stage.engine.cleanup = asyncio.Event().wait  # type: ignore[method-assign, assignment]
    async with stage.running() as task:
        stage.engine.end.set_result("gone")
        assert await asyncio.wait_for(task, 2) == EXIT_DEADLINE


async def test_without_anybody_to_tell_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    worker = Worker(stage.engine, stage.host, config=WorkerConfig(grace_period=0))
    stage.engine.end.set_result("gone")
    with caplog.at_level(logging.ERROR):
        assert await worker.run() == EXIT_FAILED
    assert [record.getMessage() for record in caplog.records] == ["the engine has failed: gone"]


# -- commands ---------------------------------------------------------------------------------------------------------------


async def test_commands_are_offered_while_it_serves() -> None:
    stage = Stage()
    async with stage.running():
        assert await stage.host.engine_routes.handle("control/sleep", b"[1]") == (200, b'{"slept":[1]}')
        assert stage.log[-1] == "unregister"
    assert stage.host.engine_routes.names == []
