"""One client connection: aiohttp's protocol with the deadlines it lacks, and JSON in every error.

Two clients could hold a connection for ever: one that never finishes its request head, and one that never reads its answer.
Both are watched here, below the handlers, so that no handler, unary or streaming, needs a timer per write. What many clients hold
together before anybody knows who they are is bounded by the number of connections and the size of a head.
"""

import asyncio
import logging
from struct import unpack
from typing import Any, cast

from aiohttp import StreamReader, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import LineTooLong

from stator.frontend.config import FrontendConfig
from stator.frontend.errors import Failure, render

try:
    import fcntl
    import termios
except ImportError:  # outside Unix nobody knows what the kernel holds
    fcntl = termios = None

__all__ = ["Connections", "HttpConnection"]

logger = logging.getLogger(__name__)

_LINGER = 1.0
"""seconds in which a refused client may read the answer"""

_HEAD_TIMEOUT = Failure(status=408, message="The request headers did not arrive in time.", code="request_timeout")
_HEAD_TOO_LONG = Failure(status=431, message="The request line or a header field is too long.", code="headers_too_large")
_HEAD_TOO_LARGE = Failure(status=431, message="The request head is too large.", code="headers_too_large")
_TOO_MANY = Failure(
    status=503, message="The frontend has too many connections.", type="server_error", code="overloaded", retry=True
)


class Connections:
    """How many there are, of `limit`."""

    __slots__ = ("limit", "open")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open = 0


class HttpConnection(web.RequestHandler):
    """aiohttp's connection, plus: 408 for a slow request head, 431 for a large one, an abort for a client that takes no bytes, 503 for
    one too many, parse errors as JSON.

    TCP_NODELAY is on (aiohttp sets it on every connection), so that the first token is never held back for an ACK.
    """

    __slots__ = ("_all", "_config", "_head_size", "_head_timer", "_payload", "_unsent", "_wire", "_write_timer")

    def __init__(
        self, manager: web.Server, *, loop: asyncio.AbstractEventLoop, config: FrontendConfig, connections: Connections
    ) -> None:
        super().__init__(
            manager,
            loop=loop,
            keepalive_timeout=config.idle_timeout,
            access_log=None,  # pyright: ignore[reportArgumentType]  # None turns aiohttp's log off; ours is in `request_log`
            max_line_size=config.header_limit,
            max_field_size=config.header_limit,
            max_headers=config.header_count,
            lingering_time=5.0,
        )
        self._config = config
        self._all = connections
        self._head_size = 0
        self._payload: StreamReader | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._wire: asyncio.Transport | None = None
        self._unsent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = cast(asyncio.Transport, transport)  # uvloop's are no subclass
        super().connection_made(transport)
        self._all.open += 1
        if self._all.open > self._all.limit:
            self._refuse(b"503 Service Unavailable", _TOO_MANY)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._wire is not None:
            self._all.open -= 1
        self._wire = None
        self._cancel(self._head_timer)
        self._cancel(self._write_timer)
        super().connection_lost(exc)

    @staticmethod
    def _cancel(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()

    # --- the request head -------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        # A body may go on to arrive when its request is not in progress: just before, and after an answer that did not wait for it.
        in_body = self._payload is not None and not self._payload.is_eof()
        between_requests = not (self._messages or self._request_in_progress or in_body)
        super().data_received(data)
        if self._messages:
            self._payload = self._messages[-1][1]
            self._head_size = 0
        if not between_requests or not data:
            self._tell_handler_of_bad_body()
            return
        if self._messages:
            self._cancel(self._head_timer)
            self._head_timer = None
            return
        if self._head_timer is None and not self._force_close:
            self._head_timer = self._loop.call_later(self._config.header_timeout, self._head_is_late)
        self._head_size += len(data)
        if self._head_size > self._config.head_limit and not self._close:
            self._cancel(self._head_timer)
            self._refuse(b"431 Request Header Fields Too Large", _HEAD_TOO_LARGE)

    def _tell_handler_of_bad_body(self) -> None:
        """A bad chunk in a body: aiohttp treats it as a bad next request, while the handler would wait for the rest."""
        request = self._current_request
        if request is None or not self._messages or isinstance(self._messages[-1][0], RawRequestMessage):
            return
        if not request.content.is_eof() and request.content.exception() is None:
            request.content.set_exception(web.RequestPayloadError("the body is not valid HTTP"))

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._wire is None or self._request_in_progress or self._messages:
            return
        self._refuse(b"408 Request Timeout", _HEAD_TIMEOUT)

    def _refuse(self, status: bytes, failure: Failure) -> None:
        """Answer whatever comes, and end the connection."""
        if self._wire is None:
            return
        body = render(failure)
        retry = b"Retry-After: %d\r\n" % self._config.retry_after if failure.retry else b""
        self._wire.write(
            b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nConnection: close\r\n%bContent-Length: %d\r\n\r\n%b"
            % (status, retry, len(body), body)
        )
        # Closing at once would reset the connection if more bytes are on their way, and the client might never read the answer.
        if self._wire.can_write_eof():
            self._wire.write_eof()
        self.close()
        self._head_timer = self._loop.call_later(_LINGER, self.force_close)

    # --- the answer -------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self._bytes_unsent()
        self._cancel(self._write_timer)
        self._write_timer = self._loop.call_later(self._config.write_timeout, self._look_for_progress)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel(self._write_timer)
        self._write_timer = None

    def _look_for_progress(self) -> None:
        if self._wire is None:
            return
        unsent = self._bytes_unsent()
        if unsent < self._unsent:
            self._unsent = unsent
            self._write_timer = self._loop.call_later(self._config.write_timeout, self._look_for_progress)
            return
        logger.warning("client took no byte for %s s with %d waiting; disconnected", self._config.write_timeout, unsent)
        self._wire.abort()

    def _bytes_unsent(self) -> int:
        """Bytes in our buffer and in the kernel's, which asks for more only after the client took hundreds of kilobytes."""
        assert self._wire is not None
        size = self._wire.get_write_buffer_size()
        socket = self._wire.get_extra_info("socket")
        if socket is None or fcntl is None or termios is None:
            return size
        try:
            return size + unpack("i", fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
        except OSError:
            return size

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """What a client did to its own body is no error of ours."""
        if isinstance(kw.get("exc_info"), web.RequestPayloadError):
            logger.debug(*args, **kw)
        else:
            super().log_exception(*args, **kw)

    # --- what the handlers never saw --------------------------------------------------------------------------------

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer bytes that are no HTTP request (4xx), or a bug of ours (5xx). Closes the connection, as aiohttp does."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had begun")
        if status >= 500:
            logger.error("request handler failed", exc_info=exc)
            failure = Failure(status=status, message="The server failed while handling the request.", type="server_error")
        elif isinstance(exc, LineTooLong):
            failure = _HEAD_TOO_LONG
        else:
            # The message may quote what came, and what came may be a key.
            logger.debug("not an HTTP request: %s", type(exc).__name__)
            text = (message or "bad request").strip().splitlines()[0][:200]
            failure = Failure(status=status, message=f"The request is not valid HTTP: {text}", code="bad_http")
        response: Any = web.Response(status=failure.status, body=render(failure), content_type="application/json")
        response.force_close()
        return response
