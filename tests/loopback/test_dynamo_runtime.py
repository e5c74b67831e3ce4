"""The reference's names over one runtime: what is connected when, what is left behind, and what differs from the reference."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from stator.dynamo._core import (
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    RouterMode,
    WorkerType,
    register_model,
    unregister_model,
)
from stator.dynamo.distributed import DistributedRuntime
from stator.dynamo.endpoint import Endpoint
from stator.dynamo.errors import CallFailed, InvalidValue, NotThere, StreamFailed
from stator.dynamo.runtime import Context, PyAsyncRequestStream
from stator.errors import ConfigError, StatorError, UsageError
from stator.events.nats import NatsEvents
from stator.protocol.records import EndpointRecord, ModelRecord, Query
from stator.testing.cluster import open_files, tasks_now
from stator.testing.etcd_server import etcd_server
from stator.testing.nats_server import nats_server

pytestmark = pytest.mark.timeout(60)

PATH = "test.names.generate"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATOR_FILE_ROOT", str(tmp_path / "cluster"))
    monkeypatch.setenv("STATOR_INSTANCE_TIMEOUT", "0")


async def count(request: Any, context: Context) -> AsyncIterator[Any]:
    for number in range(request):
        if context.is_stopped():
            return
        yield number
        await asyncio.sleep(0.002)


class Held:
    """A handler that waits, and what became of it."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.ended = asyncio.Event()
        self.end = ""
        self.context: Context | None = None

    async def __call__(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.context = context
        self.begun.set()
        try:
            yield "first"
            await self.go_on.wait()
            yield "second"
            self.end = "complete"
        except BaseException as error:
            self.end = type(error).__name__
            raise
        finally:
            self.ended.set()


class Serving:
    """`async with`: a runtime, and a served endpoint in it."""

    def __init__(self, handler: Any, *, backend: str = "file", serve: str = "serve_endpoint", **options: Any) -> None:
        self.runtime = DistributedRuntime(asyncio.get_running_loop(), backend, "tcp")
        self.endpoint: Endpoint = self.runtime.endpoint(PATH)
        self.task = asyncio.create_task(getattr(self.endpoint, serve)(handler, **options))

    async def __aenter__(self) -> "Serving":
        async with asyncio.timeout(20):
            self.client = await self.endpoint.client()
            await self.client.wait_for_instances()
        return self

    async def __aexit__(self, *_: object) -> None:
        async with asyncio.timeout(20):
            await self.runtime.aclose()
            await asyncio.wait([self.task])


async def read(stream: Any) -> list[Any]:
    return [item async for item in stream]


# -- connecting and leaving ---------------------------------------------------------------------------------------------------


async def test_nothing_is_left_after_shutdown(tmp_path: Path) -> None:
    async with Serving(count):  # what is made once in a process
        pass
    tasks, files = tasks_now(), open_files()
    async with Serving(count) as serving:
        assert len(list(tmp_path.rglob("instances/*"))) == 1
        assert await read(await serving.client.random(3, annotated=False)) == [0, 1, 2]
        assert tasks_now() != tasks
        serving.runtime.shutdown()
        serving.runtime.shutdown()
        async with asyncio.timeout(10):
            assert await serving.task is None
        assert serving.client.instance_ids() == []
        assert list(tmp_path.rglob("instances/*")) == []
    assert tasks_now() == tasks
    assert sorted(open_files().values()) == sorted(files.values())


async def test_a_runtime_that_is_made_and_not_used_does_nothing(tmp_path: Path) -> None:
    tasks = tasks_now()
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    runtime.endpoint(PATH).metrics.register_prometheus_expfmt_callback(lambda: "")
    runtime.set_health_status(True)
    assert runtime.system_status_server_url() is None
    assert tasks_now() == tasks
    assert list(tmp_path.iterdir()) == []
    runtime.shutdown()
    await runtime.aclose()
    with pytest.raises(UsageError, match="shut down"):
        await runtime.connected()
    assert await runtime.endpoint(PATH).serve_endpoint(count) is None


async def test_many_first_uses_at_once_connect_once() -> None:
    runtime = DistributedRuntime(None, "mem", "tcp")
    clients = await asyncio.gather(*(runtime.endpoint(f"a.b.c{number}").client() for number in range(20)))
    assert len({id(client) for client in clients}) == 20
    assert runtime.endpoint("a.b.c").connection_id() == runtime.endpoint("d.e.f").connection_id()
    await runtime.aclose()


async def test_what_cannot_wait_says_how_to_connect() -> None:
    runtime = DistributedRuntime(None, "mem", "tcp")
    endpoint = runtime.endpoint(PATH)
    for use in (endpoint.connection_id, lambda: endpoint.metrics.create_gauge("a", "b")):
        with pytest.raises(UsageError, match=r"await runtime.connected\(\)"):
            use()
    await runtime.connected()
    assert endpoint.connection_id() == runtime.namespace("test").component("names").endpoint("generate").connection_id()
    await runtime.aclose()
    with pytest.raises(UsageError, match="was shut down"):
        endpoint.connection_id()


async def test_a_connection_that_fails_is_tried_again_at_the_next_use(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = DistributedRuntime(None, "no-such-plug-in", "tcp")
    with pytest.raises(StatorError, match="no-such-plug-in"):
        await runtime.endpoint(PATH).client()
    runtime = DistributedRuntime(None, "mem", "tcp")
    monkeypatch.setenv("STATOR_NATIVE_PORT", "x")
    monkeypatch.setenv("STATOR_CONNECT_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="soon"):
        await runtime.connected()
    monkeypatch.delenv("STATOR_NATIVE_PORT")
    monkeypatch.delenv("STATOR_CONNECT_TIMEOUT")
    assert await runtime.connected() is runtime
    await runtime.aclose()


async def test_who_waits_for_the_connection_may_be_cancelled() -> None:
    runtime = DistributedRuntime(None, "mem", "tcp")
    first = asyncio.create_task(runtime.connected())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert (await runtime.connected()).endpoint(PATH).connection_id()
    await runtime.aclose()


async def test_a_worker_on_etcd_and_nats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as servers:
        etcd = await asyncio.to_thread(servers.enter_context, etcd_server(tmp_path))
        nats = await asyncio.to_thread(servers.enter_context, nats_server(tmp_path / "nats"))
        monkeypatch.setenv("ETCD_ENDPOINTS", etcd.url)
        monkeypatch.setenv("NATS_SERVER", nats.url)
        runtime = DistributedRuntime(None, "etcd", "nats", event_plane="nats")
        serving = asyncio.ensure_future(runtime.endpoint(PATH).serve_endpoint(count))
        client = await runtime.endpoint(PATH).client()
        (instance,) = await client.wait_for_instances()
        stream = await client.round_robin(3, annotated=False)
        assert [item async for item in stream] == [0, 1, 2]
        assert [*await asyncio.to_thread(etcd.keys)] == [f"v1/instances/test/names/generate/{instance:x}"]
        inside = runtime._membership.now("looking")._services
        (record,) = await inside.discovery.list(Query("v1/instances"))
        assert isinstance(record, EndpointRecord) and record.transport.nats_tcp == f"test_names.generate-{instance:x}"
        assert isinstance(inside.events, NatsEvents)
        await runtime.aclose()
        await serving
        await asyncio.to_thread(servers.close)


async def test_what_nobody_has_is_refused() -> None:
    with pytest.raises(InvalidValue, match="carrier pigeon"):
        DistributedRuntime(None, "mem", "carrier pigeon")
    with pytest.raises(ValueError, match="owl"):
        DistributedRuntime(None, "mem", "tcp", event_plane="owl")


# -- serving ------------------------------------------------------------------------------------------------------------------


async def test_shutdown_waits_for_running_requests() -> None:
    handler = Held()
    async with Serving(handler) as serving:
        stream = await serving.client.random(None, annotated=False)
        assert await anext(stream) == "first"
        serving.runtime.shutdown()
        await asyncio.sleep(0)
        assert not serving.task.done()
        handler.go_on.set()
        async with asyncio.timeout(10):
            await serving.task
        assert handler.end == "complete"


async def test_without_graceful_shutdown_running_requests_end_at_once() -> None:
    handler = Held()
    async with Serving(handler, graceful_shutdown=False) as serving:
        await anext(await serving.client.random(None))
        serving.runtime.shutdown()
        async with asyncio.timeout(5):
            await serving.task
        assert handler.end == "CancelledError"


async def test_cancelling_serve_endpoint_stops_serving() -> None:
    handler = Held()
    async with Serving(handler) as serving:
        stream = await serving.client.random(None)
        assert (await anext(stream)).data() == "first"
        serving.task.cancel()
        with pytest.raises(ValueError, match=r"EngineShutdown|Disconnected"):
            await anext(stream)
        async with asyncio.timeout(5):
            await handler.ended.wait()
            while serving.client.instance_ids():
                await asyncio.sleep(0.01)
            with pytest.raises(CallFailed, match=r"^Unavailable: No workers available for endpoint test/names/generate$"):
                await serving.client.random(1)


async def test_an_endpoint_is_served_once_at_a_time() -> None:
    async with Serving(count) as serving:
        with pytest.raises(UsageError, match="serves an endpoint called 'generate' already"):
            await serving.endpoint.serve_endpoint(count)
        assert await read(await serving.client.random(2, annotated=False)) == [0, 1]
        with pytest.raises(UsageError, match="not served by this process"):
            await serving.runtime.endpoint("test.names.other").register_endpoint_instance()


async def test_a_bidirectional_endpoint_reads_while_it_answers() -> None:
    async def double(inputs: PyAsyncRequestStream, context: Context) -> AsyncIterator[Any]:
        assert isinstance(inputs, PyAsyncRequestStream)
        async for number in inputs:
            yield 2 * number
        yield [context.id(), context.is_stopped()]

    async with Serving(double, serve="serve_bidirectional_endpoint") as serving:
        runtime = await serving.runtime.membership.runtime()
        caller = await runtime.endpoint(PATH).client()
        async with caller.converse(id="both ways") as conversation:
            await conversation.send(1)
            assert await anext(conversation) == 2
            await conversation.send(4)
            assert await anext(conversation) == 8
            await conversation.end_input()
            assert [item async for item in conversation] == [["both ways", False]]


# -- calling ------------------------------------------------------------------------------------------------------------------


async def test_every_way_to_choose_reaches_the_worker() -> None:
    async with Serving(count) as serving:
        for mode in RouterMode:
            client = await serving.endpoint.client(mode)
            assert await read(await client.generate(2, False)) == [0, 1]
        for call in (serving.client.random, serving.client.round_robin, serving.client.device_aware_weighted):
            assert [item.data() for item in await read(await call(2))] == [0, 1]
        with pytest.raises(TypeError, match="RouterMode"):
            await serving.endpoint.client("random")  # pyright: ignore[reportArgumentType]


async def test_a_dropped_stream_ends_its_request_although_its_context_lives() -> None:
    handler = Held()
    async with Serving(handler) as serving:
        context = Context("kept")
        stream = await serving.client.random(None, context=context)
        await anext(stream)
        del stream
        async with asyncio.timeout(5):
            await handler.ended.wait()
        assert handler.end == "CancelledError"
        assert handler.context is not None and handler.context.is_killed()
        assert not context.is_stopped()


async def test_a_context_may_be_stopped_or_killed_from_another_thread() -> None:
    async with Serving(count) as serving:
        for end in (Context.stop_generating, Context.kill_generating):
            context = Context()
            waiting = context.async_killed_or_stopped()
            stream = await serving.client.random(100_000, context=context)
            await anext(stream)
            thread = threading.Thread(target=end, args=(context,))
            thread.start()
            async with asyncio.timeout(5):
                assert await waiting is True
                try:
                    await read(stream)
                except StreamFailed as error:
                    assert str(error).startswith("Cancelled: ")
            thread.join(5)
            assert context.is_stopped()


async def test_a_handler_passes_its_context_on() -> None:
    async with Serving(count) as serving:

        async def relay(request: Any, context: Context) -> AsyncIterator[Any]:
            context.metadata["relayed"] = "yes"
            async for item in await serving.client.random(request, context=context):
                yield item.data()
            yield [context.id(), context.metadata.copy()]

        task = asyncio.create_task(serving.runtime.endpoint("test.names.relay").serve_endpoint(relay))
        client = await serving.runtime.endpoint("test.names.relay").client()
        await client.wait_for_instances()
        outer = Context("outer", {"by": "test"})
        assert await read(await client.random(2, False, outer)) == [0, 1, ["outer", {"by": "test", "relayed": "yes"}]]
        context = Context("stopped in the middle")
        stream = await client.random(1_000_000, annotated=False, context=context)
        await anext(stream)
        context.stop_generating()
        async with asyncio.timeout(5):
            assert len(await read(stream)) < 1000
        task.cancel()


# -- the operator's side ------------------------------------------------------------------------------------------------------


async def test_metrics_routes_and_health_are_on_the_status_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATOR_HEALTH_PORT", "0")
    monkeypatch.setenv("STATOR_HEALTH_HOST", "127.0.0.1")
    runtime = DistributedRuntime(asyncio.get_running_loop(), "mem", "tcp")
    endpoint = runtime.endpoint(PATH)

    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return {"got": body}

    runtime.register_engine_route("control/echo", echo)
    runtime.set_health_status(True)
    endpoint.metrics.register_prometheus_expfmt_callback(lambda: "early_total 1")
    await runtime.connected()
    endpoint.metrics.register_prometheus_expfmt_callback(lambda: "late_total 2")
    endpoint.metrics.create_gauge("of_the_author", "help", [("kind", "x")]).set(3)
    endpoint.metrics.create_counter("counted", "help").inc()
    endpoint.metrics.create_histogram("measured", "help", buckets=[1, 2]).observe(1.5)
    endpoint.metrics.create_counter_vec("by_reason", "help", ["reason"]).labels("bad").inc()
    endpoint.metrics.create_gauge_vec("by_rank", "help", ["rank"]).labels("0").set(1)
    with pytest.raises(UsageError, match="automatically added"):
        endpoint.metrics.create_gauge("x", "help", [("worker_id", "1")])
    with pytest.raises(UsageError, match=r"valid metric name|valid label name"):
        endpoint.metrics.create_gauge("y", "help", [("9-bad", "1")])
    with pytest.raises(TypeError, match="callable"):
        endpoint.metrics.register_prometheus_expfmt_callback(3)  # pyright: ignore[reportArgumentType]
    url = runtime.system_status_server_url()
    assert url is not None
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/health") as answer:
            assert answer.status == 200
        runtime.set_health_status(False)
        async with session.get(f"{url}/health") as answer:
            assert answer.status == 503
        async with session.post(f"{url}/engine/control/echo", json={"a": 1}) as answer:
            assert await answer.json(content_type=None) == {"got": {"a": 1}}
        async with session.get(f"{url}/metrics") as answer:
            page = await answer.text()
    assert {"early_total 1", "late_total 2"} <= set(page.splitlines())
    labels = 'dynamo_component="names",dynamo_endpoint="generate",dynamo_namespace="test",kind="x"'
    assert f'dynamo_component_of_the_author{{{labels},worker_id="{endpoint.connection_id():x}"}} 3' in page
    for name in ("counted", "measured_bucket", "by_reason", "by_rank"):
        assert f"\ndynamo_component_{name}{{" in page
    await runtime.aclose()
    assert runtime.system_status_server_url() is None


# -- models -------------------------------------------------------------------------------------------------------------------


async def test_a_model_is_registered_and_taken_back() -> None:
    from stator.llm import card

    path = str(Path(card.__file__).parent / "byte_model")
    async with Serving(count) as serving:
        limits = ModelRuntimeConfig()
        limits.set_engine_specific("role", '"left"')
        limits.taints = {"b", "a"}

        async def cards() -> list[Any]:
            runtime = await serving.runtime.membership.runtime()
            found = await runtime.discovery.list(Query(ModelRecord.bucket, ("test", "names", "generate")))
            return [record.card_json for record in found if isinstance(record, ModelRecord)]

        async def register(**options: Any) -> None:
            kind = ModelType.Chat | ModelType.Completions
            await register_model(
                ModelInput.Tokens, kind, serving.endpoint, path, "m", worker_type=WorkerType.Aggregated, **options
            )

        waiting = asyncio.create_task(serving.client.wait_for_instance_by_runtime_data("role", "left", 10))
        await register()
        await register(runtime_config=limits, user_data={"u": 1}, kv_cache_block_size=32, needs=[[WorkerType.Prefill]])
        (found,) = await cards()
        assert found["display_name"] == "m" and found["kv_cache_block_size"] == 32 and found["needs"] == [["prefill"]]
        assert found["runtime_config"]["taints"] == ["a", "b"] and found["runtime_config"]["runtime_data"] == {"role": "left"}
        assert await waiting == serving.endpoint.connection_id()
        await register(lora_name="small/adapter", base_model_path=path, max_gpu_lora_count=4)
        adapter = next(one for one in await cards() if one.get("lora"))
        assert adapter["display_name"] == "small/adapter" and adapter["lora"] == {
            "name": "small/adapter",
            "max_gpu_lora_count": 4,
        }
        await unregister_model(serving.endpoint, "small/adapter")
        assert [one["display_name"] for one in await cards()] == ["m"]
        await unregister_model(serving.endpoint)
        await unregister_model(serving.endpoint)
        assert await cards() == []
        with pytest.raises(TimeoutError, match=r'runtime_data\["role"\] == "left"'):
            await serving.client.wait_for_instance_by_runtime_data("role", "left", 0.1)
        with pytest.raises(NotThere, match="KV routing"):
            await register(router_config=object())
        with pytest.raises(ValueError, match="both be provided"):
            await register(lora_name="half")
        await register_model(
            ModelInput.Tensor, ModelType.TensorBased, serving.endpoint, "shape", worker_type=WorkerType.Aggregated
        )
        assert [one["display_name"] for one in await cards()] == ["shape"]
