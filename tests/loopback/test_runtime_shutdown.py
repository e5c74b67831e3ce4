"""Leaving in good order: the record first, then no new requests, then what runs may finish; and leaving at once."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from stator.errors import EngineError, StatorError, Unavailable, UsageError
from stator.protocol.records import EndpointRecord, Query
from stator.runtime import Runtime
from stator.runtime.context import Context
from stator.testing.cluster import ENDPOINT, PLANES, Cluster, echo, tasks_now
from stator.testing.plane_suite import endless, eventually

pytestmark = pytest.mark.timeout(60)

LISTED = Query(EndpointRecord.bucket)


@pytest.fixture(params=PLANES)
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    async with Cluster.open(request.param) as cluster:
        yield cluster


class Slow:
    """Yields one item at once and another when it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.contexts: list[Context] = []

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.contexts.append(context)
        yield "first"
        await self.go.wait()
        yield "last"


async def test_finishing_lets_running_streams_complete_and_refuses_new_ones(cluster: Cluster) -> None:
    slow = Slow()
    worker = await cluster.worker(slow)
    client = await cluster.client()
    record = worker.served.record
    async with client.generate(None) as stream:
        assert await anext(stream) == "first"
        finishing = asyncio.ensure_future(worker.served.finish(20))
        await eventually(lambda: not client.instance_ids(), what="the record is gone first")
        assert not finishing.done()
        assert worker.served.inflight == 1
        ghost = await cluster.join()
        await ghost.discovery.register(record)  # somebody who has not heard of it
        await client.wait_for_instances(timeout=5)
        with pytest.raises(Unavailable):
            await client.generate(None).collect()
        slow.go.set()
        assert await stream.collect() == ["last"]
        await finishing
    assert len(slow.contexts) == 1


async def test_finishing_has_a_limit(cluster: Cluster) -> None:
    worker = await cluster.worker(Slow())
    client = await cluster.client()
    async with client.generate(None) as stream:
        assert await anext(stream) == "first"
        started = asyncio.get_running_loop().time()
        await worker.served.finish(0.2)
        assert 0.15 < asyncio.get_running_loop().time() - started < 5
        with pytest.raises(EngineError) as caught:
            await anext(stream)
    assert caught.value.kind == "EngineShutdown"


async def test_killing_everything_says_that_the_worker_shuts_down(cluster: Cluster) -> None:
    """It was not the caller who killed."""
    worker = await cluster.worker(Slow())
    client = await cluster.client()
    async with client.generate(None) as stream:
        assert await anext(stream) == "first"
        worker.served.kill_all()
        with pytest.raises(EngineError) as caught:
            await anext(stream)
    assert caught.value.kind == "EngineShutdown"
    await asyncio.wait_for(worker.served.idle(), 5)


async def test_finishing_may_be_cut_short(cluster: Cluster) -> None:
    slow = Slow()
    worker = await cluster.worker(slow)
    client = await cluster.client()
    async with client.generate(None) as stream:
        assert await anext(stream) == "first"
        finishing = asyncio.ensure_future(worker.served.finish(60))
        await eventually(lambda: not client.instance_ids())
        finishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finishing
        with pytest.raises(EngineError):
            await anext(stream)
    await eventually(lambda: worker.served.inflight == 0)


async def test_leaving_the_runtime_drains_what_it_serves(cluster: Cluster) -> None:
    slow, other = Slow(), Slow()
    worker = await cluster.worker(slow)
    await cluster.worker(other, endpoint="test.backend.other", runtime=worker.runtime)
    client = await cluster.client()
    second = await cluster.client(endpoint="test.backend.other")
    async with client.generate(None) as stream, second.generate(None) as another:
        assert (await anext(stream), await anext(another)) == ("first", "first")
        leaving = asyncio.ensure_future(cluster.leave(worker.runtime))
        await eventually(lambda: not client.instance_ids() and not second.instance_ids())
        assert not leaving.done()
        slow.go.set()
        assert await stream.collect() == ["last"]
        other.go.set()
        assert await another.collect() == ["last"]
        await leaving


async def test_leaving_by_an_exception_does_not_wait(cluster: Cluster) -> None:
    client = await cluster.client()
    stream = client.generate(None)

    async def worker() -> None:
        settings: dict[str, Any] = dict(cluster._settings)  # pyright: ignore[reportPrivateUsage]
        if cluster.plane == "memory":
            settings["plane"] = cluster.network
        async with Runtime.connect(discovery=cluster.store, shutdown_timeout=30, **settings) as runtime:
            await runtime.endpoint(ENDPOINT).start(endless)
            await anext(stream)
            raise RuntimeError("crash")

    started = asyncio.get_running_loop().time()
    with pytest.raises(RuntimeError, match="crash"):
        await worker()
    assert asyncio.get_running_loop().time() - started < 10
    with pytest.raises(StatorError):
        await stream.collect()
    await eventually(lambda: not client.instance_ids())


async def test_serve_returns_when_the_runtime_shuts_down(cluster: Cluster) -> None:
    runtime = await cluster.join()
    slow = Slow()
    serving = asyncio.ensure_future(runtime.endpoint(ENDPOINT).serve(slow))
    client = await cluster.client()
    await client.wait_for_instances(timeout=5)
    async with client.generate(None) as stream:
        assert await anext(stream) == "first"
        runtime.shutdown()
        runtime.shutdown()
        await eventually(lambda: not client.instance_ids())
        assert not serving.done()
        slow.go.set()
        assert await stream.collect() == ["last"]
    await asyncio.wait_for(serving, 5)
    await asyncio.wait_for(runtime.wait_for_shutdown(), 1)
    await asyncio.wait_for(runtime.endpoint(ENDPOINT).serve(slow), 1)  # too late: nothing is served
    assert await runtime.discovery.list(LISTED) == []


async def test_cancelling_serve_stops_at_once(cluster: Cluster) -> None:
    runtime = await cluster.join()
    serving = asyncio.ensure_future(runtime.endpoint(ENDPOINT).serve(endless))
    client = await cluster.client()
    await client.wait_for_instances(timeout=5)
    async with client.generate(None) as stream:
        await anext(stream)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(serving, 5)
        with pytest.raises(EngineError):
            await stream.collect()
    await eventually(lambda: not client.instance_ids())


async def test_the_block_form_serves_while_it_is_entered(cluster: Cluster) -> None:
    runtime = await cluster.join()
    client = await cluster.client()
    async with runtime.endpoint(ENDPOINT).serving(echo) as served:
        await client.wait_for_instances(timeout=5)
        assert await client.generate("hi").collect() == ["hi"]
        assert served.record.instance_id == runtime.instance_id
    await eventually(lambda: not client.instance_ids())
    with pytest.raises(UsageError):
        await served.register()
    await served.aclose()
    async with runtime.endpoint(ENDPOINT).serving(echo):  # and again
        await client.wait_for_instances(timeout=5)
        assert await client.generate("again").collect() == ["again"]


async def test_a_handler_that_is_none_leaves_nothing_behind(cluster: Cluster) -> None:
    runtime = await cluster.join()
    with pytest.raises(UsageError):
        await runtime.endpoint(ENDPOINT).start(None)  # pyright: ignore[reportArgumentType]  # the point
    assert await runtime.discovery.list(LISTED) == []
    await cluster.worker(echo, runtime=runtime)


async def test_registration_that_fails_leaves_nothing_behind(cluster: Cluster) -> None:
    first = await cluster.worker(echo)
    runtime = await cluster.join()
    # A record under our key that somebody else owns.
    squatter = msgspec.structs.replace(first.served.record, instance_id=runtime.instance_id)
    await first.runtime.discovery.register(squatter)
    with pytest.raises(UsageError):
        await runtime.endpoint(ENDPOINT).start(echo)
    await first.runtime.discovery.unregister(squatter.key)
    worker = await cluster.worker(echo, runtime=runtime)
    assert worker.served.listed


async def test_a_cluster_leaves_no_task_behind() -> None:
    before = tasks_now()
    for plane in PLANES:
        async with Cluster.open(plane) as cluster:
            await cluster.worker(echo)
            client = await cluster.client()
            assert await client.generate(plane).collect() == [plane]
    await eventually(lambda: tasks_now() == before)
