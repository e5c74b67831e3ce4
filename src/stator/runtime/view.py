"""The instances of one endpoint, as this process knows them: who is there, who may be chosen, who carries how much."""

import asyncio
import logging
from collections.abc import Callable, Mapping

from stator.discovery.interface import Discovery
from stator.errors import Unavailable
from stator.protocol.ids import EndpointId
from stator.protocol.records import EndpointRecord, Query
from stator.routing import Availability, Candidate, Occupancy, RoutingConfig

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
        self._routing = routing
        self._slots: Mapping[int, int] = {}
        self._candidates: tuple[Candidate, ...] = ()
        self._watchers: dict[object, Callable[[], None]] = {}
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
        self._candidates = self.occupancy.update({instance: record.device_type or "" for instance, record in records.items()})
        self._set_limits()
        self.availability.update(self._candidates)
        for record in gone:
            self.availability.forget(record.instance_id)
            self._forget(record)
        self.synced.set()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self.more_room()

    # -- how much each may carry

    def set_slots(self, slots: Mapping[int, int]) -> None:
        """How many requests each instance says it runs at once; those not in it take any number. `routing.slots_factor` scales it."""
        if slots != self._slots:
            self._slots = dict(slots)
            self._set_limits()
            self.more_room()

    def watch_room(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` whenever there may be more room: a request ended at an instance with a limit, an instance came, or is no
        longer busy. Returns what ends it, which may be called twice.
        """
        token = object()
        self._watchers[token] = callback
        self.occupancy.on_room = self.more_room

        def end() -> None:
            self._watchers.pop(token, None)
            if not self._watchers:
                self.occupancy.on_room = None

        return end

    def more_room(self) -> None:
        """Tell those who watch. What one of them raises is logged."""
        for callback in tuple(self._watchers.values()):
            try:
                callback()
            except Exception:
                logger.exception("somebody who waits for room at %s failed", self.endpoint)

    def _set_limits(self) -> None:
        for candidate in self._candidates:
            candidate.limit = self._routing.limit_of(self._slots.get(candidate.instance_id))

    # -- waiting

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
