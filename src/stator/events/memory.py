"""Events inside one process: planes that share a `MemoryBus`. For tests and single-process set-ups.

Runtimes that find each other through one `MemoryStore` share the bus that hangs on it; others may be given one.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from stator.config import Config
from stator.discovery.memory import MemoryDiscovery
from stator.events.channel_plane import ChannelPlane
from stator.events.config import EventsConfig
from stator.events.host import EventHost
from stator.events.interface import Channel, Event, OnGap, Overflow
from stator.events.publisher import ChannelPublisher
from stator.events.subscription import ChannelSubscription
from stator.protocol.records import EventTransport

__all__ = ["MemoryBus", "MemoryEvents", "MemoryEventsConfig"]


class MemoryEventsConfig(Config, frozen=True, kw_only=True):
    """The memory plane has no settings of its own."""

    section: ClassVar[str] = "memory"


class MemoryBus:
    """Who speaks and who listens, by channel. All of them live on one event loop."""

    def __init__(self) -> None:
        self._readers: dict[Channel, list[ChannelSubscription]] = {}
        self._publishers: dict[Channel, set[int]] = {}

    def listen(self, reader: ChannelSubscription) -> None:
        """Give it what is sent from now on."""
        self._readers.setdefault(reader.channel, []).append(reader)

    def leave(self, reader: ChannelSubscription) -> None:
        """Give it nothing more."""
        readers = self._readers.get(reader.channel, [])
        if reader in readers:
            readers.remove(reader)
        if not readers:
            self._readers.pop(reader.channel, None)

    def enter(self, channel: Channel, publisher: int) -> None:
        """A publisher has come."""
        self._publishers.setdefault(channel, set()).add(publisher)

    def quit(self, channel: Channel, publisher: int) -> None:
        """A publisher has gone."""
        left = self._publishers.get(channel, set())
        left.discard(publisher)
        if not left:
            self._publishers.pop(channel, None)

    def publishers(self, channel: Channel) -> int:
        """How many there are now."""
        return len(self._publishers.get(channel, ()))

    def send(self, channel: Channel, event: Event) -> None:
        """To everybody who listens."""
        for reader in self._readers.get(channel, ()):
            reader.offer(event)

    @property
    def empty(self) -> bool:
        """Whether nobody speaks and nobody listens."""
        return not self._readers and not self._publishers


class MemoryEvents(ChannelPlane):
    """`stator.events.EventPlane` over a `MemoryBus`: the one given, else that of a memory discovery, else one of its own."""

    def __init__(self, config: MemoryEventsConfig, *, host: EventHost, bus: MemoryBus | None = None) -> None:
        super().__init__(host)
        if bus is None:
            discovery = host.discovery
            bus = discovery.store.shared(MemoryBus) if isinstance(discovery, MemoryDiscovery) else MemoryBus()
        self._bus = bus

    async def _open_publisher(self, channel: Channel) -> "_MemoryPublisher":
        publisher = _MemoryPublisher(channel, self._host, self._bus, forget=self._parts.discard)
        try:
            await publisher.announce(EventTransport(kind="Memory", config={}))
        except BaseException:
            await publisher.aclose()
            raise
        return publisher

    async def _open_subscription(
        self, channel: Channel, *, capacity: int | None, overflow: Overflow, on_gap: OnGap | None
    ) -> "_MemorySubscription":
        return _MemorySubscription(
            self._bus,
            channel,
            self._host.config,
            capacity=capacity,
            overflow=overflow,
            on_gap=on_gap,
            forget=self._parts.discard,
        )


class _MemoryPublisher(ChannelPublisher):
    def __init__(
        self, channel: Channel, host: EventHost, bus: MemoryBus, *, forget: Callable[[ChannelPublisher], object]
    ) -> None:
        super().__init__(channel, host, forget=forget)
        self._bus = bus
        bus.enter(channel, self._id)

    def _send(self, event: Event) -> bool:
        self._bus.send(self.channel, event)
        return True

    async def _close(self) -> None:
        self._bus.quit(self.channel, self._id)


class _MemorySubscription(ChannelSubscription):
    def __init__(self, bus: MemoryBus, channel: Channel, config: EventsConfig, **options: Any) -> None:
        super().__init__(channel, config, **options)
        self._bus = bus
        bus.listen(self)

    @property
    def publishers(self) -> int:
        return self._bus.publishers(self.channel)

    async def _close(self) -> None:
        self._bus.leave(self)
