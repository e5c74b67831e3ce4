"""A native session on a socket: bytes in both directions, one write per loop tick, liveness on the wheel."""

import logging
from collections.abc import Callable

from stator.errors import ConnectFailed, NotTrusted, PeerProtocolError, StatorError, Timeout
from stator.protocol.native.hello import Goaway
from stator.protocol.native.liveness import Verdict
from stator.protocol.native.session import Session
from stator.tasks.wheel import DeadlineWheel
from stator.transports.session_connection import LOOK, SessionConnection

__all__ = ["Connection"]

logger = logging.getLogger(__name__)


class Connection(SessionConnection):
    """One socket and its session. The owner makes the session with `wake=connection.wake`, then calls `attach`.

    `lost(reason)` is called exactly once when the connection has ended, for whatever reason; `judged(verdict)` after each look at the
    clock that did not end in FINE, `recovered()` when a suspicion ended. `patience`: seconds until the other side's HELLO, and its PROOF
    where there is a secret, must be here; `refused(error)` is called when they are not, or not good enough.

    A worker that cannot write its answers stops reading (`throttled`); a client always reads, so that the two never wait for each other.
    """

    def __init__(
        self,
        *,
        wheel: DeadlineWheel,
        patience: float,
        lost: Callable[["Connection", StatorError], None],
        judged: Callable[["Connection", Verdict], None] | None = None,
        recovered: Callable[["Connection"], None] | None = None,
        refused: Callable[[StatorError], None] | None = None,
        throttled: bool = False,
    ) -> None:
        super().__init__(wheel=wheel, patience=patience)
        self._lost = lost
        self._judged = judged
        self._recovered = recovered
        self._refused = refused
        self._throttled = throttled
        self._session: Session | None = None

    def attach(self, session: Session) -> None:
        """The session whose bytes this connection carries."""
        self._session = session

    # -- asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        session = self._session
        if session is None or self._reason is not None:
            return
        try:
            recovered = session.receive_data(data, self._wheel.now())
        except (PeerProtocolError, ConnectFailed) as error:
            self.refuse(error)
            return
        # Whoever these bytes woke runs next; a flush queued now comes right after them, in the same turn of the loop.
        if not self._scheduled:
            self._scheduled = True
            self._wheel.loop.call_soon(self._end_turn)
        if recovered and self._recovered is not None:
            self._recovered(self)

    def pause_writing(self) -> None:
        if self._session is not None:
            self._session.outgoing.writable = False

    def resume_writing(self) -> None:
        if self._session is not None:
            self._session.outgoing.resume()
        super().resume_writing()

    def eof_received(self) -> None:
        """The other side has ended: nobody reads what still waits here."""
        self.abort(ConnectFailed("connection closed by the other side"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._wheel.disarm(self)
        self._transport = None
        session, self._session = self._session, None
        if session is not None:
            self._lost(self, self._reason or _reason_of(exc))

    # -- sending

    def _end_turn(self) -> None:
        self._scheduled = False
        if self._session is not None:
            self._session.outgoing.end_turn()
        self.flush()

    def flush(self) -> None:
        """Write what the session has, now. Harmless when it has nothing."""
        transport = self._transport
        if transport is None or self._session is None or transport.is_closing():
            return
        outgoing = self._session.outgoing
        data = outgoing.data_to_send()
        if data:
            transport.write(data)
            if not outgoing.writable and self._throttled:
                self._hold(transport)

    # -- ending

    def refuse(self, error: StatorError) -> None:
        """Close because of what the peer sent, or did not send: tell it why, then end."""
        if self._reason is not None:
            return
        self._reason = error
        transport = self._transport
        if transport is not None and self._session is not None:
            if self._session.peer is None and self._refused is not None:
                self._refused(error)
            logger.warning(
                "native connection with %s closed: %s", transport.get_extra_info("peername") or "a Unix socket", error
            )
            code = "no_version" if type(error) is ConnectFailed else error.code
            self._session.say_goodbye(Goaway(code=code, reason=error.message))
            self.flush()
            self._close_soon(transport)

    def close(self, reason: StatorError) -> None:
        """Write what is queued and close; `lost` follows when it has left, or after 2 s. Idempotent."""
        if self._reason is not None:
            return
        self._reason = reason
        transport = self._transport
        if transport is not None and self._session is not None and not transport.is_closing():
            outgoing = self._session.outgoing
            while outgoing:  # bounded by the streams' credit
                outgoing.writable = True
                transport.write(outgoing.data_to_send())
            self._close_soon(transport)

    # -- liveness

    def expire(self, now: float) -> float:
        """Called by the wheel."""
        session = self._session
        if session is None:
            return 0.0
        if self._reason is not None:
            self.abort(self._reason)
            return 0.0
        if session.peer is None:
            if now < self._greet_by:
                return min(now + LOOK, self._greet_by)
            what = "PROOF of the cluster secret" if session.greeting else "HELLO"
            self.refuse(Timeout(f"no {what} within {self._patience} s", phase="connect"))
            return 0.0
        verdict = session.judge(now)
        if verdict is Verdict.IDLE:
            self.close(ConnectFailed("connection was idle"))
            return 0.0
        if verdict is not Verdict.FINE and self._judged is not None:
            self._judged(self, verdict)
        return now + session.liveness.look_again(session.open_streams)


def _reason_of(exc: Exception | None) -> StatorError:
    if isinstance(exc, NotTrusted):
        return exc
    return ConnectFailed(f"connection lost: {exc}" if exc else "connection closed by the other side")
