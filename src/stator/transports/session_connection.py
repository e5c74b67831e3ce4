"""What connections of planes that carry many streams have in common: one socket, one write at the end of the loop's turn, an end that
is bounded. The native and the HTTP/2 plane put their sessions on it.
"""

import asyncio
import socket
from abc import ABC, abstractmethod
from typing import cast

from stator.errors import StatorError
from stator.tasks.wheel import DeadlineWheel, Timed

__all__ = ["LOOK", "SessionConnection"]

LOOK = 0.1
"""seconds between looks at a connection whose other side has not introduced itself"""

_MOST_REPLIES = 2 * 1024 * 1024
"""bytes in a transport at which reading stops: stream data waits for the transport, so these are answers to frames of somebody who
sends and does not read"""

_CLOSE_LIMIT = 2.0
"""seconds in which the other side must take what was written before the close"""


class SessionConnection(asyncio.Protocol, ABC):
    """One socket. `patience`: seconds until the other side must have introduced itself, which `_greet_by` is the end of."""

    slot: set[Timed] | None = None

    def __init__(self, *, wheel: DeadlineWheel, patience: float) -> None:
        self._wheel = wheel
        self._patience = patience
        self._greet_by = 0.0
        self._transport: asyncio.Transport | None = None
        self._reason: StatorError | None = None
        """why it ends; from then on nothing is read"""
        self._scheduled = False
        self._held = False

    @property
    def open(self) -> bool:
        """Whether there is a socket that can be written to."""
        return self._transport is not None and not self._transport.is_closing()

    @abstractmethod
    def flush(self) -> None:
        """Write what the session has, now. Harmless when it has nothing."""

    @abstractmethod
    def expire(self, now: float) -> float:
        """Called by the wheel."""

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        if self._reason is not None:
            self._transport.abort()
            return
        _set_no_delay(transport)
        self._transport.set_write_buffer_limits(high=0)  # writes go to the kernel at once; what it refuses pauses producers
        now = self._wheel.now()
        self._greet_by = now + self._patience
        self._wheel.arm(self, now + LOOK)
        self.flush()

    def resume_writing(self) -> None:
        if self._held:
            self._held = False
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()

    # -- sending

    def wake(self) -> None:
        """The session has something to send: write it at the end of this loop tick."""
        if not self._scheduled:
            self._scheduled = True
            self._wheel.loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._scheduled = False
        self.flush()

    def _hold(self, transport: asyncio.Transport) -> None:
        """The transport is full: read nothing more, if it is our answers that fill it."""
        if not self._held and transport.get_write_buffer_size() > _MOST_REPLIES and not transport.is_closing():
            self._held = True
            transport.pause_reading()

    # -- ending

    def _close_soon(self, transport: asyncio.Transport) -> None:
        """Let what was written leave, at most `_CLOSE_LIMIT` seconds."""
        transport.close()
        self._wheel.arm(self, self._wheel.now() + _CLOSE_LIMIT)

    def abort(self, reason: StatorError) -> None:
        """Close without writing what is queued. Idempotent."""
        if self._reason is None:
            self._reason = reason
        if self._transport is not None:
            self._transport.abort()


def _set_no_delay(transport: asyncio.BaseTransport) -> None:
    """Turn Nagle's algorithm off where the transport is TCP."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
