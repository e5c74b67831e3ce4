"""Connections of a caller: many streams on each, a further one when the streams of the others are used up."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

import msgspec

from stator.errors import ConnectFailed, NotTrusted, StatorError, Timeout, Unavailable
from stator.protocol.http2_frames import Goaway
from stator.protocol.http2_library import SessionLimits
from stator.protocol.http2_map import DRAINING, HttpAddress
from stator.protocol.http2_session import Session
from stator.security import Alpn, connecting
from stator.tasks import Scope
from stator.transports.http2.config import Http2Config
from stator.transports.http2.connection import Http2Connection
from stator.transports.http2.limits import look_every
from stator.transports.plane import PlaneHost

__all__ = ["Line", "LineHost", "LinePool"]

logger = logging.getLogger(__name__)

_ALPN: Alpn = ("h2",)

_Failure = OSError | Unavailable
"""why there is no line"""


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


class LinePool:
    """The lines to one address. A second one is made when the first has no streams left, and so on."""

    def __init__(self, address: HttpAddress, shared: LineHost, *, empty: Callable[["LinePool"], None]) -> None:
        self.address = address
        self._shared = shared
        self._loop = shared.host.wheel.loop
        self._limit = shared.config.connect_timeout
        self._empty = empty
        self._lines: list[Line] = []
        self._dialling: asyncio.Task[_Failure | None] | None = None
        self._callers = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def lines(self) -> tuple[Line, ...]:
        """Open connections."""
        return tuple(self._lines)

    def line(self) -> Line | None:
        """A line that takes a request now."""
        for line in self._lines:
            if line.usable:
                return line
        return None

    async def wait(self, instance: int) -> Line:
        """A line as soon as there is one. Cancelled: nothing changed.

        Raises `ConnectFailed`, `Timeout` or `Unavailable` (phase "connect").
        """
        authority = self.address.authority
        self._callers += 1
        try:
            async with asyncio.timeout(self._limit):
                while (line := self.line()) is None:
                    await self._progress()
                return line
        except Unavailable as error:
            raise Unavailable(error.message, instance=instance, phase="connect") from error
        except NotTrusted as error:
            raise NotTrusted(error.message, reason=error.reason, instance=instance) from error
        except TimeoutError as error:
            raise Timeout(f"no stream to {authority} within {self._limit} s", instance=instance, phase="connect") from error
        except OSError as error:
            raise ConnectFailed(f"cannot connect to {authority}: {error}", instance=instance, phase="connect") from error
        finally:
            self._callers -= 1
            self._leave_if_empty()

    async def _progress(self) -> None:
        """Wait for a dial, which all callers share, or for room on a line once there are `pool_size` of them."""
        if self._shared.dials.closed:
            raise ConnectionAbortedError("the client closed its plane")
        takers = sum(not line.session.spent for line in self._lines)
        if self._dialling is None and takers < self._shared.config.pool_size:
            self._dialling = self._shared.dials.spawn(self._dial(), name=f"dial {self.address.authority}")
            self._dialling.add_done_callback(self._dialled)
        if self._dialling is not None:
            await _shared(self._dialling)
            return
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    async def _dial(self) -> _Failure | None:
        """Make a line; or why there is none: a failed dial is not a failed task."""
        line = Line(self._shared, freed=self._freed, gone=self._lost)
        try:
            async with asyncio.timeout(self._limit):
                await line.connect(self.address)
        except OSError as error:
            return error
        if not line.usable:
            draining = line.session.draining
            line.connection.abort(ConnectFailed("the connection was of no use"))
            if draining:
                return Unavailable("the worker takes nothing new")
            return ConnectionResetError("the connection ended at once, or takes no streams")
        self._lines.append(line)
        return None

    def _dialled(self, task: asyncio.Task[_Failure | None]) -> None:
        self._dialling = None
        self._freed()
        self._leave_if_empty()

    def _freed(self) -> None:
        """There may be room: let those who wait look."""
        if self._waiters:
            waiters, self._waiters = self._waiters, deque()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _lost(self, line: Line) -> None:
        if line in self._lines:
            self._lines.remove(line)
        self._freed()
        self._leave_if_empty()

    def _leave_if_empty(self) -> None:
        if not self._lines and self._dialling is None and not self._callers:
            self._empty(self)


async def _shared(task: asyncio.Task[_Failure | None]) -> None:
    """Wait for a task that others wait for too; raises what it found. Its own cancellation is an `OSError` here, ours leaves it alone."""
    try:
        failure = await asyncio.shield(task)
    except asyncio.CancelledError:
        ours = asyncio.current_task()
        if task.cancelled() and ours is not None and not ours.cancelling():
            raise ConnectionAbortedError("the client closed its plane") from None
        raise
    if failure is not None:
        raise failure
