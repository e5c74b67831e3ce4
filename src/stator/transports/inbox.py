"""The reading end of one stream: what a plane puts in, what the application takes out.

The whole meaning is `Receiver`'s; this class adds waiting, deadlines and the way back to the plane. One future per wait, none per
item; one entry in the deadline wheel per stream, none per wait.
"""

import asyncio
from typing import Any, Protocol

import msgspec

from stator.errors import Cancelled, ConfigError, Timeout, UsageError
from stator.protocol.stream import Phase, Receiver
from stator.tasks.wheel import DeadlineWheel, Timed

_FIRST_ITEM, _ENDED = Phase.FIRST_ITEM, Phase.ENDED
_NEVER = float("inf")
_LOOK_AT_LEAST = 60.0
_TWO_READERS = "a stream is read by one task at a time; another one is waiting on it"

__all__ = ["UNLINKED", "Inbox", "Patience", "PhaseLimits", "StreamLink"]


class PhaseLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How long each wait may take, in seconds; None waits for ever. `total` counts from the opening, the others from the last progress."""

    connect: float | None = 3.0
    accept: float | None = 5.0
    call_home: float | None = 60.0
    prologue: float | None = 60.0
    first_item: float | None = 300.0
    items: float | None = 120.0
    input: float | None = 300.0
    """bidirectional requests: until the other side sends an input, or takes one"""
    total: float | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"limit {name} must be a positive number of seconds or None, got {value!r}")


class Patience:
    """`PhaseLimits` made ready for use: computed once per client, not once per request."""

    __slots__ = ("by_phase", "deadline", "input", "limits", "look_every", "total")

    def __init__(self, limits: PhaseLimits) -> None:
        self.limits = limits
        given = (limits.connect, limits.accept, limits.call_home, limits.prologue, limits.first_item, limits.items, None)
        self.by_phase = tuple(_NEVER if limit is None else limit for limit in given)
        """seconds, by phase"""
        self.input = _NEVER if limits.input is None else limits.input
        """seconds to wait with an input"""
        self.deadline = limits.total
        """seconds for the whole request, as it travels in the envelope"""
        self.total = _NEVER if limits.total is None else limits.total
        self.look_every = min(*self.by_phase, self.input, self.total, _LOOK_AT_LEAST)
        """seconds between looks at a stream: no limit is noticed later than this"""

    def within(self, seconds: float) -> "Patience":
        """The same, with at most `seconds` (above 0) for the whole request."""
        return Patience(msgspec.structs.replace(self.limits, total=min(seconds, self.total)))


class StreamLink(Protocol):
    """What an inbox may ask of the plane that feeds it. Never blocks, never raises, idempotent, harmless after the end."""

    def stop(self) -> None:
        """Send the graceful stop."""
        ...

    def kill(self) -> None:
        """Send the kill and forget the stream: nothing that still arrives reaches the inbox."""
        ...

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
    """One stream's reading end. Filled by one plane, read by one task at a time.

    A plane sets `link` when it takes the request and calls the methods of `Receiver`; once the stream has ended, `link` is dropped, so
    that an ended inbox holds nothing of the plane.
    """

    __slots__ = ("_deadline", "_patience", "_since", "_waiter", "_wheel", "link", "slot")

    def __init__(self, *, wheel: DeadlineWheel, patience: Patience, instance: int = 0, item_type: Any = Any) -> None:
        super().__init__(instance=instance, item_type=item_type)
        self.link: StreamLink = UNLINKED
        self.slot: set[Timed] | None = None
        self._wheel = wheel
        self._patience = patience
        self._waiter: asyncio.Future[None] | None = None
        self._since = now = wheel.now()
        self._deadline = now + patience.total
        wheel.arm(self, now + patience.look_every)

    # -- the plane's side -------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        phase = self.phase
        if phase < _FIRST_ITEM:  # on the way to acceptance: nobody needs to wake up, the next limit begins
            self._since = self._wheel.now()
            return
        if phase is _ENDED:
            self.link = UNLINKED
            self._wheel.disarm(self)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def arrived(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- the application's side -------------------------------------------------------------------------------------------

    async def opened(self) -> None:
        """Wait until the request was accepted or the stream ended. Cancelled: nothing changed."""
        while self.phase < _FIRST_ITEM:
            await self.news()

    def news(self) -> asyncio.Future[None]:
        """What to await until something has changed or arrived. Cancelled: nothing changed. Raises `UsageError` while another task waits.

        Token path: a future and no coroutine.
        """
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            raise UsageError(_TWO_READERS)
        wheel = self._wheel
        self._since = wheel.now()
        self._waiter = waiter = wheel.loop.create_future()
        return waiter

    async def more(self) -> bool:
        """Wait until `items` is not empty (True) or the stream ended (False; raises its error). Cancelled: nothing was taken."""
        while not self.items:
            if self.phase is _ENDED:
                if self.error is not None:
                    raise self.error
                return False
            self.link.taken()
            await self.news()
        return True

    def kill(self) -> None:
        """End the stream from this side: the worker is told, nothing more is delivered, readers get `Cancelled`."""
        if self.phase is _ENDED:
            return
        link, self.link = self.link, UNLINKED
        link.kill()
        self.finish(Cancelled("the stream was killed by its reader", instance=self.instance, phase=self.phase.label))

    def stop(self) -> None:
        """Ask the worker to end gracefully; what it still sends is delivered."""
        self.link.stop()

    # -- deadlines --------------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> float:
        """Called by the wheel: end the stream if its wait is over, else say when to look again."""
        if self.phase is _ENDED:
            return 0.0
        if now >= self._deadline:
            return self._time_out("total", self._patience.total)
        due = self._deadline
        waiter = self._waiter
        if self.phase < _FIRST_ITEM or (waiter is not None and not waiter.done()):
            limit = self._patience.by_phase[self.phase]
            if now >= self._since + limit:
                return self._time_out(self.phase.label, limit)
            due = min(self._since + limit, due)
        return min(now + self._patience.look_every, due)

    def _time_out(self, phase: str, limit: float) -> float:
        error = Timeout(f"no progress: {phase} took longer than {limit} s", instance=self.instance, phase=phase)
        link, self.link = self.link, UNLINKED
        link.kill()
        self.finish(error)
        return 0.0
