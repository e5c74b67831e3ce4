"""The HTTP/2 plane keeps the meaning of a request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stator.errors import NotTrusted, Unavailable, UsageError
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.ids import endpoint_path
from stator.protocol.records import EndpointRecord, NativeAddress, Transport
from stator.protocol.stream import Phase
from stator.runtime.admission import Admission, AdmissionConfig
from stator.runtime.engine import generate_function
from stator.runtime.serving import Serving
from stator.security import Tls
from stator.tasks import DeadlineWheel
from stator.testing.certificates import Authority, tls_of
from stator.testing.conversation_suite import ConversationSuite
from stator.testing.plane_pair import paired, plane_host
from stator.testing.plane_suite import INSTANCE, Caller, PlanePair, PlaneSuite, count, drain, eventually
from stator.transports.http2 import Http2Config, Http2Plane
from stator.transports.http2.client import Http2Client
from stator.transports.http2.server import Http2Server
from stator.transports.inbox import Inbox, Patience, PhaseLimits


@asynccontextmanager
async def http2_pair(
    config: Http2Config | None = None,
    *,
    resolution: float = 0.1,
    server_tls: Tls | None = None,
    client_tls: Tls | None = None,
    served_by: type[Http2Server] = Http2Server,
) -> AsyncIterator[PlanePair]:
    """Both sides; nothing is left on the wheels afterwards."""
    config = config or Http2Config()
    here, there = plane_host(resolution=resolution, tls=server_tls), plane_host(resolution=resolution, tls=client_tls)
    server = await served_by.listen(config, here)
    client = await Http2Client.start(config, there)
    async with paired(server, client, cut=client.cut, hosts=(here, there)) as pair:
        yield pair
    assert server.connections == client.connections == 0
    assert server._desk.budget.out == 0  # pyright: ignore[reportPrivateUsage]


def without_marker(record: EndpointRecord) -> EndpointRecord:
    """The record as 1.2.1 writes it."""
    return EndpointRecord(
        component=record.component,
        endpoint=record.endpoint,
        namespace=record.namespace,
        instance_id=record.instance_id,
        transport=record.transport,
    )


class CallingHomeServer(Http2Server):
    """Describes itself as 1.2.1 does, so that its callers wait for its calls."""

    def describe(self, record: EndpointRecord, path: str) -> EndpointRecord:
        return without_marker(super().describe(record, path))


class TestHttp2Plane(PlaneSuite):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        async with http2_pair() as pair:
            yield pair


class TestHttp2Conversations(ConversationSuite):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        async with http2_pair() as pair:
            yield pair


class TestCallingHomeOverHttp(PlaneSuite):
    """Requests over HTTP/2, answers as 1.2.1 gives them."""

    max_buffered = 20_000  # the kernel's buffers on loopback

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        async with http2_pair(served_by=CallingHomeServer) as pair:
            yield pair


# -- records


async def test_the_record_says_where_and_that_the_answer_is_a_stream() -> None:
    async with http2_pair(Http2Config(root_path="/mesh/rpc")) as pair:
        bare = EndpointRecord(
            component="b", endpoint="gen", namespace="n", instance_id=16, transport=Transport(tcp="1.2.3.4:5/x")
        )
        record = pair.server.describe(bare, "10/gen")
        assert record.transport.http is not None and record.transport.tcp is None
        assert record.transport.http.startswith("http://127.0.0.1:") and record.transport.http.endswith("/mesh/rpc/10/gen")
        assert isinstance(record.stator, NativeAddress)
        assert (record.stator.plane, record.stator.http2) == (0, 1)
        native = NativeAddress(plane=1, address="127.0.0.1:9", process="b" * 32)
        both = pair.server.describe(
            EndpointRecord(
                component="b", endpoint="gen", namespace="n", instance_id=16, transport=bare.transport, stator=native
            ),
            "10/gen",
        )
        assert both.stator == NativeAddress(plane=1, address="127.0.0.1:9", process="b" * 32, http2=1)
        plane = Http2Plane()
        assert plane.reaches(record) and plane.reaches(both) and not plane.reaches(bare)


# -- connections


async def test_streams_share_a_connection_and_a_second_one_is_made_when_they_are_used_up() -> None:
    release = asyncio.Event()

    async def waits(request: Any, context: Any) -> AsyncIterator[Any]:
        yield "here"
        await release.wait()

    async with http2_pair(Http2Config(max_streams=5)) as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), waits, "generate")
        assert isinstance(pair.client, Http2Client)
        five = [await caller.open(id=f"r{number}") for number in range(5)]
        assert pair.client.connections == 1
        more = await asyncio.gather(*(caller.open(id=f"s{number}") for number in range(7)))
        assert pair.client.connections == 3
        for inbox in (*five, *more):
            assert await inbox.more()
        release.set()
        for inbox in (*five, *more):
            assert await drain(inbox) == ["here"]
        await eventually(lambda: pair.open_streams() == 0, what="no stream left")


async def test_a_caller_waits_for_room_when_there_are_as_many_connections_as_there_may_be() -> None:
    async with http2_pair(Http2Config(max_streams=2, pool_size=1)) as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), count, "generate")
        results = await asyncio.gather(*(caller.collect({"n": n}, id=f"r{n}") for n in range(20)))
        assert results == [list(range(n)) for n in range(20)]
        assert isinstance(pair.client, Http2Client) and pair.client.connections == 1


async def test_an_idle_connection_is_closed_and_the_next_request_makes_another() -> None:
    async with http2_pair(Http2Config(idle_timeout=0.2), resolution=0.02) as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), count, "generate")
        assert isinstance(pair.client, Http2Client) and isinstance(pair.server, Http2Server)
        assert await caller.collect({"n": 1}) == [0]
        await eventually(lambda: pair.client.connections == 0, what="the connection was closed")  # type: ignore[attr-defined]
        await eventually(lambda: pair.server.connections == 0, what="on both sides")  # type: ignore[attr-defined]
        assert await caller.collect({"n": 2}) == [0, 1]


async def test_a_worker_that_drains_lets_streams_finish_and_takes_nothing_new() -> None:
    release = asyncio.Event()

    async def waits(request: Any, context: Any) -> AsyncIterator[Any]:
        yield 1
        await release.wait()
        yield 2

    async with http2_pair() as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), waits, "generate")
        assert isinstance(pair.client, Http2Client)
        inbox = await caller.open()
        assert await inbox.more()
        pair.server.drain()
        (line,) = pair.client._lines()  # pyright: ignore[reportPrivateUsage]
        await eventually(lambda: line.session.draining, what="the client was told")
        with pytest.raises(Unavailable, match="takes nothing new"):
            await caller.open(id="late")
        release.set()
        assert await drain(inbox) == [1, 2]


async def test_a_request_that_waits_for_a_slot_is_accepted_and_queued() -> None:
    release = asyncio.Event()

    async def waits(request: Any, context: Any) -> AsyncIterator[Any]:
        await release.wait()
        yield "done"

    async with http2_pair() as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), count, "generate")
        narrow = Serving(generate_function(waits), name="test.backend.narrow", admission=Admission(AdmissionConfig(slots=1)))
        path = endpoint_path(INSTANCE, "narrow")
        pair.server.register(path, narrow)
        record = pair.server.describe(caller.record, path)
        first = await caller.open(id="one", record=record)
        await first.opened()
        second = await caller.open(id="two", record=record)
        await eventually(lambda: second.phase is Phase.PROLOGUE, what="the second one is queued")
        stopped = await caller.open(id="three", record=record)
        stopped.stop()
        assert await drain(stopped) == []
        release.set()
        assert await drain(first) == ["done"]
        assert await drain(second) == ["done"]


async def test_a_request_that_is_too_large_is_not_sent() -> None:
    async with http2_pair(Http2Config(max_request=2**16)) as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), count, "generate")
        with pytest.raises(UsageError, match="larger than the limit of 65536 bytes"):
            await caller.open("x" * 2**16)
        assert pair.open_streams() == 0


async def test_a_request_id_that_no_header_field_can_carry() -> None:
    async def identity(request: Any, context: Any) -> AsyncIterator[Any]:
        yield context.id

    async with http2_pair() as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), identity, "generate")
        for odd in ("grün", " padded ", "two\r\nlines", ""):
            assert await caller.collect(id=odd) == [odd]


# -- TLS


class TestHttp2OverTls(PlaneSuite):
    tls: Tls

    @pytest.fixture(autouse=True)
    def certificates(self, tmp_path: Path) -> None:
        self.tls = tls_of(Authority(tmp_path))

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        async with http2_pair(server_tls=self.tls, client_tls=self.tls) as pair:
            yield pair


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    """A process with certificates."""
    return tls_of(Authority(tmp_path))


async def test_plaintext_to_tls_and_the_reverse_are_refused(tls: Tls) -> None:
    wheel = DeadlineWheel(asyncio.get_running_loop(), resolution=0.02)
    async with http2_pair() as plain, http2_pair(server_tls=tls, client_tls=tls) as closed:
        for mine, theirs in ((plain, closed), (closed, plain)):
            caller = Caller(theirs, wheel, count, "generate")
            inbox = Inbox(wheel=wheel, patience=Patience(PhaseLimits()), instance=INSTANCE)
            with pytest.raises(NotTrusted):
                await mine.client.open(caller.record, RequestEnvelope(id="r", payload=b"{}"), inbox)
            inbox.kill()


async def test_an_http_client_without_tls_is_told_in_http(tls: Tls) -> None:
    async with http2_pair(server_tls=tls, client_tls=tls) as pair:
        assert isinstance(pair.server, Http2Server)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(pair.server.url.rpartition(":")[2]))
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        async with asyncio.timeout(5):
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
