"""The caller's side of the native plane: one connection per worker process, dialled on first use."""

import asyncio
import logging
import os

from stator.errors import ConnectFailed, NotTrusted, StatorError, Unavailable
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.ids import endpoint_path
from stator.protocol.native.budget import ByteBudget
from stator.protocol.native.hello import Hello, Limits
from stator.protocol.native.liveness import LivenessLimits
from stator.protocol.native.session import Session
from stator.protocol.records import EndpointRecord, NativeAddress
from stator.protocol.stream import Phase
from stator.tasks import Scope
from stator.transports.dialling import SharedDial, connect_error
from stator.transports.inbox import Inbox
from stator.transports.inputs import DuplexInbox
from stator.transports.native.config import NativeConfig
from stator.transports.native.input_sender import NativeInputSender
from stator.transports.native.line import Line, LineHost
from stator.transports.native.pulse import PulseProbe
from stator.transports.opening import while_wanted
from stator.transports.plane import PlaneHost

__all__ = ["NativeClient"]

logger = logging.getLogger(__name__)

_UNIX_SHARE = 0.5
"""part of the connect limit that a Unix socket may take before TCP is tried"""

_MOST_WITHOUT_UNIX = 4096


class NativeClient:
    """`PlaneClient` of the native plane. Made by `NativeClient.start`."""

    def __init__(self, config: NativeConfig, host: PlaneHost) -> None:
        self._config = config
        self._lines: dict[str, Line] = {}
        """by process, where new requests go"""
        self._all: set[Line] = set()
        """also those that only finish what they have"""
        self._dials = Scope("native dials")
        self._dialling: dict[str, SharedDial[Line]] = {}
        self._without_unix: dict[str, None] = {}
        self._closed = False
        self._probe = PulseProbe(host.wheel.loop, host.random)
        limits = Limits(item=config.max_item, request=config.max_request)
        self._host = LineHost(
            plane=host,
            wheel=host.wheel,
            hello=Hello(process=host.process, role="client", limits=limits),
            limits=LivenessLimits(silence=config.silence, answer=config.suspect_after, dead=config.dead_after),
            patience=config.connect_timeout,
            budget=ByteBudget(total=config.credit_budget, most=min(config.window, config.max_item)),
            probe=self._probe,
            observer=host.observer,
            ended=self._ended,
        )

    @classmethod
    async def start(cls, config: NativeConfig, host: PlaneHost) -> "NativeClient":
        """Connections are made on first use."""
        return cls(config, host)

    @property
    def open_streams(self) -> int:
        """Requests whose end has not been decided here."""
        return sum(line.session.open_streams for line in self._all if line.session is not None)

    # -- PlaneClient

    async def open(self, record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        native = record.stator
        assert isinstance(native, NativeAddress)
        line = self._lines.get(native.process)
        if line is None or not line.usable:
            if line is None or not line.draining:
                async with while_wanted(inbox):
                    line = await self._dial(native, record.instance_id)
                if inbox.ended:
                    return
            _check(line, record.instance_id)
            inbox.advance(Phase.ACCEPT)  # its limit begins now
        session = line.session
        assert session is not None  # the line is usable
        path = endpoint_path(record.instance_id, record.endpoint)
        if not envelope.streams_in:
            inbox.link = session.open(path, envelope, inbox)
            return
        assert isinstance(inbox, DuplexInbox)
        inbox.link = session.open(path, envelope, inbox, lambda session, number: _give_sender(inbox, session, number))

    def forget(self, record: EndpointRecord) -> None:
        native = record.stator
        if isinstance(native, NativeAddress):
            for line in tuple(self._all):
                if line.native.process == native.process and line.session is not None:
                    reason = "the instance left discovery before it accepted the request"
                    line.session.refuse_unaccepted(record.instance_id, reason)

    async def aclose(self) -> None:
        self._closed = True
        await self._dials.aclose()
        for line in tuple(self._all):
            line.close(ConnectFailed("the client closed its plane"))
        self._probe.close()

    # -- dialling

    async def _dial(self, native: NativeAddress, instance: int) -> Line:
        """The line to a process; concurrent callers share one attempt, and a cancelled caller leaves it to the others."""
        dial = self._dialling.get(native.process)
        if dial is None:
            if self._closed:
                raise ConnectFailed("the client closed its plane", instance=instance, phase="connect")
            dial = self._dialling[native.process] = SharedDial(
                lambda: self._connect(native, instance),
                dials=self._dials,
                name=f"dial {native.address}",
                ended=lambda: self._dialling.pop(native.process, None),
            )
        try:
            return await dial.wait()
        except (OSError, StatorError) as error:
            limit = self._config.connect_timeout
            raise connect_error(error, address=native.address, limit=limit, instance=instance) from error

    async def _connect(self, native: NativeAddress, instance: int) -> Line:
        try:
            async with asyncio.timeout(self._config.connect_timeout):
                line = await self._connect_somehow(native, instance)
        except ValueError as error:  # about the address itself
            raise ConnectFailed(str(error)) from error
        if line.session is not None:
            self._all.add(line)
            self._lines[native.process] = line
        return line

    async def _connect_somehow(self, native: NativeAddress, instance: int) -> Line:
        """By the Unix socket if it can be ours, else by TCP; which of the two is remembered as soon as TCP has proved that the process
        answers.
        """
        failure: Exception | None = None
        if native.path and native.process not in self._without_unix and await asyncio.to_thread(_is_ours, native.path):
            try:
                async with asyncio.timeout(self._config.connect_timeout * _UNIX_SHARE):
                    return await self._greeted(native, instance, unix=True)
            except NotTrusted:
                raise  # it is the right process, and has no other secret elsewhere
            except (OSError, ValueError) as error:
                failure = error
        line = await self._greeted(native, instance, unix=False)
        if failure is not None:
            logger.info("Unix socket of process %s not usable, using TCP: %s", native.process[:8], failure)
            if len(self._without_unix) >= _MOST_WITHOUT_UNIX:
                self._without_unix.clear()
            self._without_unix[native.process] = None
        return line

    async def _greeted(self, native: NativeAddress, instance: int, *, unix: bool) -> Line:
        line = Line(native, instance, self._host)
        await line.connect(unix=unix)
        return line

    def _ended(self, line: Line) -> None:
        self._all.discard(line)
        if self._lines.get(line.native.process) is line:
            del self._lines[line.native.process]


def _give_sender(inbox: DuplexInbox, session: Session, number: int) -> NativeInputSender:
    """What the inputs of a bidirectional request are sent through."""
    inbox.sender = sender = NativeInputSender(session, number)
    return sender


def _check(line: Line, instance: int) -> None:
    """Raises when a line that was just looked at or dialled cannot take a request."""
    if line.draining:
        raise Unavailable("the worker is draining", instance=instance, phase="connect")
    if not line.usable:
        raise ConnectFailed("the connection ended before the request left", instance=instance, phase="connect")


def _is_ours(path: str) -> bool:
    """Whether something exists at `path` and belongs to this user."""
    try:
        return os.lstat(path).st_uid == os.getuid()
    except (OSError, ValueError):
        return False
