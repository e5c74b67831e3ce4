"""Events over NATS core: the subject is the channel's, a message is the bare envelope (`spec/40 §1.5`)."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stator.errors import PeerProtocolError, UsageError
from stator.events.channel_plane import ChannelPlane
from stator.events.host import EventHost
from stator.events.interface import Channel, Event, OnGap, Overflow
from stator.events.publisher import ChannelPublisher
from stator.events.subscription import ChannelSubscription
from stator.protocol.event_frame import decode_envelope, encode_envelope
from stator.protocol.records import EventTransport
from stator.transports.nats.config import NatsConfig
from stator.transports.nats.wire import Message, is_subject

if TYPE_CHECKING:
    from stator.events.nats_outbox import NatsOutbox
    from stator.transports.nats.connection import Listening, NatsConnection

__all__ = ["NatsConfig", "NatsEvents"]

_MEANWHILE = "events wait until it is back, and the oldest are dropped when too many do"


class NatsEvents(ChannelPlane):
    """`stator.events.EventPlane` over NATS. The library is loaded and the servers are connected to at first use."""

    def __init__(self, config: NatsConfig, *, host: EventHost) -> None:
        super().__init__(host)
        self._config = config
        self._link: tuple[NatsConnection, NatsOutbox] | None = None

    async def _open_publisher(self, channel: Channel) -> "_NatsPublisher":
        _check_subject(channel)
        _, outbox = await self._ready()
        publisher = _NatsPublisher(channel, self._host, outbox, forget=self._parts.discard)
        try:
            await publisher.announce(EventTransport(kind="Nats", config={"subject_prefix": channel.prefix}))
        except BaseException:
            await publisher.aclose()
            raise
        return publisher

    async def _open_subscription(
        self, channel: Channel, *, capacity: int | None, overflow: Overflow, on_gap: OnGap | None
    ) -> "_NatsSubscription":
        _check_subject(channel)
        connection, _ = await self._ready()
        subscription = _NatsSubscription(
            connection,
            channel,
            self._host,
            capacity=capacity,
            overflow=overflow,
            on_gap=on_gap,
            forget=self._parts.discard,
        )
        try:
            await subscription.start()
        except BaseException:
            await subscription.aclose()
            raise
        return subscription

    @property
    def subjects(self) -> list[str]:
        """What is listened to."""
        return [] if self._link is None else self._link[0].subjects

    async def _ready(self) -> "tuple[NatsConnection, NatsOutbox]":
        if self._link is None:
            connect, send = await asyncio.to_thread(_load)
            connection = connect(self._config, random=self._host.random, name="stator events", meanwhile=_MEANWHILE)
            try:
                await connection.start()
            except BaseException:
                await connection.aclose()
                raise
            self._link = connection, send(self._config, connection)
        return self._link

    async def _close(self) -> None:
        if self._link is not None:
            connection, outbox = self._link
            await outbox.aclose()
            await connection.aclose()


class _NatsPublisher(ChannelPublisher):
    def __init__(
        self, channel: Channel, host: EventHost, outbox: "NatsOutbox", *, forget: Callable[[ChannelPublisher], object]
    ) -> None:
        super().__init__(channel, host, forget=forget)
        self._outbox = outbox
        self._subject = channel.subject

    def _send(self, event: Event) -> bool:
        self._outbox.send(self, self._subject, encode_envelope(event))
        return True

    def lost(self) -> None:
        """A message that waited was dropped."""
        self._dropped += 1

    async def _close(self) -> None:
        """What waits leaves with the connection."""


class _NatsSubscription(ChannelSubscription):
    def __init__(self, connection: "NatsConnection", channel: Channel, host: EventHost, **options: Any) -> None:
        super().__init__(channel, host.config, **options)
        self._connection = connection
        self._limit = host.max_envelope
        self._listening: Listening | None = None

    async def start(self) -> None:
        """Begin to listen."""
        self._listening = self._connection.listen(self.channel.subject, self._arrived)
        await self._connection.settled()

    def _arrived(self, message: Message) -> None:
        try:
            event = decode_envelope(message.body, limit=self._limit)
            if event.topic != self.channel.topic:
                raise PeerProtocolError(f"it names the topic {event.topic[:100]!r}")
        except PeerProtocolError as error:
            self.refuse(error)
        else:
            self.offer(event)

    async def _close(self) -> None:
        if self._listening is not None:
            self._connection.leave(self._listening)


def _load() -> "tuple[type[NatsConnection], type[NatsOutbox]]":
    """Reads the disk, not for the event loop."""
    from stator.events.nats_outbox import NatsOutbox
    from stator.transports.nats.connection import NatsConnection

    return NatsConnection, NatsOutbox


def _check_subject(channel: Channel) -> None:
    if not is_subject(channel.subject):
        raise UsageError(
            f"{channel.subject!r} is no NATS subject: no blanks, no '*', no '>', no empty part between dots, not above 1024 bytes"
        )
