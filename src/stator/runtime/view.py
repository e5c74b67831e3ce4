"""The instances of one endpoint, as this process knows them: who is there, who may be chosen, who carries how much."""

import asyncio
import logging
from collections.abc import Callable

from stator.discovery.interface import Discovery
from stator.errors import Unavailable
from stator.protocol.ids import EndpointId
from stator.protocol.records import EndpointRecord, Query
from stator.routing import Availability, Occupancy, RoutingConfig

__all__ = ["InstanceView"]

logger = logging.getLogger(__name__)


class InstanceView:
    """Follows discovery for one endpoint. Shared by all clients of the endpoint in the process."""

    def __init__(
        self,
        endpoint: EndpointId,
        routing: RoutingConfig,
        now: Callable[[], float],
        forget: Callable[[EndpointRecord], None],
    ) -> None:
        self.endpoint = endpoint
        self.records: dict[int, EndpointRecord] = {}
        self.availability = Availability(endpoint, routing)
        self.occupancy = Occupancy()
        self.now = now
        self.synced = asyncio.Event()
        """set once the first snapshot was seen"""
        self._forget = forget
        self._changed = asyncio.Event()

    async def follow(self, discovery: Discovery) -> None:
        """Keep up with discovery until cancelled or discovery is closed."""
        async with discovery.watch(Query(EndpointRecord.bucket, self.endpoint.segments)) as watch:
            async for _ in watch:
                self.update({key.id: record for key, record in watch.current.items() if isinstance(record, EndpointRecord)})

    def update(self, records: dict[int, EndpointRecord]) -> None:
        """These are all instances now. One whose record changed is another process under the same id: it starts anew."""
        gone = [record for instance, record in self.records.items() if records.get(instance) != record]
        self.records = records
        self.availability.update(
            self.occupancy.update({instance: record.device_type or "" for instance, record in records.items()})
        )
        for record in gone:
            self.availability.forget(record.instance_id)
            self._forget(record)
        self.synced.set()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_for(self, count: int, timeout: float | None) -> list[int]:
        """Wait until `count` instances are listed; their ids, sorted. Raises `Unavailable` after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while len(self.records) < count:
                    await self._changed.wait()
        except TimeoutError:
            text = f"{len(self.records)} of {count} instances of {self.endpoint} appeared within {timeout} s"
            raise Unavailable(text) from None
        return sorted(self.records)
