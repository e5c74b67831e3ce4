"""One connection of a client process to a worker process, and what is known of the worker by it."""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from stator.errors import ConnectFailed, NotTrusted, StatorError
from stator.protocol.control_message import parse_address
from stator.protocol.native.budget import ByteBudget
from stator.protocol.native.client import ClientSession
from stator.protocol.native.hello import Hello
from stator.protocol.native.liveness import LivenessLimits, Verdict
from stator.protocol.records import NativeAddress
from stator.security import connecting
from stator.tasks import DeadlineWheel
from stator.transports.native.connection import Connection
from stator.transports.native.greeting import count_refusal, greeting
from stator.transports.native.pulse import PulseAddress, PulseProbe, find_pulse
from stator.transports.plane import InstanceObserver, PlaneHost

__all__ = ["Line", "LineHost"]

logger = logging.getLogger(__name__)


class LineHost(msgspec.Struct, frozen=True, kw_only=True):
    """What all lines of a client have in common."""

    plane: PlaneHost
    wheel: DeadlineWheel
    hello: Hello
    limits: LivenessLimits
    patience: float
    """seconds until the worker's HELLO must be here"""
    budget: ByteBudget
    probe: PulseProbe
    observer: InstanceObserver | None
    ended: "Callable[[Line], None]"


class Line:
    """Dialled once by `connect`; `end` cuts its streams. `session` is None once it has ended."""

    def __init__(self, native: NativeAddress, instance: int, host: LineHost) -> None:
        self.native = native
        self.suspect = False
        self._instance = instance
        self._host = host
        self._greeted: asyncio.Future[None] = host.wheel.loop.create_future()
        self._pulse: PulseAddress | None = None
        self.connection = Connection(
            wheel=host.wheel,
            patience=host.patience,
            lost=lambda _, reason: self.end(reason),
            judged=lambda _, verdict: self._judged(verdict),
            recovered=lambda _: self._recovered(),
            refused=lambda error: count_refusal(host.plane, "dialling", error),
        )
        self.session: ClientSession | None = ClientSession(
            hello=greeting(host.hello, host.plane.secret),
            limits=host.limits,
            now=host.wheel.now(),
            wake=self.connection.wake,
            hurry=self.connection.flush,
            greeted=self._greet,
            budget=host.budget,
            away=self._went_away,
            secret=host.plane.secret,
        )
        self.connection.attach(self.session)

    @property
    def usable(self) -> bool:
        """Whether a request can be written now."""
        session = self.session
        return session is not None and session.peer is not None and session.gone is None and self.connection.open

    @property
    def draining(self) -> bool:
        """Whether the worker takes nothing new and still answers what it has."""
        session = self.session
        return session is not None and session.gone is not None and session.gone.drains and self.connection.open

    # -- dialling

    async def connect(self, *, unix: bool) -> None:
        """Make the connection and wait for the HELLO of the process in the record. The caller sets the deadline.

        Raises `OSError` (`ConnectFailed` is one) or `PeerProtocolError` for an address that is none; nothing is left open then, nor
        when cancelled.
        """
        loop, connection = self._host.wheel.loop, self.connection
        try:
            if unix:
                await loop.create_unix_connection(lambda: connection, self.native.path)
            else:
                host, port = parse_address(self.native.address)
                plane = self._host.plane
                await connecting(connection, host, port, tls=plane.tls, refusals=plane.refusals)
            await self._greeted
            self._pulse = await find_pulse(loop, self.native)
        except BaseException:
            self.close(ConnectFailed("dialling was given up"))
            raise

    def _greet(self) -> None:
        """The worker's HELLO is here: is it the process of the record?"""
        assert self.session is not None and self.session.peer is not None
        if self._greeted.done():
            return
        if self.session.peer.process == self.native.process:
            self._greeted.set_result(None)
        else:
            self._fail(ConnectFailed(f"another process answers at {self.native.address}"))

    def _fail(self, reason: StatorError) -> None:
        if not self._greeted.done():
            error = (
                NotTrusted(reason.message, reason=reason.reason)
                if isinstance(reason, NotTrusted)
                else ConnectFailed(reason.message)
            )
            self._greeted.set_exception(error)
            self._greeted.exception()  # whoever waited may have gone

    # -- the end

    def end(self, reason: StatorError) -> None:
        """The connection is gone: cut its streams, tell the observer if any were open. Idempotent."""
        session, self.session = self.session, None
        if session is None:
            return
        self._fail(reason)
        self._host.ended(self)
        had_streams = session.open_streams > 0
        session.close(reason.message)
        if had_streams or self.suspect:
            self._tell(lambda observer: observer.lost(self._instance, reason.message))

    def close(self, reason: StatorError) -> None:
        """End it from this side: nothing more is written. Idempotent."""
        self.end(reason)
        self.connection.abort(reason)

    # -- liveness

    def _judged(self, verdict: Verdict) -> None:
        host = self._host
        if verdict is Verdict.DEAD:
            self.connection.abort(ConnectFailed(f"silent for {host.limits.dead} s and no pulse"))
        elif verdict is Verdict.SUSPECT:
            if not self.suspect:
                self.suspect = True
                logger.warning("instance %x is silent with requests open; asking its pulse", self._instance)
                self._tell(lambda observer: observer.suspect(self._instance))
            if self._pulse is not None:
                host.probe.ask(self._pulse, self._pulsed)

    def _pulsed(self, late: float) -> None:
        if self.session is not None:
            self.session.liveness.pulse(self._host.wheel.now())

    def _recovered(self) -> None:
        if self.suspect:
            self.suspect = False
            self._tell(lambda observer: observer.recovered(self._instance))

    def _went_away(self) -> None:
        self._tell(lambda observer: observer.draining(self._instance))

    def _tell(self, what: Callable[[InstanceObserver], None]) -> None:
        if self._host.observer is not None:
            what(self._host.observer)
