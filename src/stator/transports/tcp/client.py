"""The caller's side of the compatible plane: pushes requests to workers, waits for their calls."""

import asyncio

from stator.errors import ConnectFailed, Disconnected, StatorError
from stator.protocol.envelope import Codec, RequestEnvelope
from stator.protocol.records import EndpointRecord
from stator.protocol.request_frame import encode_request_frame
from stator.tasks import Scope
from stator.transports.closing import closed
from stator.transports.inbox import Inbox
from stator.transports.opening import while_wanted
from stator.transports.plane import PlaneHost
from stator.transports.tcp.address import InstanceAddress
from stator.transports.tcp.call_home import CallHomeListener, ExpectedStream
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.headers import request_headers
from stator.transports.tcp.request_line import RequestPool
from stator.transports.tcp.request_message import codec_of, request_parts

__all__ = ["CompatibleClient"]


class CompatibleClient:
    """`PlaneClient` of the compatible TCP plane. Made by `CompatibleClient.start`."""

    def __init__(self, *, config: TcpConfig, host: PlaneHost, listener: CallHomeListener) -> None:
        self._config = config
        self._host = host
        self._wheel = host.wheel
        self._clock = host.clock
        self._listener = listener
        self._traffic = host.traffic
        self._pools: dict[tuple[str, int], RequestPool] = {}
        self._dials = Scope("request dials")
        self._connects = asyncio.Semaphore(config.concurrent_connects)
        self._closed = False

    @classmethod
    async def start(cls, config: TcpConfig, host: PlaneHost) -> "CompatibleClient":
        """Open the listener for answers. Raises `ConnectFailed` for an address that cannot be bound."""
        listener = await CallHomeListener.listen(config, host)
        listener.traffic = host.traffic
        return cls(config=config, host=host, listener=listener)

    @property
    def call_home_address(self) -> str:
        """`host:port` that workers are told."""
        return self._listener.address

    @property
    def open_streams(self) -> int:
        """Requests whose call-home is awaited or whose connection has not ended."""
        return self._listener.open_streams

    @property
    def request_connections(self) -> int:
        """Open connections to workers' request listeners."""
        return sum(len(pool.lines) for pool in self._pools.values())

    # -- PlaneClient

    async def open(self, record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        instance = record.instance_id
        address = InstanceAddress.parse(record.transport.tcp or "", instance=instance)
        self._listener.check_reachable_from(address.host, instance)
        pool = self._pool(address)
        line = pool.line()
        if line is None:
            async with while_wanted(inbox):
                try:
                    line = await pool.wait(instance)
                except StatorError:
                    self._traffic.failed += 1
                    raise
        if inbox.ended:
            return
        # From here to the end nothing waits: the subject is registered and the request is sent, or neither.
        codec = codec_of(record, self._config.codec)
        stream = self._listener.expect(inbox, codec, inputs=envelope.streams_in)
        try:
            frame = self._frame(address.path, envelope, stream, codec)
        except BaseException:
            stream.withdraw()
            raise
        stream.begin()
        self._traffic.sent += len(frame)
        line.send(frame, stream)

    def forget(self, record: EndpointRecord) -> None:
        self._listener.forget_instance(record.instance_id)

    async def aclose(self) -> None:
        self._closed = True
        await self._dials.aclose()
        for pool in tuple(self._pools.values()):
            pool.abort(Disconnected("the client closed its plane"))
        await self._listener.aclose()
        await closed(None, lambda: self.request_connections)

    def cut(self) -> None:
        """Break every connection without a goodbye, as a lost network would."""
        for pool in tuple(self._pools.values()):
            pool.abort(Disconnected("the network was cut"))
        self._listener.cut()

    # -- requests

    def _frame(self, path: str, envelope: RequestEnvelope, stream: ExpectedStream, codec: Codec) -> bytes:
        """The request frame. Raises `UsageError` when the request is too large."""
        return encode_request_frame(
            path,
            request_headers(path, envelope, wall=self._clock.wall()),
            *request_parts(envelope, stream, codec),
            limit=self._config.max_message_size,
        )

    def _pool(self, address: InstanceAddress) -> RequestPool:
        if self._closed:
            raise ConnectFailed("the client closed its plane", phase="connect")
        key = (address.host, address.port)
        pool = self._pools.get(key)
        if pool is None:
            pool = self._pools[key] = RequestPool(
                address.host,
                address.port,
                config=self._config,
                wheel=self._wheel,
                tls=self._host.tls,
                refusals=self._host.refusals,
                dials=self._dials,
                connects=self._connects,
                empty=self._drop,
            )
        return pool

    def _drop(self, pool: RequestPool) -> None:
        """The last connection of a pool ended."""
        if self._pools.get((pool.host, pool.port)) is pool:
            del self._pools[pool.host, pool.port]
