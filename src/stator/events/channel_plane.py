"""What every event plane does alike: open publishers and subscriptions one at a time, know them, close them with itself."""

import asyncio
from abc import ABC, abstractmethod

from stator.errors import UsageError
from stator.events.host import EventHost
from stator.events.interface import Channel, OnGap, Overflow
from stator.events.publisher import ChannelPublisher
from stator.events.subscription import ChannelSubscription

__all__ = ["ChannelPlane"]


class ChannelPlane(ABC):
    """A plane adds `_open_publisher` and `_open_subscription`, which leave nothing behind when they fail, and `_close`."""

    def __init__(self, host: EventHost) -> None:
        self._host = host
        self._parts: set[ChannelPublisher | ChannelSubscription] = set()
        self._opening = asyncio.Lock()
        self._closed = False

    async def publisher(self, channel: Channel) -> ChannelPublisher:
        """See `EventPlane.publisher`."""
        async with self._opening:
            self._check_open()
            publisher = await self._open_publisher(channel)
            self._parts.add(publisher)
            return publisher

    async def subscribe(
        self, channel: Channel, *, capacity: int | None = None, overflow: Overflow = "drop_oldest", on_gap: OnGap | None = None
    ) -> ChannelSubscription:
        """See `EventPlane.subscribe`."""
        async with self._opening:
            self._check_open()
            subscription = await self._open_subscription(channel, capacity=capacity, overflow=overflow, on_gap=on_gap)
            self._parts.add(subscription)
            return subscription

    @abstractmethod
    async def _open_publisher(self, channel: Channel) -> ChannelPublisher: ...

    @abstractmethod
    async def _open_subscription(
        self, channel: Channel, *, capacity: int | None, overflow: Overflow, on_gap: OnGap | None
    ) -> ChannelSubscription: ...

    async def _close(self) -> None:  # noqa: B027 - a plane may share nothing
        """Let go of what publishers and subscriptions share; called once, after they are closed."""

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the event plane is closed; its runtime has left the cluster")

    async def aclose(self) -> None:
        """Idempotent. What is being opened is closed too."""
        async with self._opening:
            if self._closed:
                return
            self._closed = True
            try:
                await self._close_parts()
            finally:
                await self._close()

    async def _close_parts(self) -> None:
        results = await asyncio.gather(*(part.aclose() for part in tuple(self._parts)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
