"""The answer to one request: an async iterator and context manager that chooses an instance, retries before the first item, and
cancels when it is left.
"""

import logging
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

import msgspec

from stator.errors import (
    Cancelled,
    ConnectFailed,
    Disconnected,
    EngineError,
    Overloaded,
    StatorError,
    Timeout,
    Unavailable,
)
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.records import EndpointRecord
from stator.protocol.stream import Phase
from stator.routing import Attempts, Candidate, Policy, RouteRequest
from stator.runtime.context import Context
from stator.runtime.meter import CallMeter
from stator.runtime.services import Services
from stator.runtime.view import InstanceView
from stator.transports.inbox import Inbox, Patience

__all__ = ["ResponseStream", "Route"]

logger = logging.getLogger(__name__)


_LEAST = 0.001
"""seconds; a request with less time is not sent"""


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """How the instance of a request is chosen and whether another may be tried."""

    policy: Policy
    request: RouteRequest
    retry: bool
    choose: Callable[[InstanceView, Policy, RouteRequest], Candidate]
    attempts: Callable[[], Attempts]


class ResponseStream:
    """The items of one request.

        async with client.generate(request) as stream:
            async for item in stream: …

    Entering the block (or the first `anext`) sends the request and waits until an instance accepted it; leaving it early kills the
    request at the worker, and so does dropping the stream. Errors before the first item are retried on other instances within the
    retry budget; later ones are raised after the items that arrived before them. One task reads at a time. Cancelling a wait takes
    nothing from the stream; the request goes on until the block is left.
    """

    __slots__ = (
        "_attempts",
        "_calls",
        "_candidate",
        "_context",
        "_deadline",
        "_entered",
        "_envelope",
        "_inbox",
        "_item_type",
        "_iterator",
        "_mark",
        "_now",
        "_over",
        "_patience",
        "_route",
        "_services",
        "_stopped",
        "_view",
    )

    def __init__(
        self,
        services: Services,
        view: InstanceView,
        envelope: RequestEnvelope,
        route: Route,
        *,
        patience: Patience,
        item_type: Any,
        context: Context | None,
    ) -> None:
        self._services = services
        self._view = view
        self._envelope = envelope
        self._route = route
        self._patience = patience
        self._item_type = item_type
        self._context = context
        self._attempts: Attempts | None = None
        self._candidate: Candidate | None = None
        self._inbox: Inbox | None = None
        self._iterator: AsyncIterator[Any] | None = None
        self._calls = services.meter.calls
        self._now = services.clock.monotonic
        self._mark = self._now()
        self._deadline = 0.0
        self._entered = False
        self._stopped = False
        self._over = False

    @property
    def id(self) -> str:
        """The request id."""
        return self._envelope.id

    @property
    def instance_id(self) -> int:
        """The instance that takes, or took, the request; 0 before one was chosen."""
        return 0 if self._candidate is None else self._candidate.instance_id

    # -- reading

    async def __aenter__(self) -> Self:
        self._entered = True
        if self._inbox is None:
            await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items()

    async def __anext__(self) -> Any:
        if self._inbox is not None and self._inbox.items:
            return self._inbox.items.popleft()
        if not await self._more():
            raise StopAsyncIteration
        assert self._inbox is not None
        return self._inbox.items.popleft()

    async def _items(self) -> AsyncIterator[Any]:
        """The token path: one C-level resume per item that is already here."""
        try:
            inbox = self._inbox or await self._open()
            while True:
                items = inbox.items
                take = items.popleft
                while not items and inbox.phase is not _ENDED:
                    inbox.link.taken()
                    await inbox.news()
                if self._mark and items:
                    self._arrived()
                while items:
                    yield take()
                if inbox.phase is _ENDED and not items:
                    error = inbox.error
                    if error is None:
                        self._finish()
                        return
                    inbox = await self._recover(inbox, error)
        finally:
            if not self._entered:
                self.kill()

    async def batches(self) -> AsyncIterator[list[Any]]:
        """All items that are ready, as non-empty lists; for readers that can use several at once."""
        try:
            inbox = self._inbox or await self._open()
            while True:
                items = inbox.items
                while not items and inbox.phase is not _ENDED:
                    inbox.link.taken()
                    await inbox.news()
                if items:
                    if self._mark:
                        self._arrived()
                    batch = list(items)
                    items.clear()
                    yield batch
                elif (error := inbox.error) is not None:
                    inbox = await self._recover(inbox, error)
                else:
                    self._finish()
                    return
        finally:
            if not self._entered:
                self.kill()

    async def collect(self) -> list[Any]:
        """All items to the end."""
        return [item async for item in self]

    async def _more(self) -> bool:
        """Wait for an item; False at the end. Retries elsewhere while nothing was delivered."""
        inbox = self._inbox or await self._open()
        while True:
            try:
                if await inbox.more():
                    if self._mark:
                        self._arrived()
                    return True
            except StatorError as error:
                inbox = await self._recover(inbox, error)
                continue
            self._finish()
            return False

    async def _recover(self, inbox: Inbox, error: StatorError) -> Inbox:
        """The inbox of another attempt, if `error` allows one; raises it otherwise."""
        if inbox.error is not error or self._over:
            raise error
        self._judge(error, delivered=inbox.delivered)
        if inbox.delivered or not self._may_retry(error):
            self._finish()
            raise error
        self._leave()
        return await self._open(error)

    # -- sending

    async def _open(self, cause: StatorError | None = None) -> Inbox:
        """Find an instance that accepts the request. Cancelled: the request was withdrawn or killed.

        `cause` is the error of the attempt before; it is what the caller sees when nobody is left to try.
        """
        while True:
            if not self._view.records and cause is None:
                await self._appear()
            if self._over or self._stopped or self._context is not None:
                unsent = self._unsent()
                if unsent is not None:
                    return unsent
            patience = self._patience if self._patience.deadline is None else self._time_left()
            record = self._choose(cause)
            inbox = self._inbox = self._new_inbox(patience, record.instance_id)
            try:
                if self._context is not None:
                    self._context.subscribe(self._context_ended)
                before, self._mark = self._mark, self._now()
                self._calls.attempt(self._mark - before)
                await self._services.network.open(record, self._envelope, inbox)
                if self._stopped:
                    inbox.stop()
                while inbox.phase < _FIRST_ITEM:
                    await inbox.news()
                self._calls.sent.append(self._now() - self._mark)
            except StatorError as error:
                inbox.finish(error)
            except BaseException:
                self.kill()
                raise
            error = inbox.error
            if error is None or inbox.delivered:
                if not self._stopped:  # perhaps before anybody heard of it
                    self._view.availability.mark_success(record.instance_id)
                return inbox
            self._judge(error, delivered=False)
            if not self._may_retry(error):
                self._finish()
                raise error
            self._leave()
            cause = error

    def _arrived(self) -> None:
        """The first item is here."""
        self._calls.answered.append(self._now() - self._mark)
        self._mark = 0.0

    def _unsent(self) -> Inbox | None:
        """The end of a request that is not sent any more, because it was stopped: nobody has items. Raises `Cancelled` if it was killed."""
        context = self._context
        if self._over or (context is not None and context.is_killed):
            self._over = True
            raise Cancelled("the request was killed before it was sent")
        if not self._stopped and (context is None or not context.is_stopped):
            return None
        inbox = self._inbox = self._new_inbox(self._patience)
        inbox.finish()
        return inbox

    def _new_inbox(self, patience: Patience, instance: int = 0) -> Inbox:
        return Inbox(wheel=self._services.wheel, patience=patience, instance=instance, item_type=self._item_type)

    def _time_left(self) -> Patience:
        """What remains of the time for the whole request, for this attempt. Raises `Timeout` if nothing does."""
        total, now = self._patience.total, self._services.wheel.now()
        if not self._deadline:
            self._deadline = now + total
        left = self._deadline - now
        if left < _LEAST:
            self._over = True
            raise Timeout("the time for the whole request is over before it could be sent", phase="total")
        if left >= total:
            return self._patience
        self._envelope = msgspec.structs.replace(self._envelope, deadline=left)
        return self._patience.within(left)

    def _choose(self, cause: StatorError | None) -> EndpointRecord:
        """The record of the instance to try next."""
        route, view = self._route, self._view
        request = route.request
        if self._attempts is not None:
            request = msgspec.structs.replace(request, excluded=self._attempts.tried)
        try:
            candidate = route.choose(view, route.policy, request)
        except StatorError as error:
            self._over = True
            if cause is None:
                raise
            logger.debug("request %s cannot be tried elsewhere: %s", self.id, error)
            raise cause from None
        view.occupancy.acquire(candidate)
        self._calls.open += 1
        self._candidate = candidate
        return view.records[candidate.instance_id]

    async def _appear(self) -> None:
        """Nobody is listed: wait for an instance, at most `instance_timeout`."""
        timeout = self._services.config.instance_timeout
        if self._patience.deadline is not None:
            self._time_left()  # the clock of the whole request runs from here
            timeout = min(timeout, self._patience.total)
        if timeout or not self._view.synced.is_set():
            try:
                await self._view.wait_for(1, timeout or 1.0)
            except Unavailable:
                return  # choosing says it in the words callers know

    def _may_retry(self, error: StatorError) -> bool:
        context = self._context
        if not self._route.retry or self._stopped or self._over or (context is not None and context.is_stopped):
            return False
        if self._attempts is None:
            self._attempts = self._route.attempts()
        if isinstance(error, EngineError) and error.kind == "EngineShutdown":  # nothing was delivered: as good as a lost worker
            error = Disconnected(error.message)
        left = self.instance_id not in self._view.records  # an orderly end, too: all that waited there goes elsewhere, once
        charged = not left and not isinstance(error, Unavailable)
        return self._attempts.again(self.instance_id, error, self._services.wheel.now(), charged=charged)

    def _judge(self, error: StatorError, *, delivered: bool) -> None:
        """What the error says about the instance (`design.md §5`)."""
        availability, instance = self._view.availability, self.instance_id
        now = self._services.wheel.now()
        if isinstance(error, Overloaded):
            if not delivered:
                availability.mark_overloaded(instance, now)
        elif isinstance(error, Timeout):
            if self._was_patient(error.phase):
                availability.mark_inhibited(instance, now, error.message)
        elif (
            isinstance(error, Disconnected | ConnectFailed)
            or (isinstance(error, Unavailable) and not delivered)
            or (isinstance(error, EngineError) and error.kind == "EngineShutdown")
        ):
            availability.mark_inhibited(instance, now, error.message)

    def _was_patient(self, phase: str) -> bool:
        """Whether running out of time in `phase` tells something: it is the instance's part, and the caller waited as long as is usual."""
        field = _INHIBITING_PHASES.get(phase)
        if field is None:
            return False
        waited, usual = (getattr(limits, field) for limits in (self._patience.limits, self._services.config.limits))
        return waited is None or usual is None or waited >= usual

    # -- ending

    def stop(self) -> None:
        """Ask the worker to end gracefully; what it still sends is delivered."""
        self._stopped = True
        if self._inbox is not None:
            self._inbox.stop()

    def kill(self) -> None:
        """End the request now. Idempotent; harmless at the end. Readers get `Cancelled`."""
        if self._inbox is not None:
            self._inbox.kill()
        self._finish()

    async def aclose(self) -> None:
        """`kill`, for `contextlib.aclosing`."""
        self.kill()

    def __del__(self) -> None:
        """A stream that was dropped while it ran, or before its end was read, holds a worker and its count. Any thread may get here."""
        inbox = self._inbox
        if inbox is not None and not self._over:
            loop = self._services.wheel.loop
            if not loop.is_closed():
                loop.call_soon_threadsafe(_abandon, inbox, self._view, self._candidate, self._calls)

    def _context_ended(self, killed: bool) -> None:
        if killed:
            self.kill()
        else:
            self.stop()

    def _leave(self) -> None:
        """This attempt is over."""
        if self._context is not None:
            self._context.unsubscribe(self._context_ended)
        candidate, self._candidate = self._candidate, None
        if candidate is not None:
            self._view.occupancy.release(candidate)
            self._calls.open -= 1

    def _finish(self) -> None:
        """The request is over; the chosen instance stays known."""
        if not self._over:
            self._over = True
            candidate = self._candidate
            if candidate is not None and self._inbox is not None and self._inbox.delivered:
                self._view.availability.mark_room(candidate.instance_id)  # first, so that who is told of room finds it
            self._leave()
            self._candidate = candidate


def _abandon(inbox: Inbox, view: InstanceView, candidate: Candidate | None, calls: CallMeter) -> None:
    inbox.kill()
    if candidate is not None:
        view.occupancy.release(candidate)
        calls.open -= 1


_FIRST_ITEM, _ENDED = Phase.FIRST_ITEM, Phase.ENDED
_INHIBITING_PHASES = {Phase.CONNECT.label: "connect", Phase.ACCEPT.label: "accept", Phase.CALL_HOME.label: "call_home"}
"""phases by label → the limit for them"""
