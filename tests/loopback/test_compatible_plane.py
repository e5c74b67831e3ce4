"""The compatible TCP plane keeps the meaning of a request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stator.tasks import DeadlineWheel, SystemClock
from stator.testing.plane_suite import PlanePair, PlaneSuite
from stator.transports.tcp import CompatibleClient, CompatibleServer, TcpConfig


class TestCompatiblePlane(PlaneSuite):
    max_buffered = 20_000  # the kernel's buffers on loopback
    config = TcpConfig()

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        loop = asyncio.get_running_loop()
        server_wheel, client_wheel = DeadlineWheel(loop), DeadlineWheel(loop)
        server = await CompatibleServer.listen(config=self.config, wheel=server_wheel)
        client = await CompatibleClient.start(config=self.config, wheel=client_wheel, clock=SystemClock())
        try:
            yield PlanePair(
                server=server, client=client, cut=client.cut, open_streams=lambda: server.open_streams + client.open_streams
            )
        finally:
            await client.aclose()
            await server.aclose()
            assert len(server_wheel) == len(client_wheel) == 0


class TestCompatiblePlaneMsgpack(TestCompatiblePlane):
    config = TcpConfig(codec="msgpack")
