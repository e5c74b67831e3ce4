"""One request connection as the worker sees it: frames in, acknowledgements out in the same order (`spec/10 §1.2–1.5`)."""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from stator.errors import PeerProtocolError
from stator.protocol.request_frame import RequestFrame, RequestFrameParser, encode_acknowledgement, too_large
from stator.security import ALERT, Refusals, is_tls
from stator.tasks import DeadlineWheel
from stator.tasks.wheel import Timed

__all__ = ["RequestConnection"]

logger = logging.getLogger(__name__)

_DISCARD = 2.0
"""seconds in which a client that sent too much may go on sending, so that it can read why it is cut off"""


class RequestConnection(asyncio.Protocol):
    """`take` turns a request into its acknowledgement text; `gone` is called once, when the connection has ended.

    Never closed for being idle. A client that does not read its acknowledgements is not read either.
    """

    slot: set[Timed] | None = None

    def __init__(
        self,
        *,
        take: Callable[[RequestFrame], bytes],
        gone: Callable[["RequestConnection"], None],
        limit: int,
        wheel: DeadlineWheel,
        refusals: Refusals,
    ) -> None:
        self._take = take
        self._gone = gone
        self._wheel = wheel
        self._parser = RequestFrameParser(limit=limit)
        self._transport: asyncio.Transport | None = None
        self._refusals: Refusals | None = refusals
        """until the first bytes are here"""
        self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if self._refused or transport is None:
            return
        refusals, self._refusals = self._refusals, None
        if refusals is not None and is_tls(data):
            self._turn_away(transport, refusals)
            return
        answers: list[bytes] = []
        try:
            for frame in self._parser.receive_data(data):
                text = self._take(frame)
                answers.append(encode_acknowledgement(text))
        except PeerProtocolError as error:
            answers.append(encode_acknowledgement(too_large(error)))
            self._refuse(error)
        if answers and not transport.is_closing():
            transport.write(b"".join(answers))
            if self._refused:
                transport.write_eof()

    def _refuse(self, error: PeerProtocolError) -> None:
        logger.warning("request connection closed: %s", error)
        self._refused = True
        self._wheel.arm(self, self._wheel.now() + _DISCARD)

    def _turn_away(self, transport: asyncio.Transport, refusals: Refusals) -> None:
        refusals.count("accepting", "encrypted")
        peer = transport.get_extra_info("peername")
        logger.warning("request connection from %s refused: it speaks TLS, which is not set here (tls.cert_path)", peer)
        self._refused = True
        transport.write(ALERT)
        transport.close()

    def pause_writing(self) -> None:
        if self._transport is not None and not self._refused:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._wheel.disarm(self)
        self._gone(self)

    def expire(self, now: float) -> float:
        """Called by the wheel: enough was discarded."""
        self.abort()
        return 0.0

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()
