"""An HTTP/2 session on a socket: bytes in both directions, one write per loop tick, deadlines on the wheel."""

import logging
from collections.abc import Callable

from stator.errors import Disconnected, PeerProtocolError, StatorError, Timeout
from stator.protocol.http2_frames import ErrorCode, FrameViolation
from stator.protocol.http2_session import Session, Verdict
from stator.tasks import DeadlineWheel
from stator.transports.session_connection import LOOK, SessionConnection

__all__ = ["Http2Connection"]

logger = logging.getLogger(__name__)


class Http2Connection(SessionConnection):
    """One socket and its session. The owner makes the session with `wake=connection.wake`, then calls `attach`.

    `lost(connection, reason)` is called once, when the connection has ended for whatever reason, and before its streams hear of it;
    `changed` when there may be room for streams, or none any more. `patience`: seconds until the other side's settings must be here.
    """

    def __init__(
        self,
        *,
        wheel: DeadlineWheel,
        patience: float,
        lost: Callable[["Http2Connection", StatorError], None],
        changed: Callable[["Http2Connection"], None] | None = None,
    ) -> None:
        super().__init__(wheel=wheel, patience=patience)
        self._lost = lost
        self._changed = changed
        self._session: Session | None = None
        self._look = 1.0

    def attach(self, session: Session, *, look: float) -> None:
        """The session whose bytes this connection carries, to be looked at every `look` seconds."""
        self._session = session
        self._look = look

    @property
    def protocol_name(self) -> str | None:
        """What TLS negotiated; None without TLS, or when nothing was."""
        tls = None if self._transport is None else self._transport.get_extra_info("ssl_object")
        return None if tls is None else tls.selected_alpn_protocol()

    # -- asyncio.Protocol

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
        super().resume_writing()

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
        elif not session.writable:
            self._hold(transport)

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
        """Say goodbye and close; `lost` follows when it has left, or after 2 s. Idempotent."""
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
            self._close_soon(transport)

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
                return min(now + LOOK, self._greet_by)
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
