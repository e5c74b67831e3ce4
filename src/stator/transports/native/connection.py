"""A native session on a socket: bytes in both directions, one write per loop tick, liveness on the wheel."""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import cast

from stator.errors import ConnectFailed, PeerProtocolError, StatorError
from stator.protocol.native.hello import Goaway
from stator.protocol.native.liveness import Verdict
from stator.protocol.native.session import Session
from stator.tasks.wheel import DeadlineWheel, Timed

__all__ = ["Connection", "set_no_delay"]

logger = logging.getLogger(__name__)

_JUDGE_EVERY = 0.1
"""seconds between looks at the liveness of a connection with streams"""

_JUDGE_IDLE = 1.0
"""the same without streams"""


def set_no_delay(transport: asyncio.BaseTransport) -> None:
    """Turn Nagle's algorithm off where the transport is TCP."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Connection(asyncio.Protocol):
    """One socket and its session. The owner makes the session with `wake=connection.wake`, then calls `attach`.

    `lost(reason)` is called exactly once when the connection has ended, for whatever reason, after the session was told to forget its
    streams; `judged(verdict)` after each look at the clock that did not end in FINE, `recovered()` when a suspicion ended.
    """

    slot: set[Timed] | None = None

    def __init__(
        self,
        *,
        wheel: DeadlineWheel,
        lost: Callable[["Connection", StatorError], None],
        judged: Callable[["Connection", Verdict], None] | None = None,
        recovered: Callable[["Connection"], None] | None = None,
    ) -> None:
        self._wheel = wheel
        self._lost = lost
        self._judged = judged
        self._recovered = recovered
        self._transport: asyncio.Transport | None = None
        self._session: Session | None = None
        self._scheduled = False
        self._reason: StatorError | None = None
        self.on_writable: Callable[[], None] | None = None

    def attach(self, session: Session) -> None:
        """The session whose bytes this connection carries."""
        self._session = session

    @property
    def open(self) -> bool:
        """Whether there is a socket that can be written to."""
        return self._transport is not None and not self._transport.is_closing()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        set_no_delay(transport)
        self._transport.set_write_buffer_limits(high=0)  # writes go to the kernel at once; what it refuses pauses producers
        self._wheel.arm(self, self._wheel.now() + _JUDGE_EVERY)
        self.flush()

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
            if self.on_writable is not None:
                self.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wheel.disarm(self)
        self._transport = None
        session, self._session = self._session, None
        if session is not None:
            reason = self._reason or ConnectFailed(f"connection lost: {exc}" if exc else "connection closed by the other side")
            self._lost(self, reason)

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
        transport = self._transport
        if transport is None or self._session is None or transport.is_closing():
            return
        data = self._session.outgoing.data_to_send()
        if data:
            transport.write(data)

    # -- ending

    def refuse(self, error: StatorError) -> None:
        """Close because of what the peer sent: tell it why, then end."""
        if self._reason is None:
            logger.warning("native connection closed: %s", error)
            if self._session is not None:
                self._session.say_goodbye(Goaway(code=error.code, reason=error.message[:500]))
        self.close(error)

    def close(self, reason: StatorError) -> None:
        """Write what is queued (bounded by the transport's buffer) and close; `lost` follows in the next loop tick. Idempotent."""
        if self._reason is None:
            self._reason = reason
            self.flush()
            if self._transport is not None:
                self._transport.close()

    def abort(self, reason: StatorError) -> None:
        """Close without writing what is queued. Idempotent."""
        if self._reason is None:
            self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    # -- liveness

    def expire(self, now: float) -> float:
        """Called by the wheel."""
        session = self._session
        if session is None:
            return 0.0
        verdict = session.judge(now)
        if verdict is Verdict.IDLE:
            self.close(ConnectFailed("connection was idle"))
            return 0.0
        if verdict is not Verdict.FINE and self._judged is not None:
            self._judged(self, verdict)
        return now + (_JUDGE_EVERY if session.open_streams else _JUDGE_IDLE)
