"""TLS between a socket's transport and the protocol above it, the same on every event loop.

Not the loop's own TLS, which tells nobody why a handshake failed: it sends no alert, and the protocol of a listener never hears of it.
Here both sides learn the reason, it is counted, and each connection gets the certificates that are current when it is made.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from typing import Any, cast

from stator.errors import NotTrusted
from stator.security.handshake import refusal
from stator.security.refusals import Refusals

__all__ = ["ALERT", "TlsLayer", "TlsTransport"]

logger = logging.getLogger(__name__)

_READ = 65536
_TLS_RECORDS = (22, 21)
"""first bytes: handshake, alert"""
ALERT = bytes((21, 3, 3, 0, 2, 2, 10))
"""a fatal alert, unexpected message: for those who do not speak TLS"""


class TlsLayer(asyncio.Protocol):
    """The protocol of a socket's transport. `dials`: the name that the other side's certificate must have; None: this side listens.

    `shaken` is for a dialler: done when the handshake is, or raising `NotTrusted`; `above` is told nothing of a handshake that failed.
    `settled` is called once, when the handshake has ended in either way.
    """

    def __init__(
        self,
        above: asyncio.Protocol,
        context: ssl.SSLContext,
        *,
        refusals: Refusals,
        patience: float,
        dials: str | None = None,
        shaken: "asyncio.Future[None] | None" = None,
        plain_answer: bytes = ALERT,
        settled: "Callable[[TlsLayer], None] | None" = None,
    ) -> None:
        self.above: asyncio.Protocol = above
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl_object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=dials is None, server_hostname=dials or None
        )
        self.transport: asyncio.Transport | None = None
        self.closing = False
        self._refusals = refusals
        self._dials = dials
        self._patience = patience
        self._shaken = shaken
        self._plain_answer = plain_answer
        self._settled = settled
        self._established = False
        self._silent = True
        self._ended = False
        """the other side writes no more"""
        self._stays = False
        """and the protocol above still does"""
        self._shut = False
        """this side writes no more"""
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        if self.closing:
            self.transport.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(self._patience, self._late)
        if self._dials is not None:
            self._shake()

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        self._incoming.write(data)
        if self._established or self._shake_with(data):
            self._read()

    def eof_received(self) -> bool:
        if self.closing or self._error is not None:
            return False
        if not self._established:
            text = "the other side ended the connection during the TLS handshake; it may speak no TLS, or only other versions"
            self._refuse(NotTrusted(text, reason="ended"))
            return False
        return self._end_of_input()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        self.closing = True
        self.transport = None
        error = self._error or exc
        shaken, self._shaken = self._shaken, None
        if shaken is not None and not shaken.done():
            shaken.set_exception(error or NotTrusted("the connection ended during the TLS handshake", reason="ended"))
            shaken.exception()  # whoever waited may have gone
        if self._established or self._dials is None:
            self.above.connection_lost(error)

    def pause_writing(self) -> None:
        if self._established:
            self.above.pause_writing()

    def resume_writing(self) -> None:
        if self._established:
            self.above.resume_writing()

    # -- the handshake

    def _shake_with(self, first: bytes) -> bool:
        """Go on with the handshake; whether it is done. The first byte tells whether the other side speaks TLS."""
        if self._silent:
            self._silent = False
            if first[0] not in _TLS_RECORDS:
                if self._dials is None and self.transport is not None:
                    self.transport.write(self._plain_answer)
                self._refuse(NotTrusted("the other side does not speak TLS, this side speaks nothing else", reason="plaintext"))
                return False
        return self._shake()

    def _shake(self) -> bool:
        try:
            self.ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except ssl.SSLError as error:
            self._flush()  # the alert
            self._refuse(refusal(error, dialling=self._dials is not None))
            return False
        self._settle()
        self._flush()
        self._established = True
        self.above.connection_made(TlsTransport(self))
        shaken, self._shaken = self._shaken, None
        if shaken is not None and not shaken.done():
            shaken.set_result(None)
        return not self.closing

    def _late(self) -> None:
        self._refuse(NotTrusted(f"no TLS handshake within {self._patience:g} s", reason="timeout"))
        self.abort()

    def _refuse(self, error: NotTrusted) -> None:
        """End the connection because of what the other side is, or thinks of us."""
        transport, self._error, self.closing = self.transport, error, True
        self._settle()
        self._refusals.count("accepting" if self._dials is None else "dialling", error.reason)
        if transport is not None:
            peer = transport.get_extra_info("peername") or "a closed socket"
            logger.warning("TLS connection %s %s refused: %s", "from" if self._dials is None else "to", peer, error)
            transport.close()

    def _settle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        settled, self._settled = self._settled, None
        if settled is not None:
            settled(self)

    # -- reading

    def _read(self) -> None:
        """Give what has arrived to the protocol above, in one piece."""
        parts: list[bytes] = []
        ended = False
        read = self.ssl_object.read
        try:
            while part := read(_READ):
                parts.append(part)
            ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            ended = True
        except ssl.SSLError as error:
            self._broken(error)
        if self._outgoing.pending:
            self._flush()
        if parts:
            self.above.data_received(parts[0] if len(parts) == 1 else b"".join(parts))
        if ended and not self.closing and not self._end_of_input():
            self.close()

    def _broken(self, error: ssl.SSLError) -> None:
        """An alert, or bytes that are no TLS. A listener's verdict on our certificate may arrive only now (TLS 1.3)."""
        found = refusal(error, dialling=self._dials is not None)
        self._flush()
        if found.reason == "tls":
            self._error, self.closing = ConnectionError(f"TLS failed: {error.reason or error}"), True
            if self.transport is not None:
                self.transport.close()
        else:
            self._refuse(found)

    def _end_of_input(self) -> bool:
        """The other side has said everything; whether the protocol above still has something to say."""
        if not self._ended:
            self._ended = True
            self._stays = bool(self.above.eof_received())
        return self._stays

    # -- writing

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        """Encrypt and send."""
        if self.closing or not data:
            return
        if self._shut:
            raise RuntimeError("written behind the end")
        try:
            self.ssl_object.write(data)
        except ssl.SSLError as error:
            self._error = ConnectionError(f"TLS failed: {error.reason or error}")
            self.abort()
            return
        self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending and self.transport is not None:
            data = self._outgoing.read()
            if not self._shut:
                self.transport.write(data)

    def write_eof(self) -> None:
        """Say that nothing more will be said; what comes is still read."""
        if self.transport is not None and not self._shut and not self.closing:
            self._say_goodbye()
            self._shut = True
            self.transport.write_eof()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(ssl.SSLError):  # it waits for the other side's goodbye, which we do not
            self.ssl_object.unwrap()
        self._flush()

    def close(self) -> None:
        """Send what is written, and a goodbye. Idempotent."""
        if not self.closing:
            self.closing = True
            if self._established:
                self._say_goodbye()
            if self.transport is not None:
                self.transport.close()

    def abort(self) -> None:
        """End it at once. Idempotent."""
        self.closing = True
        self._settle()
        if self.transport is not None:
            self.transport.abort()


class TlsTransport(asyncio.Transport):
    """What the protocol above writes to."""

    def __init__(self, layer: TlsLayer) -> None:
        super().__init__()
        self._layer = layer
        assert layer.transport is not None
        self._below = layer.transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As the loops' own TLS transports have it."""
        found = self._layer.ssl_object
        match name:
            case "ssl_object":
                return found
            case "sslcontext":
                return found.context
            case "peercert":
                return found.getpeercert() or default
            case "cipher":
                return found.cipher()
            case _:
                return self._below.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._layer.closing or self._below.is_closing()

    def close(self) -> None:
        self._layer.close()

    def abort(self) -> None:
        self._layer.abort()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._layer.above = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._layer.above

    def is_reading(self) -> bool:
        return self._below.is_reading()

    def pause_reading(self) -> None:
        """What was read already still arrives, in one piece."""
        self._below.pause_reading()

    def resume_reading(self) -> None:
        self._below.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._below.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._below.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._below.get_write_buffer_limits()

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        self._layer.write(data)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._layer.write_eof()
