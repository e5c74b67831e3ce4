"""The sending end of a channel: what every plane's publishers share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Self

from stator.errors import UsageError
from stator.events.host import EventHost
from stator.events.interface import Channel, Event, PublisherStatistics
from stator.protocol.records import EventChannelRecord, EventTransport

__all__ = ["ChannelPublisher"]


class ChannelPublisher(ABC):
    """Identity, sequence, counters and the record in discovery. A plane's publishers add how a message leaves (`_send`)."""

    def __init__(self, channel: Channel, host: EventHost, *, forget: "Callable[[ChannelPublisher], object]") -> None:
        """`forget` is called once, when the publisher is closed."""
        self.channel = channel
        self._forget = forget
        self._host = host
        self._id = host.random.getrandbits(63)
        self._topic = channel.topic
        self._wall = host.clock.wall
        self._max_payload = host.config.max_payload
        self._record: EventChannelRecord | None = None
        self.queued = 0
        """messages that have not left yet"""
        self._published = 0
        self._dropped = 0
        self._closed = False

    @property
    def publisher_id(self) -> int:
        """Random, 63 bits: API servers of Kubernetes round whole numbers beyond that."""
        return self._id

    async def announce(self, transport: EventTransport) -> None:
        """Put the record into discovery, until the publisher is closed. Raises what discovery raises."""
        channel = self.channel
        self._record = record = EventChannelRecord(
            namespace=channel.namespace,
            component=channel.component,
            topic=channel.topic,
            instance_id=self._id,
            transport=transport,
        )
        await self._host.discovery.register(record)

    def publish(self, payload: bytes) -> None:
        """See `EventPublisher.publish`."""
        if len(payload) > self._max_payload:
            raise UsageError(
                f"a message of {len(payload)} bytes on event channel {self.channel}, more than the {self._max_payload} allowed; "
                "send less at once, or raise events.max_payload here and at the readers"
            )
        event = Event(
            publisher_id=self._id,
            sequence=self._published,
            published_at=int(self._wall() * 1000),
            topic=self._topic,
            payload=payload,
        )
        self._published += 1
        if self._closed or not self._send(event):
            self._dropped += 1

    @abstractmethod
    def _send(self, event: Event) -> bool:
        """Let one message leave, or queue it; False: it was dropped. Never blocks, never raises."""

    @abstractmethod
    async def _close(self) -> None:
        """Let go of what the messages leave by; called once, after the record is gone."""

    def statistics(self) -> PublisherStatistics:
        """What happened so far."""
        return PublisherStatistics(published=self._published, dropped=self._dropped, queued=self.queued)

    async def aclose(self) -> None:
        """Idempotent. What is queued may be lost."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._record is not None:
                await self._host.discovery.unregister(self._record.key)
        finally:
            try:
                await self._close()
            finally:
                self._forget(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
