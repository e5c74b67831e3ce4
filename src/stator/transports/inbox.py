"""The reading end of one stream: what a plane puts in, what the application takes out.

The whole meaning is `Receiver`'s; this class adds waiting, deadlines and the way back to the plane. One future per wait, none per
item; one entry in the deadline wheel per stream, none per wait.
"""

import asyncio
from typing import Any, Protocol

import msgspec

from stator.errors import Cancelled, StatorError, Timeout
from stator.protocol.stream import Phase, Receiver
from stator.tasks.wheel import DeadlineWheel

__all__ = ["Inbox", "PhaseLimits", "StreamLink"]


class PhaseLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long each wait may take, in seconds; None waits for ever. `total` counts from the opening."""

    connect: float | None = 3.0
    accept: float | None = 5.0
    call_home: float | None = 60.0
    prologue: float | None = 60.0
    first_item: float | None = 300.0
    items: float | None = 120.0
    total: float | None = None

    def of(self, phase: Phase) -> float | None:
        """The limit of the wait that `phase` names."""
        return (self.connect, self.accept, self.call_home, self.prologue, self.first_item, self.items, None)[phase]


class StreamLink(Protocol):
    """What an inbox may ask of the plane that feeds it. Never blocks, never raises, idempotent."""

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def taken(self) -> None:
        """The application emptied the inbox: credit may be returned, a paused socket may be read again."""
        ...


class _Unlinked:
    """The link before a plane has taken the request and after the stream ended."""

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def taken(self) -> None: ...


UNLINKED: StreamLink = _Unlinked()


class Inbox(Receiver):
    """One stream's reading end. Filled by one plane, read by one task at a time."""

    __slots__ = ("_began", "_limits", "_loop", "_since", "_slot", "_waiter", "_wheel", "instance", "link")

    def __init__(self, *, loop: asyncio.AbstractEventLoop, wheel: DeadlineWheel, limits: PhaseLimits, instance: int) -> None:
        super().__init__()
        self.link: StreamLink = UNLINKED
        self.instance = instance
        self._loop = loop
        self._wheel = wheel
        self._limits = limits
        self._waiter: asyncio.Future[None] | None = None
