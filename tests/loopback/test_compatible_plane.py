"""The compatible TCP plane keeps the meaning of a request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stator.testing.plane_pair import paired, plane_host
from stator.testing.plane_suite import PlanePair, PlaneSuite
from stator.transports.tcp import CompatibleClient, CompatibleServer, TcpConfig


class TestCompatiblePlane(PlaneSuite):
    max_buffered = 20_000  # the kernel's buffers on loopback
    config = TcpConfig()

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        here, there = plane_host(), plane_host()
        server = await CompatibleServer.listen(self.config, here)
        client = await CompatibleClient.start(self.config, there)
        async with paired(server, client, cut=client.cut, hosts=(here, there)) as pair:
            yield pair


class TestCompatiblePlaneMsgpack(TestCompatiblePlane):
    config = TcpConfig(codec="msgpack")
