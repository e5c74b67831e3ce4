"""The worker's side of the native plane: a TCP listener, a Unix socket, a pulse."""

import asyncio
import contextlib
import logging
import os
import stat
from pathlib import Path
from typing import cast

import msgspec

from stator.errors import ConnectFailed, NotTrusted, Overloaded, StatorError
from stator.protocol.native.budget import ByteBudget
from stator.protocol.native.frames import GOAWAY, frame
from stator.protocol.native.hello import VERSION, Goaway, Hello, Limits
from stator.protocol.native.inputs import InputReader
from stator.protocol.native.liveness import WORKER_LIMITS, Verdict
from stator.protocol.native.server import ServerSession
from stator.protocol.native.session import Session
from stator.protocol.records import EndpointRecord, NativeAddress
from stator.security import Entrance
from stator.transports.address import join_host_port
from stator.transports.closing import close_all, closed
from stator.transports.inputs import InputStream
from stator.transports.listening import BACKLOG
from stator.transports.native.config import NativeConfig
from stator.transports.native.connection import Connection
from stator.transports.native.greeting import count_refusal, greeting
from stator.transports.native.outbox import Outbox
from stator.transports.native.pulse import Pulse
from stator.transports.plane import PlaneHost, RequestSink

__all__ = ["NativeServer"]

logger = logging.getLogger(__name__)

_LONGEST_PATH = 100
_PLAINTEXT = frame(GOAWAY, payload=Goaway(code=NotTrusted.code, reason="this worker speaks nothing but TLS").encode())


class NativeServer:
    """`PlaneServer` of the native plane. Made by `NativeServer.listen`."""

    def __init__(self, config: NativeConfig, host: PlaneHost) -> None:
        self._config = config
        self._host = host
        self._wheel = host.wheel
        self._sinks: dict[str, RequestSink] = {}
        self._sessions: dict[Connection, ServerSession] = {}
        self._greeting: dict[Connection, None] = {}
        self._entrance: Entrance | None = None
        self._empty = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._pulse: Pulse | None = None
        self._path = ""
        self._address = ""
        self._draining = False
        limits = Limits(item=config.max_item, request=config.max_request)
        self._hello = Hello(process=host.process, role="worker", limits=limits)
        self._budget = ByteBudget(total=config.credit_budget, most=config.window)

    @classmethod
    async def listen(cls, config: NativeConfig, host: PlaneHost) -> "NativeServer":
        """Open the listeners. Raises `ConnectFailed` when the address cannot be bound; nothing is left open then."""
        server = cls(config, host)
        try:
            await server._start()
        except OSError as error:
            await server.aclose()
            raise ConnectFailed(f"cannot listen on {host.bind_host}:{config.port}: {error}") from error
        return server

    async def _start(self) -> None:
        loop = self._wheel.loop
        config, host = self._config, self._host
        self._entrance = entrance = Entrance(tls=host.tls, refusals=host.refusals, plain_answer=_PLAINTEXT)
        tcp = await loop.create_server(lambda: entrance(self._accept()), host.bind_host, config.port, backlog=BACKLOG)
        self._servers.append(tcp)
        self._address = join_host_port(host.advertise_host, tcp.sockets[0].getsockname()[1])
        if config.pulse:
            self._pulse = Pulse(host.bind_host, host.process, host.clock)
            self._pulse.start(loop)
        if config.unix and host.socket_directory is not None:
            await self._start_unix(host.socket_directory)

    async def _start_unix(self, directory: Path) -> None:
        path = str(directory / f"{os.getpid()}-{self._host.process[:12]}.sock")
        if len(path.encode()) > _LONGEST_PATH:
            logger.info("no Unix socket: its path would have more than %d bytes", _LONGEST_PATH)
            return
        mode = await asyncio.to_thread(os.stat, directory)
        if mode.st_uid != os.getuid() or stat.S_IMODE(mode.st_mode) & 0o077:
            logger.warning("no Unix socket: its directory must belong to this user with mode 0700")
            return
        self._servers.append(await self._wheel.loop.create_unix_server(self._accept, path, backlog=BACKLOG))
        self._path = path

    @property
    def address(self) -> str:
        """`host:port` as advertised."""
        return self._address

    @property
    def open_streams(self) -> int:
        """Requests arriving or being answered."""
        return sum(session.open_streams for session in self._sessions.values())

    # -- PlaneServer

    def register(self, path: str, sink: RequestSink) -> None:
        self._sinks[path] = sink

    def unregister(self, path: str) -> None:
        self._sinks.pop(path, None)

    def describe(self, record: EndpointRecord, path: str) -> EndpointRecord:
        pulse = join_host_port(self._host.advertise_host, self._pulse.port) if self._pulse is not None else ""
        native = NativeAddress(plane=VERSION, address=self._address, process=self._host.process, pulse=pulse, path=self._path)
        return msgspec.structs.replace(record, stator=native)

    def drain(self) -> None:
        self._draining = True
        for session in self._sessions.values():
            session.drain()

    async def aclose(self) -> None:
        for server in self._servers:
            server.close()
        if self._entrance is not None:
            self._entrance.close()
        if self._path:
            path, self._path = self._path, ""
            with contextlib.suppress(OSError):
                await asyncio.to_thread(os.unlink, path)
        await close_all(self._sessions, ConnectFailed("the worker closed its plane"), empty=self._empty)
        for server in self._servers:
            await closed(server, lambda: len(self._sessions))
        self._servers.clear()
        if self._pulse is not None:
            pulse, self._pulse = self._pulse, None
            await pulse.aclose()

    # -- connections

    def _make_inputs(self, session: Session, number: int) -> InputReader:
        """What the handler of a bidirectional request reads, and who fills it."""
        inputs = InputStream(wheel=self._wheel, limit=self._host.input_timeout)
        inputs.link = reader = InputReader(session, number, inputs)
        return reader

    def _accept(self) -> asyncio.Protocol:
        if len(self._sessions) >= self._config.connections:
            return _Full(self._config.connections)
        connection = Connection(
            wheel=self._wheel,
            patience=self._config.connect_timeout,
            lost=self._lost,
            judged=self._judged,
            refused=lambda error: count_refusal(self._host, "accepting", error),
            throttled=True,
        )
        session = ServerSession(
            hello=greeting(self._hello, self._host.secret),
            limits=WORKER_LIMITS,
            now=self._wheel.now(),
            wake=connection.wake,
            hurry=connection.flush,
            greeted=lambda: self._greeting.pop(connection, None),
            budget=self._budget,
            lookup=self._sinks.get,
            make=Outbox,
            make_inputs=self._make_inputs,
            secret=self._host.secret,
        )
        if self._draining:
            session.drain()
        connection.attach(session)
        self._sessions[connection] = session
        self._greeting[connection] = None
        if len(self._greeting) > self._config.greeting:
            oldest = next(iter(self._greeting))
            del self._greeting[oldest]
            oldest.abort(ConnectFailed("too many connections wait for a HELLO"))
        return connection

    def _lost(self, connection: Connection, reason: StatorError) -> None:
        self._greeting.pop(connection, None)
        session = self._sessions.pop(connection, None)
        if not self._sessions:
            self._empty.set()
        if session is not None:
            session.close()

    def _judged(self, connection: Connection, verdict: Verdict) -> None:
        if verdict is Verdict.DEAD:
            logger.warning("a client was silent for too long; closing its connection")
            connection.abort(ConnectFailed("the client was silent for too long"))


class _Full(asyncio.Protocol):
    """What a client meets when there are too many connections: a reason, and the end."""

    def __init__(self, most: int) -> None:
        self._most = most

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        reason = f"the worker holds {self._most} connections, which is as many as it may"
        writer = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        writer.write(frame(GOAWAY, payload=Goaway(code=Overloaded.code, reason=reason).encode()))
        writer.close()
