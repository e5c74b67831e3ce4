"""The reading end of a channel: what every plane's subscriptions share. A plane puts messages in, the application takes them out."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from stator.errors import StatorError, UsageError
from stator.events.config import EventsConfig
from stator.events.interface import Channel, Event, Gap, OnGap, Overflow, SubscriptionStatistics

__all__ = ["ChannelSubscription"]

logger = logging.getLogger(__name__)

_MAX_PUBLISHERS = 65_536
"""publishers whose next number is remembered; the one heard least recently is forgotten for the next"""
_YIELD_EVERY = 128
"""messages after which a reader that never had to wait lets others run"""


class ChannelSubscription:
    """A bounded queue with one reader, and the numbers that are due. Lives on one event loop.

    Planes call `offer` and `refuse`, and override `_close` to let go of what feeds it and `publishers` when they know better.
    """

    def __init__(
        self,
        channel: Channel,
        config: EventsConfig,
        *,
        capacity: int | None,
        overflow: Overflow,
        on_gap: OnGap | None,
        forget: "Callable[[ChannelSubscription], object]",
    ) -> None:
        """`forget` is called once, when the subscription is closed."""
        if capacity is not None and capacity < 1:
            raise UsageError(f"capacity = {capacity}: at least one message must be able to wait")
        if overflow not in ("drop_oldest", "drop_newest"):
            raise UsageError(f"overflow = {overflow!r}: expected drop_oldest or drop_newest")
        self.channel = channel
        self._capacity = config.queue_capacity if capacity is None else capacity
        self._most_bytes = config.queue_bytes
        self._drop_oldest = overflow == "drop_oldest"
        self._on_gap = on_gap
        self._forget = forget
        self._queue: deque[Event] = deque()
        self._bytes = 0
        self._due: dict[int, int] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._received = 0
        self._dropped = 0
        self._malformed = 0
        self._gaps = 0
        self._since_wait = 0
        self._closed = False

    # -- the plane's side

    def offer(self, event: Event) -> None:
        """A message of this channel arrived."""
        if self._closed:
            return
        self._received += 1
        size = len(event.payload)
        if not self._has_room(size):
            if not self._drop_oldest:
                self._dropped += 1
                return
            while not self._has_room(size):
                self._bytes -= len(self._queue.popleft().payload)
                self._dropped += 1
        self._queue.append(event)
        self._bytes += size
        self._wake()

    def refuse(self, reason: StatorError) -> None:
        """Something arrived that is none; the first is worth a warning."""
        self._malformed += 1
        level = logging.WARNING if self._malformed == 1 else logging.DEBUG
        logger.log(level, "a message on event channel %s was dropped: %s", self.channel, reason.message)

    @property
    def publishers(self) -> int:
        """How many publishers there are, as far as is known."""
        return len(self._due)

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closed

    def _has_room(self, size: int) -> bool:
        queue = self._queue
        return not queue or (len(queue) < self._capacity and self._bytes + size <= self._most_bytes)

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _close(self) -> None:
        """Let go of what feeds the subscription; called once."""

    # -- the application's side

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        self._since_wait += 1
        if self._since_wait >= _YIELD_EVERY:
            self._since_wait = 0
            await asyncio.sleep(0)
        while not self._queue:
            if self._closed:
                raise StopAsyncIteration
            if self._waiter is not None:
                raise UsageError("a subscription is read by one task at a time; another one is waiting on it")
            self._since_wait = 0
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        event = self._queue.popleft()
        self._bytes -= len(event.payload)
        self._count(event)
        return event

    def _count(self, event: Event) -> None:
        """Note what is due next of this publisher, and say so when something is missing."""
        publisher, sequence = event.publisher_id, event.sequence
        due = self._due.pop(publisher, sequence)
        self._due[publisher] = sequence + 1  # to the end: most recently heard
        if sequence > due:
            self._gaps += 1
            if self._on_gap is not None:
                try:
                    self._on_gap(Gap(publisher_id=publisher, expected=due, found=sequence))
                except Exception:  # the application's; the message is delivered all the same
                    logger.exception("what is to be called for gaps on event channel %s failed", self.channel)
        elif len(self._due) > _MAX_PUBLISHERS:
            del self._due[next(iter(self._due))]

    def statistics(self) -> SubscriptionStatistics:
        """What happened so far."""
        return SubscriptionStatistics(
            received=self._received,
            dropped=self._dropped,
            malformed=self._malformed,
            gaps=self._gaps,
            queued=len(self._queue),
            publishers=self.publishers,
        )

    async def aclose(self) -> None:
        """Idempotent. What is queued is dropped."""
        if self._closed:
            return
        self._closed = True
        self._queue.clear()
        self._bytes = 0
        self._wake()
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
