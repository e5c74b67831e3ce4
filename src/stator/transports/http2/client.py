"""The caller's side of the HTTP/2 plane: a request and its answer are one stream, or the answer calls home."""

import asyncio

from hpack import NeverIndexedHeaderTuple

from stator.errors import ConnectFailed, Disconnected
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.http2_map import (
    PUSH_TYPE,
    STREAM_TYPE,
    VERSION,
    Fields,
    HttpAddress,
    encode_request,
    field_value,
)
from stator.protocol.records import EndpointRecord, NativeAddress
from stator.protocol.stream import Phase
from stator.tasks import Scope
from stator.transports.closing import closed
from stator.transports.http2.call import StreamCall
from stator.transports.http2.config import Http2Config
from stator.transports.http2.limits import session_limits
from stator.transports.http2.line import Http2Pool, Line, LineHost
from stator.transports.http2.push_call import PushCall
from stator.transports.inbox import Inbox
from stator.transports.opening import while_wanted
from stator.transports.plane import PlaneHost
from stator.transports.tcp.call_home import CallHomeListener
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.headers import request_headers
from stator.transports.tcp.request_message import codec_of, request_parts

__all__ = ["Http2Client"]


class Http2Client:
    """`PlaneClient` of the HTTP/2 plane. Made by `Http2Client.start`."""

    def __init__(self, config: Http2Config, host: PlaneHost) -> None:
        self._config = config
        self._host = host
        self._wheel = host.wheel
        self._pools: dict[HttpAddress, Http2Pool] = {}
        self._dials = Scope("HTTP/2 dials")
        self._shared = LineHost(config=config, limits=session_limits(config, worker=False), host=host, dials=self._dials)
        self._home: CallHomeListener | None = None
        self._opening_home = asyncio.Lock()
        self._closed = False

    @classmethod
    async def start(cls, config: Http2Config, host: PlaneHost) -> "Http2Client":
        """Connections are made on first use, the listener for answers when a worker is met that calls home. Raises `ConfigError` for
        certificates that cannot be read.
        """
        if host.tls is not None:
            await asyncio.to_thread(host.tls.client_context, ("h2",))
        return cls(config, host)

    @property
    def open_streams(self) -> int:
        """Requests whose stream has not ended on both sides, and those whose call-home is awaited or goes on."""
        home = 0 if self._home is None else self._home.open_streams
        return home + sum(len(line.session.streams) for line in self._lines())

    @property
    def connections(self) -> int:
        """Open connections to workers."""
        return len(self._lines())

    # -- PlaneClient

    async def open(self, record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        instance = record.instance_id
        address = HttpAddress.parse(record.transport.http or "", instance=instance)
        streams = isinstance(record.stator, NativeAddress) and record.stator.http2 >= VERSION
        home = None if streams else await self._reachable_home(address.host, instance)
        pool = self._pool(address)
        line = pool.line()
        if line is None:
            async with while_wanted(inbox):
                line = await pool.wait(instance)
        if inbox.ended:
            return
        # From here to the end nothing waits: the request is sent, or nothing is.
        if home is None:
            self._stream(line, address, envelope, inbox)
        else:
            self._push(line, address, record, envelope, inbox, home)

    def forget(self, record: EndpointRecord) -> None:
        if self._home is not None:
            self._home.forget_instance(record.instance_id)
        reason = "the instance left discovery before it accepted the request"
        for line in self._lines():
            for exchange in tuple(line.session.streams.values()):
                if exchange.instance == record.instance_id and isinstance(exchange, StreamCall):
                    exchange.give_up(Disconnected(reason, instance=record.instance_id, phase="accept"))

    async def aclose(self) -> None:
        self._closed = True
        await self._dials.aclose()
        for line in self._lines():
            line.connection.close(Disconnected("the client closed its plane"))
        if self._home is not None:
            await self._home.aclose()
        await closed(None, lambda: self.connections)
        for line in self._lines():
            line.connection.abort(Disconnected("the client closed its plane"))

    def cut(self) -> None:
        """Break every connection without a goodbye, as a lost network would."""
        for line in self._lines():
            line.connection.abort(Disconnected("the network was cut"))
        if self._home is not None:
            self._home.cut()

    # -- requests

    def _stream(self, line: Line, address: HttpAddress, envelope: RequestEnvelope, inbox: Inbox) -> None:
        """Send a request whose answer is the response body. Raises `UsageError` when it is too large."""
        frame = encode_request(envelope, limit=self._config.max_request)
        call = StreamCall(inbox, line.session, max_item=self._config.max_item, max_input=self._config.max_request)
        line.session.open(call, self._fields(address, envelope, STREAM_TYPE.encode()))
        call.push(frame)
        inbox.link = call
        inbox.advance(Phase.ACCEPT)

    def _push(
        self,
        line: Line,
        address: HttpAddress,
        record: EndpointRecord,
        envelope: RequestEnvelope,
        inbox: Inbox,
        home: CallHomeListener,
    ) -> None:
        """Send a request whose answer calls home. Raises `UsageError` when it is too large; nothing is expected then."""
        codec = codec_of(record, "json")
        stream = home.expect(inbox, codec, inputs=envelope.streams_in)
        try:
            parts = request_parts(envelope, stream, codec)
        except BaseException:
            stream.withdraw()
            raise
        call = PushCall(stream, wheel=self._wheel, limit=self._config.request_timeout)
        line.session.open(call, self._fields(address, envelope, PUSH_TYPE.encode()))
        stream.begin()
        call.push(b"".join(parts))
        call.finish()
        self._host.traffic.sent += sum(map(len, parts))

    def _fields(self, address: HttpAddress, envelope: RequestEnvelope, content_type: bytes) -> Fields:
        """The request's header fields; what cannot be one is left out."""
        fields: list[tuple[bytes, bytes]] = [
            (b":method", b"POST"),
            (b":scheme", b"https" if address.secure else b"http"),
            (b":authority", address.authority.encode()),
            (b":path", address.target.encode()),
            (b"content-type", content_type),
        ]
        for name, value in request_headers("", envelope, wall=self._host.clock.wall()).items():
            found = field_value(value)
            if found:  # other ones each time: in the table of fields they would only push out those above
                fields.append(NeverIndexedHeaderTuple(name.encode(), found.encode()))
        return fields

    # -- connections

    def _lines(self) -> list[Line]:
        return [line for pool in self._pools.values() for line in pool.lines]

    def _pool(self, address: HttpAddress) -> Http2Pool:
        if self._closed:
            raise ConnectFailed("the client closed its plane", phase="connect")
        origin = HttpAddress(address.host, address.port, address.secure, "")
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = Http2Pool(origin, self._shared, empty=self._drop)
        return pool

    def _drop(self, pool: Http2Pool) -> None:
        """The last connection of a pool ended."""
        if self._pools.get(pool.address) is pool:
            del self._pools[pool.address]

    # -- home

    async def _reachable_home(self, host: str, instance: int) -> CallHomeListener:
        """The listener for answers. Raises `ConfigError` when the worker cannot reach it."""
        async with self._opening_home:
            if self._closed:
                raise ConnectFailed("the client closed its plane", instance=instance, phase="connect")
            if self._home is None:
                self._home = await CallHomeListener.listen(self._host.load(TcpConfig), self._host)
                self._home.traffic = self._host.traffic
        self._home.check_reachable_from(host, instance)
        return self._home
