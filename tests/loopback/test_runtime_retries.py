"""Workers that refuse, drain, die: what callers notice of it on every plane, which is as little as possible."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from stator.errors import Disconnected, EngineError, Overloaded, StatorError, StreamIncomplete
from stator.runtime.context import Context
from stator.testing.cluster import PLANES, Cluster, ClusterWorker
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=PLANES)
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    async with Cluster.open(request.param) as cluster:
        yield cluster


class Behaviour:
    """What a worker does; changed while it runs."""

    def __init__(self) -> None:
        self.error: StatorError | None = None
        self.asked = 0
        self.running = 0
        self.go = asyncio.Event()
        self.go.set()
        self.items_first = 0

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.asked += 1
        self.running += 1
        try:
            if self.error is not None:
                raise self.error
            for number in range(self.items_first):
                yield number
            await self.go.wait()
            yield "done"
        finally:
            self.running -= 1


async def two(cluster: Cluster) -> tuple[ClusterWorker, Behaviour, ClusterWorker, Behaviour]:
    one, other = Behaviour(), Behaviour()
    return await cluster.worker(one), one, await cluster.worker(other), other


async def test_a_full_worker_is_passed_over(cluster: Cluster) -> None:
    _, bad, _, good = await two(cluster)
    bad.error = Overloaded("no slot")
    client = await cluster.client()
    for _ in range(6):
        assert await client.generate(None).collect() == ["done"]
    assert (bad.asked, good.asked) == (1, 6)
    good.error = Overloaded("no slot either")
    with pytest.raises(Overloaded):
        await client.generate(None).collect()


async def test_a_draining_worker_is_passed_over(cluster: Cluster) -> None:
    worker, bad, _, good = await two(cluster)
    client = await cluster.client()
    worker.served.drain()
    for _ in range(6):
        assert await client.generate(None).collect() == ["done"]
    assert (bad.asked, good.asked) == (0, 6)


async def test_a_worker_that_dies_before_the_first_item_goes_unnoticed(cluster: Cluster) -> None:
    worker, bad, _, good = await two(cluster)
    bad.go.clear()
    client = await cluster.client()
    task = [asyncio.ensure_future(client.generate(None).collect()) for _ in range(2)]
    await eventually(lambda: bad.running == 1 and good.asked == 1)
    worker.cut()
    assert await asyncio.gather(*task) == [["done"], ["done"]]
    assert good.asked == 2
    states = {row.instance_id: row.state for row in client.explain()}
    assert states[worker.id] == "inhibited"
    await eventually(lambda: bad.running == 0, what="the handler at the cut worker ended")
    bad.go.set()


async def test_a_worker_that_shuts_down_before_the_first_item_goes_unnoticed(cluster: Cluster) -> None:
    worker, bad, _, good = await two(cluster)
    bad.go.clear()
    client = await cluster.client()
    task = [asyncio.ensure_future(client.generate(None).collect()) for _ in range(2)]
    await eventually(lambda: bad.running == 1 and good.asked == 1)
    await worker.served.aclose()
    assert await asyncio.gather(*task) == [["done"], ["done"]]


async def test_a_worker_that_dies_after_the_first_item_is_an_error(cluster: Cluster) -> None:
    worker, bad, _, good = await two(cluster)
    bad.items_first, good.items_first = 2, 2
    bad.go.clear()
    client = await cluster.client()
    got: list[Any] = []
    async with client.direct(None, worker.id) as direct:
        assert (await anext(direct), await anext(direct)) == (0, 1)
        asked = good.asked
        worker.cut()
        with pytest.raises(StreamIncomplete) as caught:
            async for item in direct:
                got.append(item)
    assert caught.value.instance == worker.id
    assert (got, good.asked) == ([], asked)


async def test_an_error_in_mid_stream_is_the_callers(cluster: Cluster) -> None:
    async def fails_late(request: Any) -> AsyncIterator[Any]:
        yield 1
        raise Overloaded("ran out of blocks")

    await cluster.worker(fails_late)
    await cluster.worker(fails_late)
    client = await cluster.client()
    got: list[Any] = []
    with pytest.raises(Overloaded):
        async for item in client.generate(None):
            got.append(item)
    assert got == [1]


async def test_retry_never_and_direct_see_the_first_error(cluster: Cluster) -> None:
    _, bad, worker, other = await two(cluster)
    bad.error = other.error = Overloaded("no slot")
    client = await cluster.client()
    with pytest.raises(Overloaded):
        await client.generate(None, retry="never").collect()
    assert bad.asked + other.asked == 1
    await asyncio.sleep(0)
    fresh = await cluster.client()
    before = bad.asked + other.asked
    with pytest.raises(Overloaded):
        await fresh.direct(None, worker.id).collect()
    assert bad.asked + other.asked == before + 1


async def test_a_spent_budget_shows_the_original_error() -> None:
    async with Cluster.open("native", routing__retry_rate=0, routing__retry_ratio=0) as cluster:
        worker, bad, _, good = await two(cluster)
        bad.go.clear()
        client = await cluster.client()
        tasks = [asyncio.ensure_future(client.generate(None).collect()) for _ in range(2)]
        await eventually(lambda: bad.running == 1 and good.asked == 1)
        worker.cut()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert sorted(type(end).__name__ for end in ends) == ["Disconnected", "list"]
        assert good.asked == 1
        bad.error = Overloaded("no slot")  # costs nothing
        for _ in range(4):
            assert await client.generate(None).collect() == ["done"]


async def test_every_instance_is_asked_at_most_once(cluster: Cluster) -> None:
    behaviours = [Behaviour() for _ in range(4)]
    for behaviour in behaviours:
        behaviour.error = Overloaded("full")
        await cluster.worker(behaviour)
    client = await cluster.client()
    with pytest.raises(Overloaded):
        await client.generate(None).collect()
    assert [behaviour.asked for behaviour in behaviours] == [1, 1, 1, 1]


async def test_errors_of_a_handler_are_not_tried_elsewhere(cluster: Cluster) -> None:
    async def fails(request: Any) -> AsyncIterator[Any]:
        raise RuntimeError("boom")
        yield

    for _ in range(3):
        await cluster.worker(fails)
    client = await cluster.client()
    with pytest.raises(EngineError, match="boom") as caught:
        await client.generate(None).collect()
    assert caught.value.instance in client.instance_ids()
    assert all(row.state == "free" for row in client.explain())


async def test_a_failed_instance_comes_back_after_a_while(cluster: Cluster) -> None:
    worker, bad, _, good = await two(cluster)
    bad.go.clear()
    client = await cluster.client(routing__inhibit_first=0.5)
    tasks = [asyncio.ensure_future(client.generate(None).collect()) for _ in range(2)]
    await eventually(lambda: bad.running == 1 and good.asked == 1)
    worker.cut()
    await asyncio.gather(*tasks)
    bad.go.set()
    before = bad.asked
    assert [row.state for row in client.explain() if row.instance_id == worker.id] == ["inhibited"]
    await client.generate(None).collect()
    assert bad.asked == before
    await eventually(lambda: all(row.state == "free" for row in client.explain()))
    for _ in range(2):
        await client.generate(None).collect()
    assert bad.asked == before + 1


async def test_a_blip_of_the_only_worker_is_no_outage(cluster: Cluster) -> None:
    behaviour = Behaviour()
    worker = await cluster.worker(behaviour)
    client = await cluster.client()
    behaviour.go.clear()
    task = asyncio.ensure_future(client.generate(None).collect())
    await eventually(lambda: behaviour.running == 1)
    worker.cut()
    with pytest.raises(Disconnected):
        await task
    behaviour.go.set()
    assert await client.generate(None).collect() == ["done"]
    assert [row.state for row in client.explain()] == ["free"]


async def test_a_worker_that_is_not_there_any_more(cluster: Cluster) -> None:
    """Its record is still listed (it was killed), nobody listens at its address."""
    dead = await cluster.worker(Behaviour())
    record = dead.served.record
    await cluster.leave(dead.runtime)
    alive = Behaviour()
    await cluster.worker(alive)
    ghost = await cluster.join()
    await ghost.discovery.register(record)
    client = await cluster.client()
    await client.wait_for_instances(2, timeout=5)
    for _ in range(6):
        assert await client.generate(None).collect() == ["done"]
    assert alive.asked == 6
    assert {row.instance_id: row.state for row in client.explain()}[dead.id] == "inhibited"
