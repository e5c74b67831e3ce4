"""The compatible TCP plane keeps the meaning of a request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from stator.tasks import DeadlineWheel, SystemClock
from stator.testing.plane_suite import PlanePair, PlaneSuite
from stator.transports.plane import PlaneHost
from stator.transports.tcp import CompatibleClient, CompatibleServer, TcpConfig


def loopback_host() -> PlaneHost:
    return PlaneHost(
        process="a" * 32,
        bind_host="127.0.0.1",
        advertise_host="127.0.0.1",
        socket_directory=None,
        wheel=DeadlineWheel(asyncio.get_running_loop()),
        clock=SystemClock(),
        random=Random(1),
        observer=None,
    )


class TestCompatiblePlane(PlaneSuite):
    max_buffered = 20_000  # the kernel's buffers on loopback
    config = TcpConfig()

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        here, there = loopback_host(), loopback_host()
        server = await CompatibleServer.listen(self.config, here)
        client = await CompatibleClient.start(self.config, there)
        try:
            yield PlanePair(
                server=server, client=client, cut=client.cut, open_streams=lambda: server.open_streams + client.open_streams
            )
        finally:
            await client.aclose()
            await server.aclose()
            assert len(here.wheel) == len(there.wheel) == 0


class TestCompatiblePlaneMsgpack(TestCompatiblePlane):
    config = TcpConfig(codec="msgpack")
