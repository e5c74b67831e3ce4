"""The event plane: small messages by topic, to everybody who listens now (`spec/40 §1`).

Nothing is kept and nothing is promised: who connects late misses what was before, a full queue drops. A gap in a publisher's sequence
says so.
"""

from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Literal, Protocol, Self

import msgspec

from stator.errors import UsageError
from stator.protocol.event_frame import Event

__all__ = [
    "Channel",
    "Event",
    "EventPlane",
    "EventPublisher",
    "Gap",
    "OnGap",
    "Overflow",
    "PublisherStatistics",
    "Subscription",
    "SubscriptionStatistics",
]


class Channel(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """A topic in its scope: of one component, or of the whole namespace when `component` is empty."""

    namespace: str
    component: str = ""
    topic: str

    def __post_init__(self) -> None:
        if not self.namespace or not self.topic:
            raise UsageError(f"an event channel needs a namespace and a topic, got {self.namespace!r} and {self.topic!r}")
        for name in (self.namespace, self.component, self.topic):
            if "/" in name or not name.isprintable():
                raise UsageError(f"name {name!r} of an event channel has a slash or a character that cannot be printed")

    @property
    def prefix(self) -> str:
        """What NATS subjects of the scope begin with."""
        scope = f"namespace.{self.namespace}"
        return f"{scope}.component.{self.component}" if self.component else scope

    @property
    def subject(self) -> str:
        """The subject on a broker."""
        return f"{self.prefix}.{self.topic}"

    def __str__(self) -> str:
        return self.subject


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Messages of one publisher that the reader does not get: `expected` … `found - 1`. Lost on the way, or dropped by a full queue.

    The first message heard of a publisher is no gap, whatever its number: what was before it was never promised. A number below the
    expected one is a restart or a repetition: it is delivered and not reported, and counting goes on from there.
    """

    publisher_id: int
    expected: int
    found: int


OnGap = Callable[[Gap], None]
Overflow = Literal["drop_oldest", "drop_newest"]
"""what a full queue does"""


class PublisherStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Since the publisher was made."""

    published: int
    """calls of `publish`"""
    dropped: int
    """of these: known never to have left this process, because the queue was full, the broker away or the publisher closed"""
    queued: int
    """waiting for the broker"""


class SubscriptionStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Since the subscription was made."""

    received: int
    """messages of the channel that arrived, those dropped by a full queue included"""
    dropped: int
    """of these: not delivered, because the queue was full"""
    malformed: int
    """messages that could not be read, or came from a publisher that discovery does not know"""
    gaps: int
    """calls of `on_gap`, or what they would be"""
    queued: int
    """waiting for the reader"""
    publishers: int
    """connected to now; over a broker: heard of so far"""


class EventPublisher(Protocol):
    """Publishes on one channel; made by `EventPlane.publisher`. An async context manager; closing takes the record out of discovery."""

    @property
    def publisher_id(self) -> int:
        """Random, 64 bits, new with each publisher; not the worker's id."""
        ...

    def publish(self, payload: bytes) -> None:
        """Hand over one message. Never blocks and never raises for what the network does; dropped messages are counted.

        Called in the event loop's thread. A sequence number is used up by a dropped message, so that readers see the gap. Once closed,
        everything is dropped. Raises `UsageError` for a payload above the setting `events.max_payload`.
        """
        ...

    def statistics(self) -> PublisherStatistics: ...

    async def aclose(self) -> None:
        """Idempotent. What is queued may be lost."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Subscription(Protocol):
    """What arrives on one channel, from all its publishers, those that come later included. Iterate in one task.

    Messages of one publisher are in order. Cancelling a wait loses nothing. The iteration ends when the subscription is closed.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def __anext__(self) -> Event: ...

    def statistics(self) -> SubscriptionStatistics: ...

    async def aclose(self) -> None:
        """Idempotent."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class EventPlane(Protocol):
    """One way events travel. Closing it closes its publishers and subscriptions."""

    async def publisher(self, channel: Channel) -> EventPublisher:
        """On return the publisher is in discovery (`v1/event_channels`). Raises `ConnectFailed` when no address can be bound and what
        discovery raises; a broker that is away is no error: it is connected to when it is back.
        """
        ...

    async def subscribe(
        self, channel: Channel, *, capacity: int | None = None, overflow: Overflow = "drop_oldest", on_gap: OnGap | None = None
    ) -> Subscription:
        """Listen from now on, to publishers as they come and go. `capacity`: messages that may wait (default: the setting).

        Where there is no broker, connecting to a publisher takes a moment after this returns; what it says before is missed.

        `on_gap` is called in the reader's task, right before it is given the message after the gap. What it raises is logged.
        """
        ...

    async def aclose(self) -> None:
        """Idempotent."""
        ...
