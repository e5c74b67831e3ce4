"""An HTTP/2 session on a socket: bytes in both directions, one write per loop tick, deadlines on the wheel."""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import cast

from stator.errors import Disconnected, PeerProtocolError, StatorError, Timeout
from stator.protocol.http2_frames import ErrorCode, FrameViolation
from stator.protocol.http2_session import Session, Verdict
from stator.tasks import DeadlineWheel
from stator.tasks.wheel import Timed

__all__ = ["Http2Connection", "set_no_delay"]

logger = logging.getLogger(__name__)

_MOST_REPLIES = 2 * 1024 * 1024
"""bytes in the transport at which reading stops: stream data waits for the transport, so these are answers to one who sends and does
not read"""

_CLOSE_LIMIT = 2.0
"""seconds in which the other side must take what was written before the close"""

_LOOK = 0.1


def set_no_delay(transport: asyncio.BaseTransport) -> None:
    """Turn Nagle's algorithm off where the transport is TCP."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Http2Connection(asyncio.Protocol):
    """One socket and its session. The owner makes the session with `wake=connection.wake`, then calls `attach`.

    `lost(connection, reason)` is called once, when the connection has ended for whatever reason, and before its streams hear of it;
    `changed` when there may be room for streams, or none any more. `patience`: seconds until the other side's settings must be here.
    """

    slot: set[Timed] | None = None

    def __init__(
        self,
        *,
        wheel: DeadlineWheel,
        patience: float,
        lost: Callable[["Http2Connection", StatorError], None],
        changed: Callable[["Http2Connection"], None] | None = None,
    ) -> None:
        self._wheel = wheel
        self._patience = patience
        self._lost = lost
        self._changed = changed
        self._transport: asyncio.Transport | None = None
        self._session: Session | None = None
        self._scheduled = False
        self._held = False
        self._reason: StatorError | None = None
        self._greet_by = 0.0
        self._look = 1.0

    def attach(self, session: Session, *, look: float) -> None:
        """The session whose bytes this connection carries, to be looked at every `look` seconds."""
        self._session = session
        self._look = look

    @property
    def open(self) -> bool:
        """Whether there is a socket that can be written to."""
        return self._reason is None and self._transport is not None and not self._transport.is_closing()

    @property
    def protocol_name(self) -> str | None:
        """What TLS negotiated; None without TLS, or when nothing was."""
        tls = None if self._transport is None else self._transport.get_extra_info("ssl_object")
        return None if tls is None else tls.selected_alpn_protocol()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        if self._reason is not None:
            self._transport.abort()
            return
        set_no_delay(transport)
        self._transport.set_write_buffer_limits(high=0)  # writes go to the kernel at once; what it refuses pauses producers
        now = self._wheel.now()
        self._greet_by = now + self._patience
        self._wheel.arm(self, now + _LOOK)
        self.flush()

    def data_received(self, data: bytes) -> None:
        session = self._session
        if session is None or self._reason is not None:
            return
        try:
            session.receive_data(data, self._wheel.now())
        except PeerProtocolError as error:
            self.refuse(error)
            return
        self.wake()
        if self._changed is not None:
            self._changed(self)

    def pause_writing(self) -> None:
        if self._session is not None:
            self._session.writable = False

    def resume_writing(self) -> None:
        if self._session is not None:
            self._session.resume()
        if self._held:
            self._held = False
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()

    def eof_received(self) -> None:
        """HTTP/2 has no use for a connection of one direction: the other side has ended."""
        self.abort(Disconnected("connection closed by the other side"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._wheel.disarm(self)
        self._transport = None
        session, self._session = self._session, None
        if session is not None:
            told = exc if isinstance(exc, StatorError) else None
            why = f"connection lost: {exc}" if exc else "connection closed by the other side"
            reason = self._reason or told or Disconnected(why)
            self._lost(self, reason)
            session.close(reason.message)

    # -- sending

    def wake(self) -> None:
        """The session has something to send: write it at the end of this loop tick."""
        if not self._scheduled:
            self._scheduled = True
            self._wheel.loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Write what the session has, now. Harmless when it has nothing."""
        transport, session = self._transport, self._session
        if transport is None or session is None or self._reason is not None or transport.is_closing():
            return
        try:
            data = session.data_to_send()
        except PeerProtocolError as error:
            self.refuse(error)
            return
        if data:
            transport.write(data)
        if session.waiting:
            self.wake()
        elif not session.writable and not self._held and transport.get_write_buffer_size() > _MOST_REPLIES:
            self._held = True
            transport.pause_reading()

    # -- ending

    def refuse(self, error: PeerProtocolError) -> None:
        """Close because of what the other side sent: tell it why, then end."""
        if self._reason is not None:
            return
        transport, session = self._transport, self._session
        if transport is not None and session is not None:
            logger.warning("HTTP/2 connection with %s closed: %s", transport.get_extra_info("peername"), error)
            code = error.wire_code if isinstance(error, FrameViolation) else ErrorCode.PROTOCOL_ERROR
            self._end(error, session.goodbye(code, error.message))

    def close(self, reason: StatorError) -> None:
        """Say goodbye and close; `lost` follows when it has left, at most `_CLOSE_LIMIT` seconds later. Idempotent."""
        if self._reason is None and self._session is not None:
            self.flush()
            self._end(reason, self._session.goodbye(ErrorCode.NO_ERROR, reason.message))
        elif self._reason is None:
            self._reason = reason

    def _end(self, reason: StatorError, last: bytes) -> None:
        self._reason = reason
        transport = self._transport
        if transport is not None:
            transport.write(last)
            transport.close()
            self._wheel.arm(self, self._wheel.now() + _CLOSE_LIMIT)

    def abort(self, reason: StatorError) -> None:
        """Close without a word. Idempotent."""
        if self._reason is None:
            self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    # -- time

    def expire(self, now: float) -> float:
        """Called by the wheel."""
        session = self._session
        if session is None:
            return 0.0
        if self._reason is not None:
            self.abort(self._reason)
            return 0.0
        if not session.greeted:
            if now < self._greet_by:
                return min(now + _LOOK, self._greet_by)
            self.abort(Timeout(f"no HTTP/2 settings within {self._patience} s", phase="connect"))
            return 0.0
        match session.judge(now):
            case Verdict.IDLE:
                self.close(Disconnected("the connection was idle"))
                return 0.0
            case Verdict.DEAD:
                logger.warning("HTTP/2 connection closed: the other side does not answer")
                self.abort(Disconnected("the other side was silent for too long"))
                return 0.0
            case Verdict.FINE:
                return now + self._look
