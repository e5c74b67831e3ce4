"""The worker's side of the HTTP/2 plane: a listener that speaks HTTP/2 and, to older peers, HTTP/1.1."""

import asyncio
import logging
from typing import Self

import msgspec

from stator.errors import ConnectFailed, PeerProtocolError, StatorError
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_map import DRAINING, STREAM_TYPE, VERSION, Fields, field_values, target_of
from stator.protocol.http2_session import Session
from stator.protocol.records import EndpointRecord, NativeAddress, Transport
from stator.security import ALERT, Alpn, Entrance
from stator.transports.address import join_host_port
from stator.transports.closing import close_all, closed
from stator.transports.http2.answer import StreamAnswer
from stator.transports.http2.config import Http2Config
from stator.transports.http2.connection import Http2Connection
from stator.transports.http2.desk import Desk
from stator.transports.http2.doorway import Doorway
from stator.transports.http2.http1 import Http1Server
from stator.transports.http2.limits import look_every, session_limits
from stator.transports.http2.pushed import PlainAnswer, PushedRequest
from stator.transports.listening import listen, own_place
from stator.transports.plane import PlaneHost, RequestSink

__all__ = ["Http2Server"]

logger = logging.getLogger(__name__)

_ALPN: Alpn = ("h2", "http/1.1")
_PLAIN_ANSWER = b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\nthis port speaks TLS and nothing else\n"


class Http2Server:
    """`PlaneServer` of the HTTP/2 plane. Made by `Http2Server.listen`."""

    def __init__(self, config: Http2Config, host: PlaneHost) -> None:
        self._config = config
        self._host = host
        self._wheel = host.wheel
        self._limits = session_limits(config, worker=True)
        self._desk = Desk(config, host)
        self._http1 = Http1Server(self._desk)
        self._sessions: dict[Http2Connection, Session] = {}
        self._doorways: dict[Doorway, None] = {}
        self._empty = asyncio.Event()
        self._entrance = Entrance(tls=host.tls, refusals=host.refusals, alpn=_ALPN, plain_answer=_PLAIN_ANSWER)
        self._listener: asyncio.Server | None = None
        self._url = ""

    @classmethod
    async def listen(cls, config: Http2Config, host: PlaneHost) -> Self:
        """Open the listener. Raises `ConnectFailed` for an address that cannot be bound; nothing is left open then."""
        bound, advertised = await own_place(config.host, host, what="requests are taken", setting="http2.host")
        if host.tls is not None:
            await asyncio.to_thread(host.tls.server_context, _ALPN)  # reads the files; raises without a certificate
        server = cls(config, host)
        listener = await listen(lambda: server._entrance(server._accept()), bound, config.port)
        server._listener = listener
        scheme = "http" if host.tls is None else "https"
        server._url = f"{scheme}://{join_host_port(advertised, listener.sockets[0].getsockname()[1])}"
        return server

    @property
    def url(self) -> str:
        """Scheme, host and port as advertised."""
        return self._url

    @property
    def open_streams(self) -> int:
        """Requests arriving, being answered, or waiting for their client to end them too."""
        return sum(len(session.streams) for session in self._sessions.values()) + self._desk.reception.open_streams

    @property
    def connections(self) -> int:
        """Open connections, of either version."""
        return len(self._sessions) + len(self._doorways) + self._http1.connections

    @property
    def counts(self) -> dict[str, int]:
        """Requests not taken, by status; HTTP/2 connections closed for what the client sent, under `protocol`."""
        return dict(self._desk.counts)

    # -- PlaneServer

    def register(self, path: str, sink: RequestSink) -> None:
        self._desk.sinks[path] = sink
        self._desk.reception.register(path, sink)

    def unregister(self, path: str) -> None:
        self._desk.sinks.pop(path, None)
        self._desk.reception.unregister(path)

    def describe(self, record: EndpointRecord, path: str) -> EndpointRecord:
        url = self._url + target_of(self._config.root_path, path)
        if isinstance(record.stator, NativeAddress):
            native = msgspec.structs.replace(record.stator, http2=VERSION)
        else:  # there is no native plane here: only what this one adds
            native = NativeAddress(plane=0, address="", process=self._host.process, http2=VERSION)
        return msgspec.structs.replace(record, transport=Transport(http=url), stator=native)

    def drain(self) -> None:
        self._desk.reception.draining = True
        for session in self._sessions.values():
            session.drain(DRAINING)

    async def aclose(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        self._entrance.close()
        for doorway in tuple(self._doorways):
            doorway.abort()
        await close_all(self._sessions, ConnectFailed("the worker closed its plane"), empty=self._empty)
        await self._http1.aclose()
        await self._desk.reception.aclose()
        await closed(listener, lambda: self.connections)

    # -- connections

    def _accept(self) -> asyncio.Protocol:
        if self.connections >= self._config.connections:
            self._desk.count("connections")
            return _Full()
        doorway = Doorway(self, wheel=self._wheel, patience=self._config.connect_timeout)
        self._doorways[doorway] = None
        if len(self._doorways) > self._config.greeting:
            oldest = next(iter(self._doorways))
            self._doorways.pop(oldest)
            oldest.abort()
        return doorway

    def decided(self, doorway: Doorway) -> None:
        """A doorway has become something else, or has ended."""
        self._doorways.pop(doorway, None)

    def answer_to_tls(self) -> bytes:
        """What is told to a client that speaks TLS where it is not set."""
        self._host.refusals.count("accepting", "encrypted")
        logger.warning("HTTP connection refused: it speaks TLS, which is not set here (tls.cert_path)")
        return ALERT

    def make_http1(self) -> asyncio.Protocol:
        """The protocol of a connection that speaks HTTP/1.1."""
        return self._http1.protocol()

    def make_http2(self) -> asyncio.Protocol:
        """The protocol of a connection that speaks HTTP/2, with its session."""
        connection = Http2Connection(wheel=self._wheel, patience=self._config.connect_timeout, lost=self._lost)
        session = Session(
            limits=self._limits,
            wake=connection.wake,
            now=self._wheel.now(),
            accept=lambda fields: self._take(session, fields),
        )
        if self._desk.draining:
            session.drain(DRAINING)
        connection.attach(session, look=look_every(self._limits))
        self._sessions[connection] = session
        return connection

    def _lost(self, connection: Http2Connection, reason: StatorError) -> None:
        self._sessions.pop(connection, None)
        if isinstance(reason, PeerProtocolError):
            self._desk.count(reason.code)
        if not self._sessions:
            self._empty.set()

    # -- streams

    def _take(self, session: Session, fields: Fields) -> Exchange:
        """The worker's end of a stream, by what its fields ask for."""
        facts = field_values(fields)
        if facts.get(":method") != "POST":
            return PlainAnswer(self._desk, session, 405, b"", allow=b"POST")
        path = self._desk.path(facts.get(":path", ""))
        if facts.get("content-type", "").partition(";")[0].strip() == STREAM_TYPE:
            return StreamAnswer(self._desk, session, path, facts)
        return PushedRequest(self._desk, session, path, facts)


class _Full(asyncio.Protocol):
    """What a client meets when there are too many connections: the end."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
