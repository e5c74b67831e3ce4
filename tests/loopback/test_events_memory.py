"""The memory plane is an event plane."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from stator.discovery.memory import MemoryStore
from stator.events import MemoryBus, MemoryEvents, MemoryEventsConfig
from stator.testing.event_suite import LOAD, EventSuite, Join, link, member, silence, take

pytestmark = pytest.mark.timeout(30)


class TestMemoryEvents(EventSuite):
    kind = "Memory"
    counts_publishers = True

    @asynccontextmanager
    async def cluster(self) -> AsyncGenerator[Join, None]:
        store = MemoryStore()
        yield lambda config: member(store, lambda host: MemoryEvents(MemoryEventsConfig(), host=host), config)
        assert store.shared(MemoryBus).empty


async def test_a_bus_connects_who_is_given_it_and_nobody_else() -> None:
    bus = MemoryBus()
    async with (
        member(MemoryStore(), lambda host: MemoryEvents(MemoryEventsConfig(), host=host, bus=bus)) as one,
        member(MemoryStore(), lambda host: MemoryEvents(MemoryEventsConfig(), host=host, bus=bus)) as other,
        member(MemoryStore(), lambda host: MemoryEvents(MemoryEventsConfig(), host=host)) as stranger,
    ):
        publisher = await one.plane.publisher(LOAD)
        heard, deaf = await other.plane.subscribe(LOAD), await stranger.plane.subscribe(LOAD)
        await link(publisher, heard)
        publisher.publish(b"hello")
        assert [event.payload for event in await take(heard, 1)] == [b"hello"]
        await silence(deaf, seconds=0.05)
    assert bus.empty
