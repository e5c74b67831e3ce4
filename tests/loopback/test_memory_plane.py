"""The in-memory plane keeps the meaning of a request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from stator.testing.plane_suite import PlanePair, PlaneSuite
from stator.transports.memory import MemoryNetwork, MemoryPlane


class TestMemoryPlane(PlaneSuite):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        network = MemoryNetwork()
        server, client = MemoryPlane(network), MemoryPlane(network)
        try:
            yield PlanePair(
                server=server, client=client, cut=server.cut, open_streams=lambda: len(server.served) + len(client.opened)
            )
        finally:
            await client.aclose()
            await server.aclose()
