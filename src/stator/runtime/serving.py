"""The worker's side of a request, the same for every plane: envelope in → prologue → items → sentinel."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from stator.errors import Cancelled, Disconnected, EngineError, Overloaded, StatorError, Timeout, Unavailable
from stator.protocol.annotated import Annotated
from stator.protocol.envelope import IncomingRequest
from stator.protocol.ids import EndpointId
from stator.protocol.wire_errors import engine_error, to_wire
from stator.runtime.admission import Admission, AdmissionConfig
from stator.runtime.context import Context
from stator.runtime.engine import Generate
from stator.runtime.inputs import check_kind, end_with, only_input
from stator.runtime.meter import EndpointMeter, Outcome
from stator.tasks import Scope, SystemClock
from stator.telemetry import WorkError
from stator.transports.plane import Malformed, Responder

__all__ = ["Serving"]

logger = logging.getLogger(__name__)

_CLOSE_LIMIT = 5.0
"""seconds a handler's clean-up may take after it was cancelled, before it is left behind and reported"""


class _Running(Context):
    """The context of a request from its arrival to its end; it waits for a slot, then a task answers it."""

    __slots__ = (
        "answered",
        "arrived",
        "began",
        "first",
        "over",
        "request",
        "responder",
        "sent_before_stop",
        "serving",
        "sour",
        "task",
        "unheard",
    )

    def __init__(self, serving: "Serving", request: IncomingRequest, responder: Responder, now: float) -> None:
        super().__init__(request.id, metadata=request.metadata, headers=request.headers)
        self.serving = serving
        self.request = request
        self.responder = responder
        self.task: asyncio.Task[None] | None = None
        self.arrived = now
        self.began = 0.0
        """when it had its slot"""
        self.first = 0.0
        """when its handler had been called"""
        self.answered = False
        """whether its handler's answer was ended; clean-up may follow"""
        self.over = False
        """whether it was counted"""
        self.sour = False
        """whether its last item was an error"""
        self.unheard = False
        """whether no way to its client could be made"""
        self.sent_before_stop = -1
        """items that had been sent when its caller asked for a graceful end"""

    @property
    def sent_bytes(self) -> int:
        """Bytes of the answer so far."""
        return self.responder.sent_bytes

    @property
    def started(self) -> bool:
        """Whether the task has run; one that is cancelled before never will."""
        if self.task is None:
            return False
        coroutine = self.task.get_coro()
        return not inspect.iscoroutine(coroutine) or inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED

    def begin(self) -> None:
        """The request has its slot (`stator.runtime.admission.Waiting`)."""
        self.responder.start()
        self.serving.begin(self)

    def stop(self) -> None:
        """Ask for a graceful end. A request that waits for a slot ends at once: complete, without items."""
        super().stop()
        if self.sent_before_stop < 0:
            self.sent_before_stop = self.responder.sent_items
        if self.task is None and self.serving.leave_queue(self):
            self.responder.start()
            self.responder.accept()
            self.responder.end()
            self.serving.account(self, "cancelled")

    def kill(self) -> None:
        """End now: the handler is cancelled at its next await."""
        if self.is_killed:
            return
        super().kill()
        if self.task is None:
            if self.serving.leave_queue(self):
                self.serving.account(self, "cancelled")
            return
        if not self.started:  # the task will not run
            self.serving.account(self, "cancelled", slot=True)
        self.task.cancel()

    def end(self, error: StatorError | None) -> None:
        """End the answer, once: a handler that was left behind may come back to its end."""
        if not self.answered:
            self.answered = True
            self.responder.end(error)

    def unreachable(self) -> None:
        """No way to the client could be made."""
        self.unheard = True
        self.kill()


class Serving:
    """One served endpoint: takes requests from every plane, lets `admission` decide when, and runs the handler, one task per request.

    `inflight` counts requests from arrival to sentinel. `drain` refuses new ones (`Unavailable`, which clients retry elsewhere).
    """

    def __init__(
        self,
        generate: Generate,
        *,
        name: str,
        admission: Admission | None = None,
        meter: EndpointMeter | None = None,
        bidirectional: bool = False,
    ) -> None:
        """`admission` is the process', `meter` the endpoint's; without them the default limits hold, and no page shows the counts.

        A `bidirectional` handler is given an async iterator of inputs for a request, and gets no other requests.
        """
        self._generate = generate
        self._bidirectional = bidirectional
        self._name = name
        self._draining = False
        self._ending = False
        self._admission = admission or Admission(AdmissionConfig())
        self._meter = meter or EndpointMeter.unlisted(EndpointId.parse(name), SystemClock(), self._admission)
        self._waiting: set[_Running] = set()
        self._requests = Scope(f"requests of {name}", close_timeout=_CLOSE_LIMIT)
        self._moved = asyncio.Event()
        self._meter.follow(self._sending)
        self._good = 0
        self.on_success: Callable[[], None] | None = None
        """told at each request that ended well"""

    @property
    def inflight(self) -> int:
        """Requests that have not ended."""
        return len(self._requests) + len(self._waiting)

    def _sending(self) -> Iterator[_Running]:
        return (context for context in self._requests.subjects() if not context.over)

    @property
    def progress(self) -> int:
        """Grows with each item and each request that ends well; what the canary takes for life. The latest item of an answer counts when
        the next one or the end has shown that it was no error; an answer that ended with an error item is taken off again.
        """
        return self._good + sum(max(context.responder.sent_items - 1, 0) for context in self._sending())

    def __call__(self, request: IncomingRequest, responder: Responder, /) -> _Running:
        """The sink that planes deliver to (`stator.transports.plane.RequestSink`)."""
        if request.streams_in or self._bidirectional:
            self._check_kind(request)
        meter = self._meter
        meter.received += 1
        if self._draining:
            meter.refused += 1
            raise Unavailable(f"endpoint {self._name} is draining")
        context = _Running(self, request, responder, meter.now())
        if request.streams_in:
            end_with(context, request.body)
        if request.deadline is not None:
            context.deadline = asyncio.get_running_loop().time() + request.deadline
        if self._admission.take():
            context.began = context.arrived
            self._spawn(context)
        else:
            self._queue(context)
        return context

    def _check_kind(self, request: IncomingRequest) -> None:
        try:
            check_kind(request, bidirectional=self._bidirectional, endpoint=self._name)
        except StatorError:
            self.malformed(request.size, "invalid_message")  # as the reference counts it
            raise

    def malformed(self, size: int, kind: Malformed) -> None:
        """A request could not be read; its sender is told by the plane."""
        self._meter.malformed(size, kind)

    # -- waiting for a slot

    def _queue(self, context: _Running) -> None:
        try:
            self._admission.wait(context)
        except Overloaded:
            self._meter.rejected()
            raise
        self._waiting.add(context)
        context.responder.wait()

    def begin(self, context: _Running) -> None:
        """A request that waited has its slot."""
        self._waiting.discard(context)
        self._moved.set()
        context.began = self._meter.now()
        self._meter.waited(context.began - context.arrived)
        self._spawn(context)

    def leave_queue(self, context: _Running) -> bool:
        """It waits no longer; False if it did not."""
        self._waiting.discard(context)
        self._moved.set()
        return self._admission.leave(context)

    # -- answering

    def _spawn(self, context: _Running) -> None:
        self._enter(context)  # here and not in the task: one that is killed before its first step counts, too
        context.task = self._requests.spawn(self._serve(context), name="request", about=context)

    async def _serve(self, context: _Running) -> None:
        """One request, from its slot to its end. What is inside the loop is the token path."""
        meter, responder = self._meter, context.responder
        outcome: Outcome = "error"
        failure: StatorError | None = None
        stream: AsyncIterator[Any] | None = None
        try:
            try:
                stream = self._generate(context.request.body, context)
            except (Exception, SystemExit) as error:
                failure = self._refused(context, error)
                return
            responder.accept()
            context.first = now = meter.now()
            meter.firsts.append(now - context.began)
            item: Any = None
            try:
                send = responder.send
                async for item in stream:
                    if not send(item):
                        await responder.ready()
                        if context.is_killed:  # and the handler did not let itself be cancelled
                            failure = self._killed()
                            break
            except asyncio.CancelledError as error:
                failure = self._cancelled(context, error)
            except (Exception, SystemExit) as error:
                failure = _failure(error)
                logger.warning("request %s of %s failed in its handler", context.id, self._name, exc_info=error)
            context.end(failure)
            context.sour = type(item) is Annotated and item.event == "error"
            outcome = "cancelled" if context.is_stopped else "ok" if failure is None else "error"
            if failure is not None:
                await self._close(stream, context.id)
        finally:
            self.account(context, outcome, failure, slot=True)

    def _enter(self, context: _Running) -> None:
        meter, request = self._meter, context.request
        meter.entered += 1
        meter.bytes_in += request.size
        if request.sent_ns:
            meter.sent(request.sent_ns)
        if meter.log.debugging:
            meter.log.received(request.id, meter.endpoint, meter.instance, context.headers, context.trace)

    def _refused(self, context: _Running, error: BaseException) -> StatorError:
        """The handler could not even be called."""
        logger.warning("request %s of %s refused by its handler: %s", context.id, self._name, error)
        failure = _failure(error)
        context.responder.refuse(failure)
        self._meter.failed(WorkError.GENERATE)
        return failure

    def account(self, context: _Running, outcome: Outcome, error: StatorError | None = None, *, slot: bool = False) -> None:
        """A request is over: count it, once, and let the next one have its `slot`."""
        if context.over:
            return
        context.over = True
        meter = self._meter
        if outcome == "ok":
            meter.ok += 1
            if not context.sour:
                self._good += 1
                if self.on_success is not None:
                    self.on_success()
        elif outcome == "cancelled":
            meter.cancelled += 1
            if context.began:
                self._count_cancelled(context)
        elif outcome == "error":
            meter.error += 1
        else:
            meter.refused += 1
        if context.began:
            responder = context.responder
            if not context.sour:
                self._good += responder.sent_items
            ended = meter.now()
            meter.ended(ended - context.began, responder.sent_bytes)
            if meter.log.enabled:
                self._log(context, ended, outcome, error)
        if slot:
            self._admission.release()

    def _log(self, context: _Running, ended: float, outcome: Outcome, error: StatorError | None) -> None:
        meter, responder = self._meter, context.responder
        meter.log.completed(
            context.id,
            meter.endpoint,
            meter.instance,
            context.arrived,
            context.began,
            context.first,
            ended,
            responder.sent_items,
            responder.sent_bytes,
            outcome,
            "" if error is None else error.code,
            context.headers,
            context.trace if context.headers else None,
        )

    def _count_cancelled(self, context: _Running) -> None:
        """As the reference does (`spec/30 §6`): what is still sent to a caller that left could not be published, too. After a stop the
        handler decides whether that is an item or the end alone; after a kill it is not asked any more.
        """
        meter = self._meter
        if context.unheard:
            meter.failed(WorkError.RESPONSE_STREAM)
            return
        meter.ended_cancelled += 1
        if context.first:
            heeded = not context.is_killed and context.responder.sent_items <= context.sent_before_stop
            meter.failed(WorkError.PUBLISH_FINAL if heeded else WorkError.PUBLISH_RESPONSE)

    def _cancelled(self, context: Context, error: asyncio.CancelledError) -> StatorError:
        if context.is_killed or self._requests.closed:
            return self._killed()
        return engine_error(error)

    def _killed(self) -> StatorError:
        """Why a request was ended: whoever still listens did not do it."""
        return _shutdown() if self._ending or self._requests.closed else Cancelled("killed by the caller")

    async def _close(self, stream: AsyncIterator[Any], request_id: str) -> None:
        """Run the handler's own clean-up, bounded."""
        aclose = getattr(stream, "aclose", None)
        if aclose is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_LIMIT):
                await aclose()
        except Exception as error:
            logger.warning("handler of request %s did not clean up: %r", request_id, error)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    def resume(self) -> None:
        """Take new requests again. After `aclose` there is no way back."""
        self._ending = False
        self._draining = self._requests.closed

    async def idle(self) -> None:
        """Wait until no request is running or waiting. The caller sets the deadline; cancelling changes nothing."""
        while self.inflight:
            if self._requests:
                await self._requests.join()
            else:  # all wait for slots that other endpoints have
                self._moved.clear()
                await self._moved.wait()

    def probe(self, payload: Any, request_id: str) -> AsyncIterator[Any]:
        """Call the handler in process, beside admission and counts, as the canary does (`spec/25 §6`)."""
        return self._generate(only_input(payload) if self._bidirectional else payload, Context(request_id))

    def kill_all(self) -> None:
        """Kill what is still running, for the worker shuts down, as callers are told; what has not started is refused."""
        self._ending = True
        self._refuse_unstarted()
        for context in self._requests.subjects():
            context.kill()

    async def aclose(self) -> None:
        """End what is still running: callers see that the worker shuts down. Takes nothing from now on. Idempotent.

        Handlers are cancelled and have 5 s for their clean-up; who takes longer is left behind, its caller is told nevertheless.
        """
        self._draining = True
        self._refuse_unstarted()
        await self._requests.aclose()
        for context in self._requests.subjects():
            context.end(_shutdown())
            self.account(context, "cancelled" if context.is_stopped else "error", slot=True)
            context.kill()

    def _refuse_unstarted(self) -> None:
        """A task that is cancelled before its first step never runs: its caller would hear nothing."""
        for context in tuple(self._waiting):
            self.leave_queue(context)
            context.responder.start()
            self._refuse(context, slot=False)
        for context in self._requests.subjects():
            if not context.started and not context.over:
                self._refuse(context, slot=True)

    def _refuse(self, context: _Running, *, slot: bool) -> None:
        context.responder.refuse(Unavailable(f"endpoint {self._name} shuts down"))
        self.account(context, "refused", slot=slot)


def _shutdown() -> EngineError:
    return EngineError("the worker is shutting down", kind="EngineShutdown")


def _failure(error: BaseException) -> StatorError:
    """What a handler's exception is to its caller.

    Trouble of a call that the handler made itself is the handler's: were it passed on as it is, the caller would take it for trouble with
    this worker, which answers well.
    """
    if isinstance(error, Disconnected | Timeout):
        kind = to_wire(error).error_type
        return EngineError(f"{type(error).__name__}: {error}", kind=kind if isinstance(kind, str) else "Unknown")
    return engine_error(error)
