"""Serving and calling, on every plane: how answers are read, how they end, who belongs to whom."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from stator import Runtime
from stator.errors import Cancelled, EngineError, PeerProtocolError, Timeout, Unavailable, UsageError
from stator.protocol.records import EndpointRecord, Query
from stator.runtime.context import Context
from stator.runtime.engine import Engine, pipeline
from stator.testing.cluster import PLANES, Cluster, echo
from stator.testing.plane_suite import count, endless, eventually

pytestmark = pytest.mark.timeout(60)

CANCEL_WITHIN = 0.25
"""seconds; the design says 0.05, a busy test machine gets five times that"""


@pytest.fixture(params=PLANES)
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    async with Cluster.open(request.param) as cluster:
        yield cluster


class Recorded:
    """A handler that notes its contexts and its ends."""

    def __init__(self, generate: Any) -> None:
        self.contexts: list[Context] = []
        self.ended: list[float] = []
        self._generate = generate

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.contexts.append(context)
        try:
            async for item in self._generate(request, context):
                yield item
        finally:
            self.ended.append(asyncio.get_running_loop().time())


# -- reading


async def test_ways_to_read(cluster: Cluster) -> None:
    await cluster.worker(count)
    client = await cluster.client()
    assert await client.generate({"n": 3}).collect() == [0, 1, 2]
    assert [item async for item in client.generate({"n": 3})] == [0, 1, 2]
    async with client.generate({"n": 3}) as stream:
        assert [item async for item in stream] == [0, 1, 2]
    stream = client.generate({"n": 2})
    assert (await anext(stream), await anext(stream)) == (0, 1)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    async with aclosing(client.generate({"n": 1000})) as stream:
        assert await anext(stream) == 0
    assert await client.generate({"n": 0}).collect() == []


async def test_batches_hold_every_item_once(cluster: Cluster) -> None:
    await cluster.worker(count)
    client = await cluster.client()
    batches = [batch async for batch in client.generate({"n": 500}).batches()]
    assert all(batches)
    assert [item for batch in batches for item in batch] == list(range(500))
    assert [batch async for batch in client.generate({"n": 0}).batches()] == []
    async with client.generate({"n": 500}) as stream:
        first = await anext(stream)
        assert [first, *[item async for batch in stream.batches() for item in batch]] == list(range(500))


async def test_a_wait_that_is_given_up_takes_nothing(cluster: Cluster) -> None:
    go = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[Any]:
        yield 1
        await go.wait()
        yield 2

    await cluster.worker(handler)
    client = await cluster.client()
    async with client.generate(None) as stream:
        assert await anext(stream) == 1
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.01)
        go.set()
        assert [item async for item in stream] == [2]


class Point(msgspec.Struct):
    x: int
    label: str = "none"


async def test_items_come_as_the_type_asked_for(cluster: Cluster) -> None:
    async def points(request: Any) -> AsyncIterator[Any]:
        yield {"x": 1, "unknown": True}
        yield {"x": 2, "label": "two"}
        yield Point(3)

    await cluster.worker(points)
    client = await cluster.client(item_type=Point)
    assert await client.generate(None).collect() == [Point(1), Point(2, "two"), Point(3)]
    with pytest.raises(PeerProtocolError):
        await (await cluster.client(item_type=int)).generate(None).collect()
    plain = await cluster.client()
    assert (await plain.generate(None).collect())[1] == {"x": 2, "label": "two"}


async def test_a_request_may_be_any_value_that_has_a_json_form(cluster: Cluster) -> None:
    await cluster.worker(echo)
    client = await cluster.client()
    for value in (None, 3, "ü", [1, [2]], {"a": {"b": None}}):
        assert await client.generate(value).collect() == [value]
    assert await client.generate(Point(1)).collect() == [{"x": 1, "label": "none"}]


async def test_identity_travels(cluster: Cluster) -> None:
    worker = Recorded(echo)
    await cluster.worker(worker)
    client = await cluster.client()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await client.generate(1, id="my-id", metadata={"tenant": "ü"}, headers={"traceparent": trace}, timeout=30.0).collect()
    context = worker.contexts[0]
    assert (context.id, context.metadata, context.headers["traceparent"]) == ("my-id", {"tenant": "ü"}, trace)
    assert context.deadline is not None
    assert 20 < context.deadline - asyncio.get_running_loop().time() <= 30
    async with client.generate(1) as stream:
        await stream.collect()
        assert stream.id == worker.contexts[1].id
        assert stream.instance_id == cluster.workers[0].id
    assert worker.contexts[1].deadline is None


# -- leaving early


@pytest.mark.parametrize("how", ["block", "loop", "close", "kill", "task", "drop"])
async def test_leaving_early_ends_the_handler_soon(cluster: Cluster, how: str) -> None:
    async def sleepy(request: Any, context: Context) -> AsyncIterator[Any]:
        yield 0
        await asyncio.Event().wait()

    worker = Recorded(sleepy)
    await cluster.worker(worker)
    client = await cluster.client()
    delays: list[float] = []
    held: list[Any] = []
    for number in range(1, 12):
        stream = client.generate(None)
        if how != "drop":
            held.append(stream)  # or its end would be the reason
        left = await _leave_early(stream, how, lambda number=number: len(worker.contexts) == number)
        del stream
        await eventually(lambda number=number: len(worker.ended) == number, what="the handler was cancelled")
        delays.append(worker.ended[-1] - left)
    assert statistics.median(delays) < CANCEL_WITHIN
    assert all(context.is_killed for context in worker.contexts)


async def _leave_early(stream: Any, how: str, running: Callable[[], bool]) -> float:
    """Read one item, or wait until the handler is `running`, and leave; when that was."""
    clock = asyncio.get_running_loop().time
    match how:
        case "block":
            async with stream:
                async for _ in stream:
                    break
        case "loop":
            async for _ in stream:
                break
        case "close":
            async with aclosing(stream):
                await anext(stream)
        case "kill":
            await anext(stream)
            stream.kill()
        case "drop":
            await anext(stream)
        case _:
            task = asyncio.ensure_future(stream.collect())
            await eventually(running)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    return clock()


async def test_stopping_delivers_what_the_handler_still_has_to_say(cluster: Cluster) -> None:
    async def polite(request: Any, context: Context) -> AsyncIterator[Any]:
        yield "hello"
        await context.stopped()
        yield "goodbye"

    await cluster.worker(polite)
    client = await cluster.client()
    async with client.generate(None) as stream:
        assert await anext(stream) == "hello"
        stream.stop()
        stream.stop()
        assert await stream.collect() == ["goodbye"]


async def test_reading_on_after_a_kill_says_so(cluster: Cluster) -> None:
    await cluster.worker(endless)
    client = await cluster.client()
    async with client.generate(None) as stream:
        await anext(stream)
        stream.kill()
        with pytest.raises(Cancelled):
            while True:
                await anext(stream)


# -- one request that makes another


async def test_ending_a_request_ends_those_made_for_it(cluster: Cluster) -> None:
    inner = Recorded(endless)
    await cluster.worker(inner, endpoint="test.inner.generate")
    middle = await cluster.join()
    client = await cluster.client(endpoint="test.inner.generate", runtime=middle)

    async def outer(request: Any, context: Context) -> AsyncIterator[Any]:
        async with client.generate(request, context) as stream:
            async for item in stream:
                yield item

    await cluster.worker(outer, runtime=middle)
    caller = await cluster.client()
    async with caller.generate(None, id="chain", metadata={"a": "b"}) as stream:
        await anext(stream)
        stream.stop()
        items = await stream.collect()
        assert items == sorted(items)
    assert (inner.contexts[0].id, inner.contexts[0].metadata) == ("chain", {"a": "b"})
    assert not inner.contexts[0].is_killed
    async with caller.generate(None) as stream:
        await anext(stream)
    await eventually(lambda: inner.contexts[1].is_killed, what="the inner handler was killed")


async def test_killing_a_context_ends_its_request_before_the_first_item(cluster: Cluster) -> None:
    async def silent(request: Any, context: Context) -> AsyncIterator[Any]:
        await context.stopped()
        yield "stopped" if not context.is_killed else "killed"

    worker = Recorded(silent)
    await cluster.worker(worker)
    client = await cluster.client()
    stopped, killed = Context("stopped"), Context("killed")
    tasks = [asyncio.ensure_future(client.generate(None, context).collect()) for context in (stopped, killed)]
    await eventually(lambda: len(worker.contexts) == 2)
    stopped.stop()
    assert await tasks[0] == ["stopped"]
    killed.kill()
    with pytest.raises(Cancelled):
        await tasks[1]
    await eventually(lambda: len(worker.ended) == 2)


async def test_the_deadline_goes_on_to_the_next_request(cluster: Cluster) -> None:
    inner = Recorded(endless)
    await cluster.worker(inner, endpoint="test.inner.generate")
    middle = await cluster.join()
    client = await cluster.client(endpoint="test.inner.generate", runtime=middle)

    async def outer(request: Any, context: Context) -> AsyncIterator[Any]:
        async for item in client.generate(request, context):
            yield item

    await cluster.worker(outer, runtime=middle)
    caller = await cluster.client()
    with pytest.raises((Timeout, EngineError)) as caught:  # the caller's clock and the one in the middle run out together
        await caller.generate(None, timeout=0.4).collect()
    assert "total took longer" in caught.value.message
    assert inner.contexts[0].deadline is not None
    await eventually(lambda: len(inner.ended) == 1, what="the inner request ended with the outer")


# -- pipelines


class Shout:
    async def generate(self, request: Any, next: Engine, context: Context) -> AsyncIterator[Any]:
        async for item in next.generate(request + " end", context):
            yield item.upper()


class Twice:
    async def generate(self, request: Any, next: Engine, context: Context) -> AsyncIterator[Any]:
        for _ in range(2):
            async for item in next.generate(request, context):
                yield item


async def words(request: Any) -> AsyncIterator[Any]:
    for word in request.split():
        yield word


async def test_a_pipeline_that_ends_in_a_client_is_served_and_called(cluster: Cluster) -> None:
    await cluster.worker(words, endpoint="test.words.generate")
    middle = await cluster.join()
    route = await cluster.client(endpoint="test.words.generate", runtime=middle)
    await cluster.worker(pipeline(Shout(), Twice(), route), runtime=middle)
    client = await cluster.client()
    assert await client.generate("a b").collect() == ["A", "B", "END"] * 2
    assert [item async for item in pipeline(Twice(), client).generate("x", Context("local"))] == ["X", "END"] * 4


async def test_an_error_behind_a_pipeline_reaches_the_caller(cluster: Cluster) -> None:
    async def fails(request: Any) -> AsyncIterator[Any]:
        yield "one"
        raise ValueError("no such voice")

    await cluster.worker(fails, endpoint="test.words.generate")
    middle = await cluster.join()
    route = await cluster.client(endpoint="test.words.generate", runtime=middle)
    await cluster.worker(pipeline(Shout(), route), runtime=middle)
    client = await cluster.client()
    got: list[Any] = []
    with pytest.raises(EngineError, match="no such voice") as caught:
        async for item in client.generate("a"):
            got.append(item)
    assert got == ["ONE"]
    assert caught.value.kind == "InvalidArgument"


# -- names


async def test_several_endpoints_and_nested_namespaces_in_one_process(cluster: Cluster) -> None:
    runtime = await cluster.join()
    deep = runtime.namespace("demo").namespace("blue").namespace("eu")
    paths = ["demo.blue.eu.backend.generate", "demo.backend.embed", "other.backend.rank"]
    component = deep.component("backend")
    assert runtime.namespace("demo.blue.eu").component("backend") is component
    assert str(component.endpoint("generate").id) == paths[0]

    async def named(path: str, request: Any) -> AsyncIterator[Any]:
        yield path

    async with asyncio.TaskGroup() as group:  # all at once
        for path in paths:

            async def handler(request: Any, path: str = path) -> AsyncIterator[Any]:
                yield path

            group.create_task(cluster.worker(lambda request, handler=handler: handler(request), endpoint=path, runtime=runtime))
    caller = await cluster.join()
    for path in paths:
        client = await cluster.client(endpoint=path, runtime=caller)
        assert await client.generate(None).collect() == [path]
        assert client.instance_ids() == [runtime.instance_id]
        assert str(client.endpoint) == path
    assert [record.endpoint for record in await component.list_instances()] == ["generate"]
    records = await caller.discovery.list(Query(EndpointRecord.bucket))
    assert len(records) == 3


async def test_an_endpoint_name_is_served_once_per_runtime(cluster: Cluster) -> None:
    worker = await cluster.worker(echo)
    for path in ("test.backend.generate", "test.other.generate"):
        with pytest.raises(UsageError, match="already"):
            await cluster.worker(count, endpoint=path, runtime=worker.runtime)
    client = await cluster.client()
    assert await client.generate("still here").collect() == ["still here"]
    await worker.served.finish(5)
    await cluster.worker(count, endpoint="test.other.generate", runtime=worker.runtime)  # the name is free again


@pytest.mark.parametrize("path", ["", "a", "a.b", "a.b.c/d", ".b.c", "a..b.c", "dyn://", "a.b."])
async def test_names_that_are_none(path: str) -> None:
    async with Cluster.open("memory") as cluster:
        runtime = await cluster.join()
        with pytest.raises(UsageError):
            runtime.endpoint(path)


# -- who is there


async def test_instances_appear_and_disappear(cluster: Cluster) -> None:
    client = await cluster.client()
    assert client.instance_ids() == []
    first = await cluster.worker(echo)
    assert await client.wait_for_instances(timeout=5) == [first.id]
    second = await cluster.worker(echo)
    assert await client.wait_for_instances(2, timeout=5) == sorted([first.id, second.id])
    assert [record.instance_id for record in client.instances()] == client.instance_ids()
    await cluster.leave(first.runtime)
    await eventually(lambda: client.instance_ids() == [second.id])
    assert await client.generate(1).collect() == [1]
    await second.served.unregister()
    await eventually(lambda: client.instance_ids() == [])
    await second.served.register()
    await client.wait_for_instances(timeout=5)
    assert await client.generate(2).collect() == [2]


async def test_waiting_for_instances_ends(cluster: Cluster) -> None:
    await cluster.worker(echo)
    client = await cluster.client()
    with pytest.raises(Unavailable, match="1 of 2 instances"):
        await client.wait_for_instances(2, timeout=0.05)


async def test_a_request_waits_for_an_instance_and_not_for_ever(cluster: Cluster) -> None:
    client = await cluster.client(instance_timeout=0.3)
    clock = asyncio.get_running_loop().time
    started = clock()
    with pytest.raises(Unavailable):
        await client.generate(1).collect()
    assert 0.25 < clock() - started < 3
    patient = await cluster.client(instance_timeout=20)
    task = asyncio.ensure_future(patient.generate("late").collect())
    await asyncio.sleep(0.05)
    await cluster.worker(echo)
    assert await asyncio.wait_for(task, 5) == ["late"]


# -- after the end


async def test_a_runtime_that_has_left_says_so(cluster: Cluster) -> None:
    await cluster.worker(echo)
    runtime = await cluster.join()
    client = await cluster.client(runtime=runtime)
    assert await client.generate(1).collect() == [1]
    await cluster.leave(runtime)
    with pytest.raises(UsageError):
        await client.generate(1).collect()
    with pytest.raises(UsageError):
        await runtime.endpoint("test.backend.other").client()
    with pytest.raises(UsageError):
        await runtime.endpoint("test.backend.other").start(echo)


async def test_leaving_with_a_stream_open_ends_it(cluster: Cluster) -> None:
    worker = Recorded(endless)
    await cluster.worker(worker)
    runtime = await cluster.join()
    client = await cluster.client(runtime=runtime)
    stream = client.generate(None)
    await anext(stream)
    await cluster.leave(runtime)
    with pytest.raises(ConnectionError):
        while True:
            await anext(stream)
    await eventually(lambda: worker.contexts[0].is_killed)


async def test_the_connect_block_takes_settings_and_refuses_nonsense() -> None:
    from stator.errors import ConfigError

    for wrong in (
        {"speed": 3},
        {"routing__polcy": "x"},
        {"host": "0.0.0.0"},
        {"plane": "fast"},
        {"discovery": "carrier-pigeon"},
    ):
        with pytest.raises(ConfigError):
            async with Runtime.connect(**({"discovery": "memory"} | wrong)):
                raise AssertionError("joined")
    async with Runtime.connect(discovery="memory", plane="memory", item_timeout=7) as runtime:
        assert runtime.config.item_timeout == 7
