"""The worker's side of the compatible plane on TCP: takes requests, acknowledges them, answers each by calling home."""

import asyncio

import msgspec

from stator.protocol.records import EndpointRecord, Transport
from stator.security import Entrance
from stator.transports.address import join_host_port, numeric_host
from stator.transports.closing import closed
from stator.transports.listening import listen
from stator.transports.plane import PlaneHost, RequestSink
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.reception import Reception
from stator.transports.tcp.request_listener import RequestConnection

__all__ = ["CompatibleServer"]


class CompatibleServer:
    """`PlaneServer` of the compatible TCP plane. Made by `CompatibleServer.listen`."""

    def __init__(self, *, config: TcpConfig, host: PlaneHost) -> None:
        """Raises `ConfigError` when TLS is set and there is no certificate to show."""
        self._config = config
        self._wheel = host.wheel
        self._refusals = host.refusals
        self._entrance = Entrance(tls=host.tls, refusals=host.refusals)
        self._reception = Reception(
            config=config, wheel=host.wheel, input_timeout=host.input_timeout, tls=host.tls, refusals=host.refusals
        )
        self._connections: set[RequestConnection] = set()
        self._listener: asyncio.Server | None = None
        self._address = ""

    @classmethod
    async def listen(cls, config: TcpConfig, host: PlaneHost) -> "CompatibleServer":
        """Open the listener. Raises `ConnectFailed` for an address that cannot be bound; nothing is left open then."""
        bound, advertised = await numeric_host(host.bind_host), await numeric_host(host.advertise_host)
        server = cls(config=config, host=host)
        listener = await listen(lambda: server._entrance(server._accept()), bound, config.port)
        server._listener = listener
        server._address = join_host_port(advertised, listener.sockets[0].getsockname()[1])
        return server

    @property
    def address(self) -> str:
        """`host:port` as advertised."""
        return self._address

    @property
    def open_streams(self) -> int:
        """Requests queued, being answered, or whose connection has not ended."""
        return self._reception.open_streams

    # -- PlaneServer

    def register(self, path: str, sink: RequestSink) -> None:
        self._reception.register(path, sink)

    def unregister(self, path: str) -> None:
        self._reception.unregister(path)

    def describe(self, record: EndpointRecord, path: str) -> EndpointRecord:
        return msgspec.structs.replace(record, transport=Transport(tcp=f"{self._address}/{path}"))

    def drain(self) -> None:
        self._reception.draining = True

    async def aclose(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        self._entrance.close()
        for connection in tuple(self._connections):
            connection.abort()
        await self._reception.aclose()
        await closed(listener, lambda: len(self._connections))

    # -- connections

    def _accept(self) -> RequestConnection:
        connection = RequestConnection(
            take=self._reception.take,
            gone=self._connections.discard,
            limit=self._config.max_message_size,
            wheel=self._wheel,
            refusals=self._refusals,
        )
        self._connections.add(connection)
        return connection
