"""Worker processes that meet in etcd, a client, and constant load between them: what is done to the control planes is seen by nobody.

Each case takes place twice (`scales`): with outages of 3 s and 30 requests/s in `make test`, in full in `make soak`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stator.protocol.ids import format_instance_id
from stator.runtime import Client, Runtime
from stator.testing.cluster import ENDPOINT, held_by, open_files, tasks_now
from stator.testing.etcd_server import EtcdServer
from stator.testing.gate import Gate
from stator.testing.plane_suite import eventually
from stator.testing.steady_load import SteadyLoad
from stator.testing.worker_fleet import WorkerFleet


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """How long, how many, how strict. Times in seconds."""

    outage: float
    frozen: float
    rate: float
    ttl: int
    notice: float
    """from the first evidence of a death to the last request that goes there"""
    slack: float
    """times as long as promised may be taken; above 1 where other tests run beside it"""
    etcd: dict[str, Any] = {}

    @property
    def settings(self) -> dict[str, Any]:
        return {"etcd__lease_ttl": self.ttl, **self.etcd}


QUICK = {"etcd__request_timeout": 0.5, "etcd__answer_timeout": 1.0, "etcd__reconnect_most": 0.3}
SMALL = Scale(outage=3.0, frozen=3.0, rate=30, ttl=2, notice=0.5, slack=5, etcd=QUICK)
FULL = Scale(outage=60.0, frozen=20.0, rate=200, ttl=10, notice=0.1, slack=1)
scales = pytest.mark.parametrize(
    "scale",
    [
        pytest.param(SMALL, id="small", marks=pytest.mark.timeout(90)),
        pytest.param(FULL, id="full", marks=[pytest.mark.soak, pytest.mark.timeout(600)]),
    ],
)


def urls(*servers: EtcdServer) -> str:
    return "etcd://" + ",".join(f"127.0.0.1:{server.client_port}" for server in servers)


class Site:
    """Workers, a client, and the load between them."""

    def __init__(
        self, scale: Scale, server: EtcdServer, fleet: WorkerFleet, runtime: Runtime, client: Client, load: SteadyLoad
    ) -> None:
        self.scale = scale
        self.fleet = fleet
        self.runtime = runtime
        self.client = client
        self.load = load
        self._server = server

    def listed(self) -> set[str]:
        """The instances that etcd has, as it calls them."""
        return {key.rpartition("/")[2] for key in self._server.keys("v1/instances/")}

    async def whole(self, since: float, *, within: float) -> float:
        """Wait until etcd lists all workers and nobody else, at most `within` seconds after `since`; how long it took from there."""
        wanted = {format_instance_id(instance) for instance in self.fleet.ids}
        while (found := await asyncio.to_thread(self.listed)) != wanted:
            assert time.monotonic() - since < within, f"etcd lists {found}, and there are {wanted}"
            await asyncio.sleep(0.05)
        return time.monotonic() - since

    async def settled(self, since: float) -> None:
        """Everything is as it was before: in etcd, with the client, and it stays so for a TTL."""
        ttl = self.scale.ttl
        took = await self.whole(since, within=2 * ttl)
        await asyncio.sleep(ttl + 0.5)
        await self.whole(time.monotonic(), within=0.5)
        assert set(self.client.instance_ids()) == self.fleet.ids
        assert self.runtime.discovery.status.connected
        self.fleet.check()
        print(f"\nlisted again after {took:.2f} s; {self.load.report()}")


@asynccontextmanager
async def site(
    scale: Scale, *servers: EtcdServer, directory: Path, through: Gate | None = None, workers: int = 3, **settings: Any
) -> AsyncGenerator[Site, None]:
    """Load from the beginning to the end of the block, and no request of it fails. With `through`, the client goes to etcd by a gate."""
    tasks, files = tasks_now(), len(open_files())
    directory.chmod(0o700)
    common = {**scale.settings, **settings}
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(WorkerFleet.open({"discovery": urls(*servers), **common}, directory=directory))
        runtime = await stack.enter_async_context(
            Runtime.connect(discovery=f"etcd://127.0.0.1:{through.port}" if through else urls(*servers), **common)
        )
        client = await runtime.endpoint(ENDPOINT).client()
        await fleet.grow(workers)
        await client.wait_for_instances(workers)
        async with SteadyLoad(client, rate=scale.rate).running() as load:
            here = Site(scale, servers[0], fleet, runtime, client, load)
            await eventually(lambda: len(load.requests) > scale.rate, within=20, what="the load is on")
            yield here
        assert len(load.requests) > scale.rate * 3
        await eventually(lambda: not held_by(runtime), within=10, what="the client holds nothing")
    await eventually(lambda: tasks_now() == tasks, what="no task is left")
    await eventually(lambda: len(open_files()) <= files, what="no file is left open")


def unharmed(here: Site) -> None:
    """No request has failed."""
    assert not here.load.failures, here.load.report()
