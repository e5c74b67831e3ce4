"""The context of a request, with the reference's methods."""

import asyncio
import uuid
from typing import Any

from stator.dynamo.errors import InvalidType
from stator.dynamo.metadata import ContextMetadata, strings
from stator.dynamo.span import SpanProxy
from stator.runtime import Context as StatorContext
from stator.telemetry import TraceContext

__all__ = ["Context"]


class Context:
    """Identity and cancellation of one request. Handlers get one; a caller makes one, or passes on the one it got.

    A call made with a context has its id and metadata, and is stopped with it. Its methods may be called from any thread.
    """

    __slots__ = ("_inner", "_loop")

    def __init__(self, id: str | None = None, metadata: dict[str, str] | None = None) -> None:
        """`id` is the request id, a new UUID by default; `metadata` is copied. Raises `TypeError` for anything but texts."""
        if id is not None and not isinstance(id, str):  # pyright: ignore[reportUnnecessaryIsInstance]: callers are untyped
            raise InvalidType(f"a request id must be a text, not {type(id).__name__}")
        inner = StatorContext(str(uuid.uuid4()) if id is None else id, metadata={} if metadata is None else strings(metadata))
        self._bind(inner, None)

    def _bind(self, inner: StatorContext, loop: asyncio.AbstractEventLoop | None) -> None:
        self._inner = inner
        self._loop = loop

    @classmethod
    def of(cls, inner: StatorContext) -> "Context":
        """The context of a request that arrived."""
        context = cls.__new__(cls)
        context._bind(inner, asyncio.get_running_loop())
        return context

    def for_call(self) -> StatorContext:
        """Stator's own context, for a call on the running loop."""
        self._loop = asyncio.get_running_loop()
        return self._inner

    def __repr__(self) -> str:
        return repr(self._inner)

    def id(self) -> str:
        """The request id."""
        return self._inner.id

    # -- cancellation

    def is_stopped(self) -> bool:
        """Whether the request was stopped or killed."""
        return self._inner.is_stopped

    def is_killed(self) -> bool:
        """Whether nothing more will be delivered."""
        return self._inner.is_killed

    def stop_generating(self) -> None:
        """Ask for a graceful end of this request and of the calls made with it. Idempotent."""
        self._tell(self._inner.stop)

    def kill_generating(self) -> None:
        """End it now; its handler is cancelled at its next await. The reference has the effect, but no such method. Idempotent."""
        self._tell(self._inner.kill)

    def _tell(self, end: Any) -> None:
        loop = self._loop
        if loop is None or loop.is_closed() or loop is _running():
            end()
        else:  # subscribers write to connections, which belong to the loop
            loop.call_soon_threadsafe(end)

    def async_killed_or_stopped(self) -> "asyncio.Future[bool]":
        """A future that is True once the request was stopped or killed. Raises `RuntimeError` outside of an event loop."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._loop is None:
            self._loop = future.get_loop()

        def ended(killed: bool) -> None:
            if not future.done():
                future.set_result(True)

        future.add_done_callback(lambda _: self._inner.unsubscribe(ended))
        self._inner.subscribe(ended)
        return future

    def notify_first_token(self) -> None:
        """For prefill and decode workers of the reference; does nothing."""

    # -- what goes along

    @property
    def metadata(self) -> ContextMetadata:
        """A live view: what is changed here goes along with the next call. Assigning a dict replaces all of it."""
        return ContextMetadata(self._inner.metadata)

    @metadata.setter
    def metadata(self, metadata: dict[str, str]) -> None:
        given = strings(metadata)
        self._inner.metadata.clear()
        self._inner.metadata.update(given)

    # -- the trace

    @property
    def _span(self) -> TraceContext | None:
        return self._inner.trace

    @property
    def trace_id(self) -> str | None:
        """32 hex digits; None when the caller sent no trace."""
        return None if self._span is None else self._span.trace_id

    @property
    def span_id(self) -> str | None:
        """16 hex digits: this worker's span of the request."""
        return None if self._span is None else self._span.span_id

    @property
    def parent_span_id(self) -> str | None:
        """16 hex digits: the caller's span."""
        return None if self._span is None else self._span.parent_id or None

    def trace_headers(self) -> dict[str, str] | None:
        """W3C headers that make whoever gets them continue this trace, for an engine; None without a trace."""
        return None if self._span is None else self._span.headers()

    def current_span(self) -> SpanProxy:
        """The span of the request."""
        return SpanProxy()

    def start_span(self, name: str, attrs: dict[str, Any] | None = None) -> SpanProxy:
        """A span below it; a context manager."""
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]: callers are untyped
            raise InvalidType(f"a span's name must be a text, not {type(name).__name__}")
        return SpanProxy()


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
