"""The first bytes of a connection tell what is spoken on it."""

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from stator.protocol.http2_frames import PREFACE
from stator.security import is_tls
from stator.tasks import DeadlineWheel
from stator.tasks.wheel import Timed

__all__ = ["Doorway"]

_END_OF_FIELDS = b"\r\n\r\n"
_MOST_FIELDS = 65_536
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class DoorKeeper(Protocol):
    """Who owns the doorways (`stator.transports.http2.server.Http2Server`)."""

    def decided(self, doorway: "Doorway") -> None:
        """It has become something else, or has ended."""
        ...

    def answer_to_tls(self) -> bytes: ...

    def make_http2(self) -> asyncio.Protocol: ...

    def make_http1(self) -> asyncio.Protocol: ...


class Doorway(asyncio.Protocol):
    """A connection that has said too little: HTTP/2 begins with its preface, anything else has to be the fields of an HTTP/1.1 request.

    It waits for all fields of the first request: behind the door is nobody who would give up on a client that sends them byte by byte.
    """

    slot: set[Timed] | None = None

    def __init__(self, keeper: DoorKeeper, *, wheel: DeadlineWheel, patience: float) -> None:
        self._keeper = keeper
        self._wheel = wheel
        self._patience = patience
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        self._wheel.arm(self, self._wheel.now() + self._patience)

    def data_received(self, data: bytes) -> None:
        received = self._received
        if self._transport is None:
            return
        received += data
        if PREFACE.startswith(received[: len(PREFACE)]):
            if len(received) >= len(PREFACE):
                self._become(self._keeper.make_http2)
        elif is_tls(bytes(received[:2])):
            self._turn_away(self._keeper.answer_to_tls())
        elif _END_OF_FIELDS in received:
            self._become(self._keeper.make_http1)
        elif len(received) > _MOST_FIELDS:
            self._turn_away(_TOO_LARGE)

    def _turn_away(self, last: bytes) -> None:
        transport, self._transport = self._transport, None
        self._leave()
        if transport is not None:
            transport.write(last)
            transport.close()

    def _become(self, make: Callable[[], asyncio.Protocol]) -> None:
        transport, self._transport = self._transport, None
        self._leave()
        if transport is None:
            return
        protocol = make()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        protocol.data_received(bytes(self._received))
        self._received.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._leave()

    def _leave(self) -> None:
        self._wheel.disarm(self)
        self._keeper.decided(self)

    def expire(self, now: float) -> float:
        """Called by the wheel: it was silent for too long."""
        self.abort()
        return 0.0

    def abort(self) -> None:
        """End it without a word."""
        if self._transport is not None:
            self._transport.abort()
