"""etcd goes, comes back, comes back empty, freezes, forgets, while requests come all the time: none of them fails, and no process ends.

Workers are processes, requests are streams of 100 items, and every item is looked at.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.loaded_site import Scale, scales, site, unharmed
from stator.testing.etcd_server import EtcdServer, etcd_cluster, etcd_server, leader_of
from stator.testing.gate import Gate
from stator.testing.plane_suite import eventually


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path) as server:
        yield server


# etcd is away


@scales
@pytest.mark.parametrize("empty", [False, True], ids=["with its data", "empty"])
async def test_etcd_stops_and_comes_back(scale: Scale, empty: bool, etcd: EtcdServer, tmp_path: Path) -> None:
    async with site(scale, etcd, directory=tmp_path) as here:
        await asyncio.to_thread(etcd.kill)
        await asyncio.sleep(scale.outage)
        assert not here.runtime.discovery.status.connected
        if empty:
            await asyncio.to_thread(etcd.wipe)
        await asyncio.to_thread(etcd.start)
        await here.settled(time.monotonic())
    unharmed(here)


@scales
async def test_etcd_stands_still(scale: Scale, etcd: EtcdServer, tmp_path: Path) -> None:
    async with site(scale, etcd, directory=tmp_path) as here:
        with _in_thread(etcd) as freeze:
            await freeze(scale.frozen)
        await here.settled(time.monotonic())
    unharmed(here)


@contextmanager
def _in_thread(etcd: EtcdServer) -> Iterator[Callable[[float], Awaitable[None]]]:
    """A way to stop the server for some seconds; whatever happens, it goes on afterwards."""
    standing = etcd.standing_still()

    async def freeze(seconds: float) -> None:
        await asyncio.to_thread(standing.__enter__)
        await asyncio.sleep(seconds)

    try:
        yield freeze
    finally:
        standing.__exit__(None, None, None)


@scales
async def test_each_member_is_killed_in_turn(scale: Scale, tmp_path: Path) -> None:
    with etcd_cluster(tmp_path) as members:
        async with site(scale, *members, directory=tmp_path) as here:
            leader = await asyncio.to_thread(leader_of, members)
            for victim in [leader, *(member for member in members if member is not leader)]:
                await asyncio.to_thread(victim.kill)
                others = [member for member in members if member is not victim]
                await asyncio.to_thread(leader_of, others)
                await asyncio.sleep(scale.outage / 3)
                await asyncio.to_thread(victim.start)
            await here.settled(time.monotonic())
        unharmed(here)


# etcd forgets


@scales
async def test_every_lease_is_revoked(scale: Scale, etcd: EtcdServer, tmp_path: Path) -> None:
    async with site(scale, etcd, directory=tmp_path) as here:
        for _ in range(3):
            revoked = await asyncio.to_thread(etcd.revoke_all)
            assert len(revoked) >= len(here.fleet.ids)
            await here.whole(time.monotonic(), within=scale.ttl)
        await here.settled(time.monotonic())
        assert not set(revoked) & set(await asyncio.to_thread(etcd.leases))
    unharmed(here)


@scales
async def test_history_is_compacted_while_the_client_is_away(scale: Scale, etcd: EtcdServer, tmp_path: Path) -> None:
    """It knows neither who came nor who left in the meantime, and reads it from what is there afterwards."""
    async with Gate(etcd.client_port) as gate, site(scale, etcd, directory=tmp_path, through=gate) as here:
        gate.shut()
        await eventually(lambda: not here.runtime.discovery.status.connected, within=5, what="the client has noticed")
        before = set(here.client.instance_ids())
        (left,) = here.fleet.workers[:1]
        assert await left.leave() == 0
        (came,) = await here.fleet.grow(1)
        for number in range(50):
            await asyncio.to_thread(etcd.put, "v1/instances-of-somebody-else", str(number).encode())
        await asyncio.to_thread(etcd.compact)
        await asyncio.sleep(scale.outage / 2)
        assert set(here.client.instance_ids()) == before, "nothing was heard"
        gate.open()
        since = time.monotonic()
        await eventually(lambda: came.id in here.client.instance_ids(), within=2 * scale.ttl, what="who came is known")
        await eventually(lambda: left.id not in here.client.instance_ids(), within=2 * scale.ttl, what="who left is not")
        await here.settled(since)
    unharmed(here)
