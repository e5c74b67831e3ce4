"""The reading end over ZMQ: which publishers to hear, which messages to believe."""

import asyncio
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from stator.discovery.interface import Added, Removed
from stator.errors import ConnectFailed, PeerProtocolError
from stator.events.host import EventHost
from stator.events.interface import Channel, Event
from stator.events.subscription import ChannelSubscription
from stator.protocol.event_frame import decode_frames
from stator.protocol.records import EventChannelRecord, Query, Record
from stator.tasks import Scope

if TYPE_CHECKING:
    from stator.events.zmq_sockets import Sockets

__all__ = ["BrokerSubscription", "DirectSubscription"]

logger = logging.getLogger(__name__)

_REMEMBERED = 100_000
"""messages that a copy is recognised of, when several brokers bring each one"""


class _SocketSubscription(ChannelSubscription):
    """One SUB socket."""

    def __init__(self, sockets: "Sockets", channel: Channel, host: EventHost, **options: Any) -> None:
        super().__init__(channel, host.config, **options)
        self._topic = channel.topic.encode()
        self._limit = host.max_envelope
        self._inlet = sockets.inlet(self._topic, self._arrived)

    def _arrived(self, frames: list[bytes]) -> None:
        if frames[0] != self._topic:
            return  # ZMQ compares beginnings: this is a longer topic's
        try:
            event = decode_frames(frames, limit=self._limit)
        except PeerProtocolError as error:
            self.refuse(error)
        else:
            self._accept(event)

    def _accept(self, event: Event) -> None:
        self.offer(event)

    async def _close(self) -> None:
        self._inlet.close()


class DirectSubscription(_SocketSubscription):
    """Hears the publishers whose records are in discovery, and them alone.

    An address in a record may have passed to another process since; its messages carry another publisher's id.
    """

    def __init__(self, sockets: "Sockets", channel: Channel, host: EventHost, scope: Scope, **options: Any) -> None:
        super().__init__(sockets, channel, host, **options)
        self._discovery = host.discovery
        self._scope = scope
        self._endpoints: dict[int, str] = {}
        self._users: Counter[str] = Counter()
        self._following: asyncio.Task[None] | None = None
        self._warned: set[str] = set()

    async def start(self) -> None:
        """Begin to connect; on return what discovery knows now has been. Raises what discovery raises."""
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._following = self._scope.spawn(self._follow(started), name=f"publishers of {self.channel}")
        await started

    async def _follow(self, started: asyncio.Future[None]) -> None:
        channel = self.channel
        query = Query(EventChannelRecord.bucket, (channel.namespace, channel.component, channel.topic))
        try:
            async with self._discovery.watch(query) as watch:
                async for changes in watch:
                    for change in changes:
                        match change:
                            case Removed(key):
                                self._remove(key.id)
                            case Added(record):
                                self._add(record)
                    _settle(started)
        except Exception as error:
            if not _settle(started, error):
                raise
        finally:
            _settle(started)

    def _add(self, record: Record) -> None:
        if not isinstance(record, EventChannelRecord):
            return
        publisher, endpoint = record.instance_id, self._endpoint(record)
        if self._endpoints.get(publisher) == endpoint:
            return
        self._remove(publisher)
        if endpoint is None:
            return
        if not self._users[endpoint]:
            try:
                self._inlet.connect(endpoint)
            except ConnectFailed as error:
                logger.warning("publisher %x of event channel %s is not heard: %s", publisher, self.channel, error.message)
                return
        self._users[endpoint] += 1
        self._endpoints[publisher] = endpoint

    def _remove(self, publisher: int) -> None:
        endpoint = self._endpoints.get(publisher)
        if endpoint is None:
            return
        self._users[endpoint] -= 1
        if not self._users[endpoint]:
            del self._users[endpoint]
            self._inlet.disconnect(endpoint)  # delivers what is here, so the publisher is forgotten after it
        del self._endpoints[publisher]

    def _endpoint(self, record: EventChannelRecord) -> str | None:
        """Where the publisher listens; None if not by ZMQ."""
        transport = record.transport
        endpoint = transport.config.get("endpoint")
        if transport.kind == "Zmq" and isinstance(endpoint, str) and endpoint.startswith("tcp://"):
            return endpoint
        if transport.kind not in self._warned:
            self._warned.add(transport.kind)
            logger.warning(
                "publisher %x of event channel %s speaks %s (%r), this process listens by Zmq: its events are not heard; "
                "set the same event_plane (DYN_EVENT_PLANE) everywhere",
                record.instance_id,
                self.channel,
                transport.kind,
                transport.config,
            )
        return None

    def _accept(self, event: Event) -> None:
        if event.publisher_id in self._endpoints:
            self.offer(event)
        else:
            self.refuse(PeerProtocolError(f"publisher {event.publisher_id:x} is not the one that discovery has at its address"))

    @property
    def publishers(self) -> int:
        return len(self._endpoints)

    async def _close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        await super()._close()


class BrokerSubscription(_SocketSubscription):
    """Hears brokers. Of several, each brings every message; the first copy counts."""

    def __init__(
        self, sockets: "Sockets", channel: Channel, host: EventHost, endpoints: tuple[str, ...], **options: Any
    ) -> None:
        super().__init__(sockets, channel, host, **options)
        self._endpoints = endpoints
        self._seen: dict[tuple[int, int], None] | None = {} if len(endpoints) > 1 else None

    async def start(self) -> None:
        """Connect. Raises `ConnectFailed` for an endpoint that makes no sense."""
        for endpoint in self._endpoints:
            self._inlet.connect(endpoint)

    def _accept(self, event: Event) -> None:
        seen = self._seen
        if seen is not None:
            key = (event.publisher_id, event.sequence)
            if key in seen:
                return
            seen[key] = None
            if len(seen) > _REMEMBERED:
                del seen[next(iter(seen))]
        self.offer(event)


def _settle(future: asyncio.Future[None], error: Exception | None = None) -> bool:
    """Whether the future was still to be told."""
    if future.done():
        return False
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
    return True
