"""The memory backend is a discovery."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from stator.discovery import MemoryStore, open_memory
from stator.discovery.memory import MemoryDiscovery, MemoryDiscoveryConfig
from stator.protocol.records import EndpointRecord, Query
from stator.tasks import SystemClock
from stator.testing.discovery_suite import Connect, DiscoverySuite, endpoint_record


class TestMemoryDiscovery(DiscoverySuite):
    @asynccontextmanager
    async def cluster(self) -> AsyncIterator[Connect]:
        store = MemoryStore()
        yield lambda: MemoryDiscovery(store, clock=SystemClock(), random=Random())


async def test_without_a_shared_store_everybody_is_alone() -> None:
    async with (
        open_memory(MemoryDiscoveryConfig(), clock=SystemClock(), random=Random()) as one,
        open_memory(MemoryDiscoveryConfig(), clock=SystemClock(), random=Random()) as other,
    ):
        await one.register(endpoint_record(1))
        assert await other.list(Query(EndpointRecord.bucket)) == []


def test_the_instance_id_comes_from_the_random_source_handed_in() -> None:
    first, second = (open_memory(MemoryDiscoveryConfig(), clock=SystemClock(), random=Random(7)) for _ in range(2))
    assert first.instance_id == second.instance_id == Random(7).getrandbits(64)
