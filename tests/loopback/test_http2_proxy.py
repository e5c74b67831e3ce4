"""The meaning of a request survives a proxy that understands HTTP/2: other frames, other windows, other stream numbers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from stator.errors import Disconnected, StatorError
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_library import SessionLimits
from stator.protocol.http2_map import Fields
from stator.protocol.http2_session import Session
from stator.protocol.records import EndpointRecord, Transport
from stator.tasks import DeadlineWheel, Scope
from stator.testing.conversation_suite import ConversationSuite
from stator.testing.plane_pair import plane_host
from stator.testing.plane_suite import PlanePair, PlaneSuite
from stator.transports.http2 import Http2Config
from stator.transports.http2.client import Http2Client
from stator.transports.http2.connection import Http2Connection
from stator.transports.http2.server import Http2Server

_GONE = 2
"""INTERNAL_ERROR: what a proxy says of a stream whose other half is gone"""


class Leg(Exchange):
    """One half of a proxied stream; bytes are taken from it as fast as the other half passes them on."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.own = session
        self.other: Leg

    def headers(self, fields: Fields) -> None:
        if self.other.number:
            self.other.own.respond(self.other, [*fields, (b"via", b"2 proxy")])
        else:
            self.other.own.open(
                self.other, [*fields, (b"x-forwarded-for", b"192.0.2.7"), (b"x-request-id", b"made-by-the-proxy")]
            )

    def data(self, data: bytes) -> None:
        for start in range(0, len(data), 5000):
            self.other.push(data[start : start + 5000])

    def drained(self) -> None:
        self.other.release()

    def ended(self) -> None:
        self.other.finish()

    def lost(self, error: StatorError) -> None:
        self.other.reset(_GONE)


class Relay:
    """Accepts connections and makes one to the worker for each."""

    limits = SessionLimits(window=65_535, connection_window=1_000_000, frame=16_384)

    def __init__(self, wheel: DeadlineWheel, port: int) -> None:
        self.wheel = wheel
        self.port = port
        self.dials = Scope("proxy dials")
        self.connections: set[Http2Connection] = set()
        self.sessions: set[Session] = set()

    @property
    def streams(self) -> int:
        return sum(len(session.streams) for session in self.sessions)

    def _connection(self) -> Http2Connection:
        connection = Http2Connection(wheel=self.wheel, patience=5, lost=self._lost)
        self.connections.add(connection)
        return connection

    def accept(self) -> asyncio.Protocol:
        near, far = self._connection(), self._connection()
        now = self.wheel.now()

        def take(fields: Fields) -> Exchange:
            here, there = Leg(towards_client), Leg(towards_worker)
            here.other, there.other = there, here
            return here

        towards_client = Session(limits=self.limits, wake=near.wake, now=now, accept=take)
        towards_worker = Session(limits=self.limits, wake=far.wake, now=now)
        near.attach(towards_client, look=1.0)
        far.attach(towards_worker, look=1.0)
        self.sessions |= {towards_client, towards_worker}
        self.dials.spawn(self._dial(far, towards_worker))
        return near

    async def _dial(self, far: Http2Connection, session: Session) -> None:
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, "127.0.0.1", self.port)
        except OSError as error:
            self.connections.discard(far)
            session.close(str(error))

    def _lost(self, connection: Http2Connection, reason: StatorError) -> None:
        self.connections.discard(connection)

    def cut(self) -> None:
        for connection in tuple(self.connections):
            connection.abort(Disconnected("cut"))


class ProxiedServer(Http2Server):
    """Says that it is where its proxy is."""

    proxy = ""

    def describe(self, record: EndpointRecord, path: str) -> EndpointRecord:
        described = super().describe(record, path)
        url = (described.transport.http or "").replace(self.url, self.proxy)
        return msgspec.structs.replace(described, transport=Transport(http=url))


@asynccontextmanager
async def proxied_pair() -> AsyncIterator[PlanePair]:
    here, there = plane_host(), plane_host()
    server = await ProxiedServer.listen(Http2Config(), here)
    assert isinstance(server, ProxiedServer)
    client = await Http2Client.start(Http2Config(), there)
    relay = Relay(DeadlineWheel(asyncio.get_running_loop()), int(server.url.rpartition(":")[2]))
    listener = await asyncio.get_running_loop().create_server(relay.accept, "127.0.0.1", 0)
    server.proxy = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"

    def cut() -> None:
        client.cut()
        relay.cut()

    try:
        yield PlanePair(
            server=server,
            client=client,
            cut=cut,
            open_streams=lambda: server.open_streams + client.open_streams + relay.streams,
        )
    finally:
        await client.aclose()
        await server.aclose()
        listener.close()
        relay.cut()
        await relay.dials.aclose()
        await listener.wait_closed()


class TestThroughAProxy(PlaneSuite):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        async with proxied_pair() as pair:
            yield pair


class TestConversationsThroughAProxy(ConversationSuite):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        async with proxied_pair() as pair:
            yield pair
