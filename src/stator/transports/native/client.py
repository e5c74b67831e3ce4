"""The caller's side of the native plane: one connection per worker process, dialled on first use."""

import asyncio
import logging
import os
from collections.abc import Callable

from stator.errors import ConnectFailed, StatorError, Timeout
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.ids import endpoint_path
from stator.protocol.native.budget import ByteBudget
from stator.protocol.native.client import ClientSession
from stator.protocol.native.hello import Hello, Limits
from stator.protocol.native.liveness import LivenessLimits, Verdict
from stator.protocol.records import EndpointRecord, NativeAddress
from stator.tasks import Scope
from stator.transports.inbox import Inbox
from stator.transports.native.config import NativeConfig
from stator.transports.native.connection import Connection
from stator.transports.native.pulse import PulseProbe
from stator.transports.opening import while_wanted
from stator.transports.plane import InstanceObserver, PlaneHost

__all__ = ["NativeClient"]

logger = logging.getLogger(__name__)


class _Line:
    """The connection to one worker process and what is known of it."""

    def __init__(self, native: NativeAddress, instance: int) -> None:
        self.native = native
        self.instance = instance
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connection: Connection | None = None
        self.session: ClientSession | None = None
        self.suspect = False

    @property
    def usable(self) -> bool:
        """Whether a request can be written now."""
        session = self.session
        return (
            session is not None
            and session.peer is not None
            and session.gone is None
            and self.connection is not None
            and self.connection.open
        )


class NativeClient:
    """`PlaneClient` of the native plane. Made by `NativeClient.start`."""

    def __init__(self, config: NativeConfig, host: PlaneHost) -> None:
        self._config = config
        self._wheel = host.wheel
        self._observer = host.observer
        self._lines: dict[str, _Line] = {}
        self._dials = Scope("native dials")
        self._dialling: dict[str, asyncio.Task[_Line]] = {}
        self._no_unix: set[str] = set()
        self._budget = ByteBudget(total=config.credit_budget, most=config.window)
        self._probe = PulseProbe(host.random)
        limits = Limits(item=config.max_item, request=config.max_request)
        self._hello = Hello(process=host.process, role="client", limits=limits)
        self._limits = LivenessLimits(silence=config.silence, answer=config.suspect_after, dead=config.dead_after)
        self._closed = False

    @classmethod
    async def start(cls, config: NativeConfig, host: PlaneHost) -> "NativeClient":
        """Open the socket for pulse questions; connections are made on first use."""
        client = cls(config, host)
        await host.wheel.loop.create_datagram_endpoint(lambda: client._probe, local_addr=("0.0.0.0", 0))
        return client

    @property
    def open_streams(self) -> int:
        """Requests whose end has not been decided here."""
        return sum(line.session.open_streams for line in self._lines.values() if line.session is not None)

    # -- PlaneClient

    async def open(self, record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        native = record.stator
        assert isinstance(native, NativeAddress)
        line = self._lines.get(native.process)
        if line is None or not line.usable:
            async with while_wanted(inbox):
                line = await self._dial(native, record.instance_id)
            if inbox.ended:
                return
            if not line.usable:
                raise ConnectFailed(
                    "the connection ended before the request left", instance=record.instance_id, phase="connect"
                )
        session = line.session
        assert session is not None  # the line is usable
        inbox.link = session.open(endpoint_path(record.instance_id, record.endpoint), envelope, inbox)

    def forget(self, record: EndpointRecord) -> None:
        native = record.stator
        line = self._lines.get(native.process) if isinstance(native, NativeAddress) else None
        if line is not None and line.session is not None:
            line.session.refuse_unaccepted(record.instance_id, "the instance left discovery before it accepted the request")

    async def aclose(self) -> None:
        self._closed = True
        await self._dials.aclose()
        lines = tuple(self._lines.values())
        self._lines.clear()
        for line in lines:
            self._end(line, ConnectFailed("the client closed its plane"))
            if line.connection is not None:
                line.connection.close(ConnectFailed("the client closed its plane"))
        self._probe.close()

    # -- dialling

    async def _dial(self, native: NativeAddress, instance: int) -> _Line:
        """The line to a process; concurrent callers share one attempt, and a cancelled caller leaves it to the others."""
        dialling = self._dialling.get(native.process)
        if dialling is None:
            if self._closed:
                raise ConnectFailed("the client closed its plane", phase="connect")
            dialling = self._dials.spawn(self._connect(native, instance), name=f"dial {native.address}")
            self._dialling[native.process] = dialling
            dialling.add_done_callback(lambda task: self._dialled(native.process, task))
        try:
            return await asyncio.shield(dialling)
        except StatorError as error:
            # one exception object is shared by all callers: give each its own
            raise type(error)(error.message, instance=instance, phase="connect") from error

    def _dialled(self, process: str, task: asyncio.Task[_Line]) -> None:
        self._dialling.pop(process, None)
        if not task.cancelled():
            task.exception()

    async def _connect(self, native: NativeAddress, instance: int) -> _Line:
        limit = self._config.connect_timeout
        try:
            async with asyncio.timeout(limit):
                if await self._tries_unix(native):
                    try:
                        return await self._greet(native, instance, unix=True)
                    except (OSError, StatorError) as error:
                        self._no_unix.add(native.process)
                        logger.info("Unix socket of process %s not usable, using TCP: %s", native.process[:8], error)
                return await self._greet(native, instance, unix=False)
        except TimeoutError as error:
            raise Timeout(f"no connection to {native.address} within {limit} s", instance=instance, phase="connect") from error
        except (OSError, ValueError) as error:  # a ValueError is about the address itself
            raise ConnectFailed(f"cannot connect to {native.address}: {error}", instance=instance, phase="connect") from error

    async def _tries_unix(self, native: NativeAddress) -> bool:
        return bool(native.path) and native.process not in self._no_unix and await asyncio.to_thread(_is_ours, native.path)

    async def _greet(self, native: NativeAddress, instance: int, *, unix: bool) -> _Line:
        line = _Line(native, instance)
        connection = Connection(
            wheel=self._wheel,
            lost=lambda _, reason: self._end(line, reason),
            judged=lambda _, verdict: self._judged(line, verdict),
            recovered=lambda _: self._recovered(line),
        )
        session = ClientSession(
            hello=self._hello,
            limits=self._limits,
            now=self._wheel.now(),
            wake=connection.wake,
            hurry=connection.flush,
            greeted=lambda: self._greeted(line),
            budget=self._budget,
            away=lambda: self._went_away(line),
        )
        connection.attach(session)
        line.connection, line.session = connection, session
        try:
            if unix:
                await self._wheel.loop.create_unix_connection(lambda: connection, native.path)
            else:
                host, _, port = native.address.rpartition(":")
                await self._wheel.loop.create_connection(lambda: connection, host.strip("[]"), int(port))
            await line.greeted
        except BaseException:
            connection.abort(ConnectFailed("dialling was given up"))
            raise
        self._lines[native.process] = line
        return line

    def _greeted(self, line: _Line) -> None:
        """The worker's HELLO is here: is it the process of the record?"""
        session = line.session
        if session is None or session.peer is None or line.greeted.done():
            return
        if session.peer.process == line.native.process:
            line.greeted.set_result(None)
        else:
            line.greeted.set_exception(
                ConnectFailed(f"another process answers at {line.native.address}", instance=line.instance, phase="connect")
            )

    # -- life of a line

    def _end(self, line: _Line, reason: StatorError) -> None:
        """The connection is gone: cut its streams, tell the observer if any were open."""
        if self._lines.get(line.native.process) is line:
            del self._lines[line.native.process]
        if not line.greeted.done():
            line.greeted.set_exception(ConnectFailed(reason.message, instance=line.instance, phase="connect"))
        session, line.session = line.session, None
        if session is None:
            return
        had_streams = session.open_streams > 0
        session.close(reason.message)
        if had_streams or line.suspect:
            self._tell(lambda observer: observer.lost(line.instance, reason.message))

    def _judged(self, line: _Line, verdict: Verdict) -> None:
        if verdict is Verdict.DEAD and line.connection is not None:
            line.connection.abort(ConnectFailed(f"silent for {self._limits.dead} s and no pulse"))
        elif verdict is Verdict.SUSPECT:
            if not line.suspect:
                line.suspect = True
                logger.warning("instance %x is silent with requests open; asking its pulse", line.instance)
                self._tell(lambda observer: observer.suspect(line.instance))
            if line.native.pulse:
                self._probe.ask(line.native.pulse, line.native.process, lambda late: self._pulsed(line, late))

    def _pulsed(self, line: _Line, late: float) -> None:
        if line.session is not None:
            line.session.liveness.pulse(self._wheel.now())

    def _recovered(self, line: _Line) -> None:
        if line.suspect:
            line.suspect = False
            self._tell(lambda observer: observer.recovered(line.instance))

    def _went_away(self, line: _Line) -> None:
        self._tell(lambda observer: observer.draining(line.instance))

    def _tell(self, what: Callable[[InstanceObserver], None]) -> None:
        if self._observer is not None:
            what(self._observer)


def _is_ours(path: str) -> bool:
    """Whether a Unix socket exists at `path` and belongs to this user."""
    try:
        return os.lstat(path).st_uid == os.getuid()
    except OSError:
        return False
