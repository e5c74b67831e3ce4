"""Connections of a caller: many streams on each, a further one when the streams of the others are used up."""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from stator.errors import ConnectFailed, NotTrusted, StatorError, Unavailable
from stator.protocol.http2_frames import Goaway
from stator.protocol.http2_library import SessionLimits
from stator.protocol.http2_map import DRAINING, HttpAddress
from stator.protocol.http2_session import Session
from stator.security import Alpn, connecting
from stator.tasks import Scope
from stator.transports.http2.config import Http2Config
from stator.transports.http2.connection import Http2Connection
from stator.transports.http2.limits import look_every
from stator.transports.line_pool import LinePool
from stator.transports.plane import PlaneHost

__all__ = ["Http2Pool", "Line", "LineHost"]

logger = logging.getLogger(__name__)

_ALPN: Alpn = ("h2",)


class LineHost(msgspec.Struct, frozen=True, kw_only=True):
    """What all lines of a client share."""

    config: Http2Config
    limits: SessionLimits
    host: PlaneHost
    dials: Scope


class Line:
    """One connection. `freed` is called when it may take requests again, `gone` once, when it has ended."""

    def __init__(self, shared: LineHost, *, freed: Callable[[], None], gone: Callable[["Line"], None]) -> None:
        self._host = shared.host
        self._freed = freed
        self._gone = gone
        self.connection = connection = Http2Connection(
            wheel=shared.host.wheel, patience=shared.config.connect_timeout, lost=self._lost, changed=self._changed
        )
        self.session = Session(
            limits=shared.limits, wake=connection.wake, now=shared.host.wheel.now(), gone_away=self._gone_away
        )
        connection.attach(self.session, look=look_every(shared.limits))
        self.greeted: asyncio.Future[None] = shared.host.wheel.loop.create_future()

    @property
    def usable(self) -> bool:
        """Whether a request can be sent now."""
        return self.session.room and self.connection.open

    async def connect(self, address: HttpAddress) -> None:
        """Connect, and wait for the other side's settings. Raises `OSError`; the caller sets the deadline."""
        tls = self._host.tls
        if address.secure and tls is None:
            raise NotTrusted(
                "its address says https, and this process has no certificates; set tls.ca_cert_path", reason="plaintext"
            )
        if tls is not None and not address.secure:
            raise NotTrusted("its address says http, and this process speaks TLS only", reason="plaintext")
        await connecting(self.connection, address.host, address.port, tls=tls, refusals=self._host.refusals, alpn=_ALPN)
        try:
            if tls is not None and self.connection.protocol_name != _ALPN[0]:
                raise ConnectionAbortedError("the other side does not agree to HTTP/2 (ALPN)")
            await self.greeted
        except BaseException:
            self.connection.abort(ConnectFailed("the connection was not wanted any more"))
            raise

    def instances(self) -> set[int]:
        """With whom streams are open."""
        return {exchange.instance for exchange in self.session.streams.values()}

    # -- from the connection

    def _changed(self, connection: Http2Connection) -> None:
        if not self.greeted.done() and self.session.greeted:
            self.greeted.set_result(None)
        self._freed()

    def _gone_away(self, goaway: Goaway) -> None:
        logger.info("HTTP/2 connection takes nothing new: code %d %s", goaway.code, goaway.reason)
        observer = self._host.observer
        if observer is not None and goaway.reason == DRAINING:
            for instance in self.instances():
                observer.draining(instance)

    def _lost(self, connection: Http2Connection, reason: StatorError) -> None:
        if not self.greeted.done():
            self.greeted.set_exception(reason if isinstance(reason, OSError) else ConnectFailed(reason.message))
            self.greeted.exception()  # whoever waited may have gone
        if self._host.observer is not None:
            for instance in self.instances():
                self._host.observer.lost(instance, reason.message)
        self._gone(self)


class Http2Pool(LinePool[Line]):
    """The lines to one address. A further one is made when the streams of the others are used up."""

    _sought = "stream"

    def __init__(self, address: HttpAddress, shared: LineHost, *, empty: Callable[["Http2Pool"], None]) -> None:
        config = shared.config
        super().__init__(
            address.authority, most=config.pool_size, limit=config.connect_timeout, dials=shared.dials, empty=empty
        )
        self.address = address
        self._shared = shared

    @property
    def _taking(self) -> int:
        return sum(not line.session.spent for line in self._lines)

    async def _connect(self) -> Line:
        line = Line(self._shared, freed=self._freed, gone=self._lost)
        async with asyncio.timeout(self._limit):
            await line.connect(self.address)
        if not line.usable:
            draining = line.session.draining
            line.connection.abort(ConnectFailed("the connection was of no use"))
            if draining:
                raise Unavailable("the worker takes nothing new")
            raise ConnectionResetError("the connection ended at once, or takes no streams")
        return line
