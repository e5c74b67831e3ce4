"""NATS goes and comes back while requests come all the time: over TCP nobody notices, over NATS they fail at once and soon no more."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.loaded_site import Scale, scales, site, unharmed
from stator.errors import StatorError
from stator.events import Subscription
from stator.testing.etcd_server import EtcdServer, etcd_server
from stator.testing.nats_server import NatsServer, nats_server
from stator.testing.numbered_worker import PULSE
from stator.testing.plane_suite import eventually

FAST = 1.0
"""seconds in which a request that cannot be sent fails"""
BACK = 2.0
"""seconds after which all is well again"""


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path) as server:
        yield server


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    with nats_server(tmp_path / "nats") as server:
        yield server


async def hear(events: Subscription, heard: list[int]) -> None:
    async for event in events:
        heard.append(json.loads(event.payload))


@scales
@pytest.mark.parametrize("plane", ["native", "compatible"])
async def test_requests_over_tcp_do_not_notice(
    scale: Scale, plane: str, etcd: EtcdServer, nats: NatsServer, tmp_path: Path
) -> None:
    """Events of every worker stop, and are back afterwards."""
    settings = {"event_plane": "nats", "nats__servers": (nats.url,), "plane": plane, "request_plane": "tcp"}
    outage = min(scale.outage, 30.0)
    async with site(scale, etcd, directory=tmp_path, **settings) as here, asyncio.TaskGroup() as group:
        heard: list[int] = []
        async with await here.runtime.events.subscribe(PULSE) as events:
            hearing = group.create_task(hear(events, heard))
            await eventually(lambda: set(heard) == here.fleet.ids, within=10, what="everybody is heard")
            await asyncio.to_thread(nats.stop)
            await asyncio.sleep(0.5)  # what was on its way is heard
            heard.clear()
            await asyncio.sleep(outage - 0.5)
            assert not heard
            await asyncio.to_thread(nats.start)
            await eventually(
                lambda: set(heard) == here.fleet.ids, within=BACK * scale.slack + 1, what="everybody is heard again"
            )
            hearing.cancel()
        here.fleet.check()
        assert set(here.client.instance_ids()) == here.fleet.ids
    unharmed(here)


@scales
async def test_requests_over_nats_fail_at_once_and_soon_no_more(
    scale: Scale, etcd: EtcdServer, nats: NatsServer, tmp_path: Path
) -> None:
    loop = asyncio.get_running_loop()
    settings = {"nats__servers": (nats.url,), "plane": "compatible", "request_plane": "nats"}
    outage = min(scale.outage, 30.0)
    async with site(scale, etcd, directory=tmp_path, **settings) as here:
        gone = loop.time()
        await asyncio.to_thread(nats.stop)
        ended = loop.time()
        await asyncio.sleep(outage)
        back = loop.time()
        await asyncio.to_thread(nats.start)
        started = loop.time()
        recovered = BACK * min(scale.slack, 2)
        await asyncio.sleep(recovered + max(2.0, outage / 4))
        here.fleet.check()
        assert set(here.client.instance_ids()) == here.fleet.ids
    load = here.load
    before = [each for each in load.begun_in(0, gone) if each.failure and each.items]
    assert not before, "what was accepted goes on without NATS"
    during = load.begun_in(ended, back)
    assert len(during) > scale.rate * outage / 2
    for each in during:
        if each.failure:
            assert isinstance(each.error, StatorError), each.failure
            assert each.error.retryable, each.failure
            assert each.took < FAST * scale.slack, f"{each.failure} took {each.took:.2f} s"
    assert sum(bool(each.failure) for each in during) > len(during) / 2
    late = [each for each in load.begun_in(started + recovered, loop.time()) if each.failure]
    assert not late, f"{len(late)} failed later than {recovered} s: {late[0].failure}"
    last = max((each.began for each in load.failures), default=started)
    slowest = max(each.took for each in during if each.failure)
    print(
        f"\nfailed within {slowest:.3f} s each; the last one began {last - started:.2f} s after NATS was back; {load.report()}"
    )
