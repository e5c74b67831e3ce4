"""A worker is killed under load: the broken connection is the first evidence, whatever its lease in etcd says."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.loaded_site import Scale, Site, scales, site
from stator.errors import Disconnected
from stator.testing.etcd_server import EtcdServer, etcd_server
from stator.testing.plane_suite import eventually
from stator.testing.worker_fleet import FleetWorker


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path) as server:
        yield server


@scales
@pytest.mark.parametrize("away", [False, True], ids=["with etcd", "while etcd is away"])
async def test_a_killed_worker_gets_no_request(scale: Scale, away: bool, etcd: EtcdServer, tmp_path: Path) -> None:
    """Whatever its lease says: the broken connection is the first evidence. Its record goes when the lease ends."""
    async with site(scale, etcd, directory=tmp_path) as here:
        if away:
            await asyncio.to_thread(etcd.kill)
            await eventually(lambda: not here.runtime.discovery.status.connected, what="the client has noticed")
        victim = here.fleet.workers[0]
        asked, evidence = await _kill(here, victim)
        if away:
            assert victim.id in here.client.instance_ids(), "nobody can tell"
            await asyncio.to_thread(etcd.start)
        await here.settled(time.monotonic())
    lost = here.load.failures
    assert {each.instance for each in lost} <= {victim.id}
    assert all(isinstance(each.error, Disconnected) and each.items for each in lost), here.load.report()
    assert asked - evidence < scale.notice, f"asked {asked - evidence:.3f} s after it was evident"
    print(f"the last request went there {1000 * (asked - evidence):.0f} ms after the first of {len(lost)} streams broke")


async def _kill(here: Site, victim: FleetWorker) -> tuple[float, float]:
    """Kill it under load; when it was chosen last (event loop's time), and when the first of its streams broke."""
    loop = asyncio.get_running_loop()
    streams = [here.client.direct({"n": 10_000, "pause": 0.01}, victim.id) for _ in range(10)]
    broke: list[float] = []

    async def read(number: int) -> None:
        with pytest.raises(Disconnected):
            await streams[number].collect()
        broke.append(loop.time())

    async with asyncio.TaskGroup() as group:
        for number in range(len(streams)):
            group.create_task(read(number))
        await eventually(lambda: all(stream.instance_id for stream in streams), what="they are on their way")
        await asyncio.sleep(0.2)  # and have some items
        victim.kill()
    chosen = broke[0]
    deadline = loop.time() + max(1.0, 3 * here.scale.notice)
    while loop.time() < deadline:
        if any(row.instance_id == victim.id and row.state == "free" for row in here.client.explain()):
            chosen = loop.time()
        await asyncio.sleep(0.001)
    return chosen, broke[0]
