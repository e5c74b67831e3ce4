"""One answer as Server-Sent Events.

Nothing is sent before the first event: until then the request may still fail with a proper HTTP status, and then status,
headers and first event leave in one write. After that every `send` is one write of one HTTP chunk, however many events are in
it, and waits while the client is behind. This is the token path.
"""

import asyncio
from contextlib import suppress

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from stator.tasks import DeadlineWheel, Scope, Timed

__all__ = ["DONE", "EventStream"]

DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"


class _Response(web.StreamResponse):
    # aiohttp holds the headers back until the first write, as its own `Response` does: one segment instead of two.
    _send_headers_immediately = False


class EventStream:
    """The stream to one client. One task sends; a heartbeat sends a comment when there was nothing for `silence` seconds.

    Use as `async with`; leaving without `finish` after the stream began leaves it cut, which the client sees as an error.
    """

    def __init__(
        self, request: web.Request, *, headers: dict[str, str], scope: Scope, wheel: DeadlineWheel, silence: float
    ) -> None:
        # The last one is for nginx, which would otherwise collect events before it passes them on.
        own = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self.response = _Response(headers={**own, **headers})
        self._request = request
        self._writer: AbstractStreamWriter = request.writer
        self._transport: asyncio.Transport | None = None
        self._chunked = True
        self._starting = asyncio.Lock()
        self._scope = scope
        self._silence = silence
        self._sent = 0
        self._seen = 0
        self._wheel = wheel
        self.slot: set[Timed] | None = None
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        """Whether status and headers are out, so that an error can only be an event."""
        return self.response.prepared

    async def __aenter__(self) -> "EventStream":
        self._wheel.arm(self, self._wheel.now() + self._silence)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop_heartbeat()

    def _stop_heartbeat(self) -> None:
        self._wheel.disarm(self)
        if self._heartbeat is not None:
            self._heartbeat.cancel()

    async def send(self, events: bytes) -> None:
        """Write complete events, and wait while the client is behind. Cancelled or `ConnectionError`: they may have left."""
        self._sent += 1
        transport = self._transport
        if transport is None:
            await self._start(events)
            return
        if transport.is_closing():
            raise ConnectionResetError("the client is gone")
        transport.write(self._framed(events))
        await self._writer.drain()

    def _framed(self, events: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(events), events) if self._chunked else events

    async def finish(self, events: bytes) -> None:
        """Write the last events and the end of the body in one write."""
        self._stop_heartbeat()
        async with self._starting:
            if not self.response.prepared:
                await self.response.prepare(self._request)
            await self.response.write_eof(events)

    async def _start(self, events: bytes) -> None:
        async with self._starting:  # the heartbeat may be starting the stream at the same time
            if self._transport is None:
                await self.response.prepare(self._request)
                self._chunked = bool(getattr(self._writer, "chunked", False))  # not for HTTP/1.0
                await self.response.write(events)
                self._transport = self._request.transport
                return
        await self.send(events)

    def expire(self, now: float) -> float:
        """Asked by the wheel: say something if nothing was said since the last time."""
        silent, self._seen = self._sent == self._seen, self._sent
        if silent:
            self._say_something()
        return now + self._silence

    def _say_something(self) -> None:
        if self._transport is not None:
            if not self._transport.is_closing() and not self._transport.get_write_buffer_size():
                self._transport.write(self._framed(_COMMENT))
        elif not self._scope.closed:
            self._heartbeat = self._scope.spawn(self._begin(), name="sse heartbeat")

    async def _begin(self) -> None:
        with suppress(ConnectionError):  # the handler is told by its own cancellation
            await self.send(_COMMENT)
        self._seen = self._sent
