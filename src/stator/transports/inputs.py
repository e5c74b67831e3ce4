"""A request of many inputs: the caller's sending half beside its inbox, and what the handler reads.

    caller   InputSender  ── inputs, end ─▶  InputStream   handler
             DuplexInbox  ◀─ answer ───────  Responder

The answer's end ends both directions. The end of the inputs ends nothing else; stopping the request ends them, without an error.
"""

from functools import lru_cache
from typing import Any, Protocol, Self

from stator.errors import StatorError, UsageError
from stator.protocol.stream import Phase
from stator.tasks.wheel import DeadlineWheel
from stator.transports.inbox import UNLINKED, Inbox, Patience, PhaseLimits

__all__ = ["INPUT_PHASE", "UNSENT", "DuplexInbox", "InputSender", "InputStream"]

INPUT_PHASE = "input"
"""what waits are called in which one side waits for the other's inputs, or for leave to send them"""

_ENDED = Phase.ENDED


class InputSender(Protocol):
    """How a caller sends its inputs: `Responder` the other way round. Await `ready` before the first `send`.

    After `end` and after `close` every call is accepted and does nothing.
    """

    over: bool
    """nothing more is taken: the input was ended, or the request is"""

    def send(self, item: Any) -> bool:
        """Encode and queue one input. True: go on; False: queued, but await `ready()` before the next one.

        Raises `EngineError` when the value has no JSON form, `UsageError` when the instance takes none as large; nothing was queued then.
        """
        ...

    async def ready(self) -> None:
        """Return when another input may be sent, at once if none is taken any more. Cancelling it changes nothing."""
        ...

    def end(self) -> None:
        """No further inputs; those queued still leave."""
        ...

    def close(self) -> None:
        """The request is over: nothing more leaves, who waits returns. Called by the inbox when it ends. Idempotent, never raises."""
        ...


class _Unsent:
    """The sender before a plane has taken the request and after its end."""

    over = True

    def send(self, item: Any) -> bool:
        return False

    async def ready(self) -> None: ...

    def end(self) -> None: ...

    def close(self) -> None: ...


UNSENT: InputSender = _Unsent()


class DuplexInbox(Inbox):
    """The inbox of a request of many inputs. The plane that takes it sets `sender` besides `link`."""

    __slots__ = ("_input_limit", "_sending_since", "sender")

    def __init__(self, *, wheel: DeadlineWheel, patience: Patience, instance: int = 0, item_type: Any = Any) -> None:
        super().__init__(wheel=wheel, patience=patience, instance=instance, item_type=item_type)
        self.sender: InputSender = UNSENT
        self._input_limit = patience.input
        self._sending_since: float | None = None

    @property
    def wheel(self) -> DeadlineWheel:
        """Where its deadlines are."""
        return self._wheel

    def changed(self) -> None:
        if self.phase is _ENDED:
            sender, self.sender = self.sender, UNSENT
            sender.close()
        super().changed()

    async def ready(self) -> None:
        """Wait until an input may be sent, or none is taken any more (`sender.over`); after `limits.input` seconds the request is over.

        Cancelled: nothing changed. Raises `UsageError` when another task waits.
        """
        if self._sending_since is not None:
            raise UsageError("inputs are sent by one task at a time; another one is waiting to send")
        if not self.items:  # who took all and now sends is not waiting for more, and the handler may wait for room
            self.link.taken()
        self._sending_since = self._wheel.now()
        try:
            await self.sender.ready()
        finally:
            self._sending_since = None

    def fail(self, error: StatorError) -> None:
        """End the request from this side, with an error for its reader: the worker is told, nothing more is delivered."""
        if self.phase is not _ENDED:
            link, self.link = self.link, UNLINKED
            link.kill()
            self.finish(error)

    def expire(self, now: float) -> float:
        since = self._sending_since
        if since is None or self.phase is _ENDED:
            return super().expire(now)
        due = since + self._input_limit
        if now >= due:
            return self._time_out(INPUT_PHASE, self._input_limit)
        again = super().expire(now)
        return min(again, due) if again else again


@lru_cache(maxsize=64)
def _patience(limit: float | None) -> Patience:
    return Patience(
        PhaseLimits(connect=None, accept=None, call_home=None, prologue=None, first_item=None, items=limit, input=None)
    )


class InputStream(Inbox):
    """What a handler of many inputs reads: an async iterator, filled by the plane, bounded by it, read by one task at a time.

    Iteration ends at the end of the inputs and when the request is stopped; it raises `Timeout` (phase "input") when none came for
    `limit` seconds while the handler waited, and how the request ended when that came first.
    """

    __slots__ = ()

    def __init__(self, *, wheel: DeadlineWheel, limit: float | None) -> None:
        super().__init__(wheel=wheel, patience=_patience(limit))
        self.phase = Phase.ITEMS

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if not self.items and not await self.more():
            raise StopAsyncIteration
        return self.items.popleft()

    def _time_out(self, phase: str, limit: float) -> float:
        return super()._time_out(INPUT_PHASE, limit)
