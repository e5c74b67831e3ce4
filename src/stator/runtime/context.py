"""What a handler knows of its request, and how a request is stopped."""

import asyncio
import logging
from collections.abc import Callable

from stator.errors import UsageError
from stator.telemetry.trace import TraceContext, continue_trace, outgoing_headers

__all__ = ["Context"]

logger = logging.getLogger(__name__)


class Context:
    """Identity and cancellation of one request; the same object goes through every operator and into the handler.

    `id` is the request id on the wire; `metadata` the caller's string map; `headers` trace context as received; `deadline` the loop time
    at which the caller stops waiting, or None. Stopping is a request (the handler looks at `is_stopped` and ends); killing also cancels the
    handler at its next await.
    """

    __slots__ = ("_children", "_killed", "_on_end", "_stopped", "_trace", "_waiter", "deadline", "headers", "id", "metadata")

    def __init__(
        self,
        id: str,
        *,
        metadata: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        deadline: float | None = None,
    ) -> None:
        self.id = id
        self.metadata = metadata if metadata is not None else {}
        self.headers = headers if headers is not None else {}
        self.deadline = deadline
        self._trace: TraceContext | None = None
        self._stopped = False
        self._killed = False
        self._children: list[Context] | None = None
        self._on_end: list[Callable[[bool], None]] | None = None
        self._waiter: asyncio.Event | None = None

    def __repr__(self) -> str:
        state = "killed" if self._killed else "stopped" if self._stopped else "running"
        return f"<Context {self.id} {state}>"

    @property
    def trace(self) -> TraceContext | None:
        """The request's own span in its caller's trace; None if the caller sent none. Made when first asked for."""
        if self._trace is None and self.headers:
            self._trace = continue_trace(self.headers)
        return self._trace

    def outgoing_headers(self) -> dict[str, str]:
        """What calls made for this request carry: their spans are below its own."""
        return outgoing_headers(self.headers, self.trace) if self.headers else {}

    @property
    def is_stopped(self) -> bool:
        """Whether the caller asked for a graceful end, or killed the request."""
        return self._stopped

    @property
    def is_killed(self) -> bool:
        """Whether nothing more will be delivered."""
        return self._killed

    def stop(self) -> None:
        """Ask for a graceful end, here and in all children. Idempotent."""
        if not self._stopped:
            self._stopped = True
            self._tell(killed=False)

    def kill(self) -> None:
        """End now, here and in all children. Idempotent."""
        if not self._killed:
            self._stopped = self._killed = True
            self._tell(killed=True)

    def _tell(self, *, killed: bool) -> None:
        if self._waiter is not None:
            self._waiter.set()
        # Copies: who is told may release its child or unsubscribe. Planes call this from their parsers, so nothing may raise.
        for child in tuple(self._children or ()):
            child.kill() if killed else child.stop()
        for callback in tuple(self._on_end or ()):
            try:
                callback(killed)
            except Exception:
                logger.exception("a subscriber of request %s failed", self.id)

    async def stopped(self) -> None:
        """Wait until the request is stopped or killed. Cancelling the wait changes nothing."""
        if not self._stopped:
            if self._waiter is None:
                self._waiter = asyncio.Event()
            await self._waiter.wait()

    def child(self, id: str | None = None) -> "Context":
        """A context that is stopped and killed with this one, but not the other way round; the same id unless another is given."""
        if id == "":
            raise UsageError("a request id must not be empty")
        child = Context(
            self.id if id is None else id, metadata=dict(self.metadata), headers=dict(self.headers), deadline=self.deadline
        )
        child._trace = self.trace  # the same request in this process: the same span
        if self._killed:
            child.kill()
        elif self._stopped:
            child.stop()
        if self._children is None:
            self._children = []
        self._children.append(child)
        return child

    def release(self, child: "Context") -> None:
        """Forget a child whose request has ended. Harmless if it is not one."""
        if self._children is not None and child in self._children:
            self._children.remove(child)

    def subscribe(self, callback: Callable[[bool], None]) -> None:
        """Call `callback(killed)` at stop and at kill; at once if that has happened already."""
        if self._on_end is None:
            self._on_end = []
        self._on_end.append(callback)
        if self._stopped:
            callback(self._killed)

    def unsubscribe(self, callback: Callable[[bool], None]) -> None:
        """Undo `subscribe`. Harmless if it is not subscribed."""
        if self._on_end is not None and callback in self._on_end:
            self._on_end.remove(callback)
