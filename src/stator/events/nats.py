"""Events over NATS core: the subject is the channel's, a message is the bare envelope (`spec/40 §1.5`)."""

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stator.errors import PeerProtocolError, UsageError
from stator.events.channel_plane import ChannelPlane
from stator.events.host import EventHost
from stator.events.interface import Channel, Event, OnGap, Overflow
from stator.events.nats_config import NatsConfig
from stator.events.publisher import ChannelPublisher
from stator.events.subscription import ChannelSubscription
from stator.protocol.event_frame import decode_envelope, encode_envelope
from stator.protocol.records import EventTransport
from stator.tasks import Scope

if TYPE_CHECKING:
    from stator.events.nats_link import NatsLink

__all__ = ["NatsConfig", "NatsEvents"]

_SUBJECT = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")


class NatsEvents(ChannelPlane):
    """`stator.events.EventPlane` over NATS. The library is loaded and the servers are connected to at first use."""

    def __init__(self, config: NatsConfig, *, host: EventHost) -> None:
        super().__init__(host)
        self._config = config
        self._scope = Scope("nats events")
        self._link: NatsLink | None = None

    async def _open_publisher(self, channel: Channel) -> "_NatsPublisher":
        _check_subject(channel)
        publisher = _NatsPublisher(channel, self._host, await self._ready(), forget=self._parts.discard)
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
        subscription = _NatsSubscription(
            await self._ready(),
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
        return [] if self._link is None else self._link.subjects

    async def _ready(self) -> "NatsLink":
        if self._link is None:
            make = await asyncio.to_thread(_load)
            self._link = make(self._config, random=self._host.random, scope=self._scope)
            await self._link.start()
        return self._link

    async def _close(self) -> None:
        if self._link is not None:
            await self._link.aclose()
        await self._scope.aclose()


class _NatsPublisher(ChannelPublisher):
    def __init__(
        self, channel: Channel, host: EventHost, link: "NatsLink", *, forget: Callable[[ChannelPublisher], object]
    ) -> None:
        super().__init__(channel, host, forget=forget)
        self._link = link
        self._subject = channel.subject

    def _send(self, event: Event) -> bool:
        self._link.send(self, self._subject, encode_envelope(event))
        return True

    def lost(self) -> None:
        """A message that waited was dropped."""
        self._dropped += 1

    async def _close(self) -> None:
        """What waits leaves with the connection."""


class _NatsSubscription(ChannelSubscription):
    def __init__(self, link: "NatsLink", channel: Channel, host: EventHost, **options: Any) -> None:
        super().__init__(channel, host.config, **options)
        self._link = link
        self._limit = host.max_envelope
        self._listening: Any = None

    async def start(self) -> None:
        """Begin to listen."""
        self._listening = await self._link.listen(self.channel.subject, self._arrived)

    def _arrived(self, body: bytes) -> None:
        try:
            event = decode_envelope(body, limit=self._limit)
            if event.topic != self.channel.topic:
                raise PeerProtocolError(f"it names the topic {event.topic[:100]!r}")
        except PeerProtocolError as error:
            self.refuse(error)
        else:
            self.offer(event)

    async def _close(self) -> None:
        if self._listening is not None:
            await self._link.leave(self._listening)


def _load() -> "type[NatsLink]":
    """Reads the disk, not for the event loop."""
    from stator.events.nats_link import NatsLink

    return NatsLink


def _check_subject(channel: Channel) -> None:
    if not _SUBJECT.fullmatch(channel.subject):
        raise UsageError(f"{channel.subject!r} is no NATS subject: no blanks, no '*', no '>', no empty part between dots")
