"""Who is chosen, as callers of a real cluster see it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from random import Random
from typing import Any

import pytest

from stator.errors import ConnectFailed, UsageError
from stator.routing import Candidate, RouteRequest
from stator.runtime import Client
from stator.runtime.context import Context
from stator.testing.cluster import PLANES, Cluster
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=PLANES)
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    async with Cluster.open(request.param) as cluster:
        yield cluster


async def add_workers(cluster: Cluster, count: int) -> list[int]:
    """Workers that answer with their instance id at once, or with nothing until they are stopped; their ids, sorted."""
    for _ in range(count):
        runtime = await cluster.join()

        async def who(request: Any, context: Context, me: int = runtime.instance_id) -> AsyncIterator[Any]:
            if request == "stay":
                await context.stopped()
            yield me

        await cluster.worker(who, runtime=runtime)
    return sorted(worker.id for worker in cluster.workers)


async def asked(client: Client, count: int) -> list[int]:
    """Who answers, one request after the other."""
    return [(await client.generate("who").collect())[0] for _ in range(count)]


async def test_round_robin_takes_turns(cluster: Cluster) -> None:
    ids = await add_workers(cluster, 3)
    client = await cluster.client("round_robin")
    turns = await asked(client, 9)
    assert sorted(turns[:3]) == ids
    assert turns == turns[:3] * 3
    other = await cluster.client("round_robin", runtime=cluster.runtimes[-1])
    assert [turns[0]] == await asked(other, 1)  # each client has turns of its own


async def test_random_reaches_everybody(cluster: Cluster) -> None:
    ids = await add_workers(cluster, 3)
    client = await cluster.client("random")
    seen = Counter(await asked(client, 90))
    assert sorted(seen) == ids
    assert min(seen.values()) >= 10  # 30 expected; the chance of less is 1 in 10⁶


async def test_direct_never_goes_elsewhere(cluster: Cluster) -> None:
    ids = await add_workers(cluster, 3)
    client = await cluster.client("round_robin")
    for target in ids:
        for _ in range(3):
            assert await client.direct("who", target).collect() == [target]
    gone = cluster.workers[0]
    await cluster.leave(gone.runtime)
    await eventually(lambda: gone.id not in client.instance_ids())
    with pytest.raises(ConnectFailed) as caught:
        await client.direct("who", gone.id).collect()
    assert caught.value.instance == gone.id
    named = await cluster.client("direct")
    with pytest.raises(UsageError, match="direct"):
        await named.generate("who").collect()
    assert await named.direct("who", cluster.workers[0].id).collect() == [cluster.workers[0].id]


@pytest.mark.parametrize("policy", ["least_loaded", "power_of_two"])
async def test_loads_are_shared_by_the_clients_of_a_process(cluster: Cluster, policy: str) -> None:
    ids = await add_workers(cluster, 2)
    caller = await cluster.join()
    first = await cluster.client("round_robin", runtime=caller)
    second = await cluster.client(policy, runtime=caller)
    busy = [first.direct("stay", ids[0]) for _ in range(3)]
    for stream in busy:
        await stream.__aenter__()
    assert {row.instance_id: row.load for row in second.explain()} == {ids[0]: 3, ids[1]: 0}
    assert set(await asked(second, 10)) == {ids[1]}
    elsewhere = await cluster.client("least_loaded")
    assert set(await asked(elsewhere, 30)) == set(ids)  # another process knows its own requests only
    for stream in busy:
        stream.stop()
        assert await stream.collect() == [ids[0]]
    assert {row.load for row in second.explain()} == {0}


async def test_least_loaded_spreads_what_runs_at_once(cluster: Cluster) -> None:
    ids = await add_workers(cluster, 3)
    client = await cluster.client("least_loaded")
    streams = [client.generate("stay") for _ in range(12)]
    for stream in streams:
        await stream.__aenter__()
    assert Counter(stream.instance_id for stream in streams) == dict.fromkeys(ids, 4)
    async with asyncio.TaskGroup() as group:
        for stream in streams:
            stream.stop()
            group.create_task(stream.collect())


async def test_a_policy_of_ones_own(cluster: Cluster) -> None:
    ids = await add_workers(cluster, 3)

    class Highest:
        name = "highest"
        needs_load = False

        def choose(self, free: Sequence[Candidate], request: RouteRequest, random: Random) -> Candidate:
            return max(free, key=lambda candidate: candidate.instance_id)

    client = await cluster.client(Highest())
    assert set(await asked(client, 5)) == {ids[-1]}
    assert client.policy.name == "highest"


async def test_one_client_may_choose_differently_per_call(cluster: Cluster) -> None:
    ids = await add_workers(cluster, 2)
    client = await cluster.client("random")
    turns = [(await client.round_robin("who").collect())[0] for _ in range(4)]
    assert turns == turns[:2] * 2
    assert sorted(turns[:2]) == ids
    assert {(await client.random("who").collect())[0] for _ in range(40)} == set(ids)


async def test_policies_by_name() -> None:
    async with Cluster.open("memory", routing__policy="power-of-two") as cluster:
        await add_workers(cluster, 1)
        runtime = await cluster.join()
        assert (await runtime.endpoint("test.backend.generate").client()).policy.name == "power_of_two"
        assert (await runtime.endpoint("test.backend.generate").client("p2c")).policy.name == "power_of_two"
        with pytest.raises(UsageError, match="did you mean 'round_robin'"):
            await runtime.endpoint("test.backend.generate").client("round_rubin")
