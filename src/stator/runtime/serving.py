"""The worker's side of a request, the same for every plane: envelope in → prologue → items → sentinel."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator
from typing import Any

from stator.errors import Cancelled, Disconnected, EngineError, StatorError, Timeout, Unavailable
from stator.protocol.envelope import IncomingRequest
from stator.protocol.wire_errors import engine_error, to_wire
from stator.runtime.context import Context
from stator.runtime.engine import Generate
from stator.tasks import Scope
from stator.transports.plane import Responder

__all__ = ["Serving"]

logger = logging.getLogger(__name__)

_CLOSE_LIMIT = 5.0
"""seconds a handler's clean-up may take after it was cancelled, before it is left behind and reported"""


class _Running(Context):
    """The context of a request that a task is answering."""

    __slots__ = ("responder", "task")

    responder: Responder
    task: asyncio.Task[None]

    @property
    def started(self) -> bool:
        """Whether the task has run; one that is cancelled before never will."""
        coroutine = self.task.get_coro()
        return not inspect.iscoroutine(coroutine) or inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED

    def kill(self) -> None:
        """End now: the handler is cancelled at its next await."""
        if not self.is_killed:
            super().kill()
            self.task.cancel()


class Serving:
    """One served endpoint: takes requests from every plane and runs the handler, one task per request.

    `inflight` counts requests from arrival to sentinel. `drain` refuses new ones (`Unavailable`, which clients retry elsewhere).
    """

    def __init__(self, generate: Generate, *, name: str) -> None:
        self._generate = generate
        self._name = name
        self._draining = False
        self._requests = Scope(f"requests of {name}", close_timeout=_CLOSE_LIMIT)

    @property
    def inflight(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def __call__(self, request: IncomingRequest, responder: Responder) -> Context:
        """The sink that planes deliver to (`stator.transports.plane.RequestSink`)."""
        if self._draining:
            raise Unavailable(f"endpoint {self._name} is draining")
        context = _Running(request.id, metadata=request.metadata, headers=request.headers)
        if request.deadline is not None:
            context.deadline = asyncio.get_running_loop().time() + request.deadline
        context.responder = responder
        context.task = self._requests.spawn(self._serve(request, context, responder), name="request", about=context)
        return context

    async def _serve(self, request: IncomingRequest, context: Context, responder: Responder) -> None:
        try:
            stream = self._generate(request.body, context)
        except (Exception, SystemExit) as error:
            logger.warning("request %s of %s refused by its handler: %s", request.id, self._name, error)
            responder.refuse(_failure(error))
            return
        responder.accept()
        failure: StatorError | None = None
        try:
            send = responder.send
            async for item in stream:
                if not send(item):
                    await responder.ready()
                    if context.is_killed:  # and the handler did not let itself be cancelled
                        failure = Cancelled("killed by the caller")
                        break
        except asyncio.CancelledError as error:
            failure = self._cancelled(context, error)
        except (Exception, SystemExit) as error:
            failure = _failure(error)
            logger.warning("request %s of %s failed in its handler", request.id, self._name, exc_info=error)
        responder.end(failure)
        if failure is not None:
            await self._close(stream, request.id)

    def _cancelled(self, context: Context, error: asyncio.CancelledError) -> StatorError:
        if context.is_killed:
            return Cancelled("killed by the caller")
        if self._requests.closed:
            return _shutdown()
        return engine_error(error)

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
        """Take new requests again."""
        self._draining = False

    async def idle(self) -> None:
        """Wait until no request is running. The caller sets the deadline; cancelling changes nothing."""
        await self._requests.join()

    def kill_all(self) -> None:
        """Kill what is still running; what has not started is refused."""
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
            context.responder.end(_shutdown())
            context.kill()

    def _refuse_unstarted(self) -> None:
        """A task that is cancelled before its first step never runs: its caller would hear nothing."""
        for context in self._requests.subjects():
            if not context.started:
                context.responder.refuse(Unavailable(f"endpoint {self._name} shuts down"))


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
