"""Both sides of a plane in one loop, on the loopback interface: what their hosts are, and that nothing of them is left."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Protocol

from stator.config import Secret
from stator.security import Tls
from stator.tasks import DeadlineWheel, SystemClock
from stator.testing.native_pair import WORKER_PROCESS
from stator.testing.plane_suite import PlanePair
from stator.transports.plane import InstanceObserver, PlaneClient, PlaneHost, PlaneServer

__all__ = ["paired", "plane_host"]


def plane_host(
    process: str = WORKER_PROCESS,
    *,
    directory: Path | None = None,
    observer: InstanceObserver | None = None,
    wheel: DeadlineWheel | None = None,
    resolution: float = 0.1,
    tls: Tls | None = None,
    secret: str = "",
    overrides: Mapping[str, object] | None = None,
) -> PlaneHost:
    """What a process on the loopback interface gives to its planes. `resolution` (seconds) is that of its wheel, unless it has one."""
    return PlaneHost(
        process=process,
        bind_host="127.0.0.1",
        advertise_host="127.0.0.1",
        socket_directory=directory,
        wheel=wheel or DeadlineWheel(asyncio.get_running_loop(), resolution=resolution),
        clock=SystemClock(),
        random=Random(1),
        observer=observer,
        tls=tls,
        secret=Secret(secret) if secret else None,
        overrides=overrides or {},
    )


class _Server(PlaneServer, Protocol):
    @property
    def open_streams(self) -> int: ...


class _Client(PlaneClient, Protocol):
    @property
    def open_streams(self) -> int: ...


@asynccontextmanager
async def paired(
    server: _Server, client: _Client, *, cut: Callable[[], None], hosts: tuple[PlaneHost, ...] = ()
) -> AsyncGenerator[PlanePair]:
    """Both sides, closed in the end; then nothing may be left on the wheels of `hosts`."""
    try:
        yield PlanePair(server=server, client=client, cut=cut, open_streams=lambda: server.open_streams + client.open_streams)
    finally:
        await client.aclose()
        await server.aclose()
        assert not any(len(host.wheel) for host in hosts)
