"""Requests mean the same over TLS, mutual, and with a cluster secret, on the native and on the compatible plane."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from stator.protocol.records import EndpointRecord, Transport
from stator.security import Tls
from stator.tasks import Scope
from stator.testing.certificates import Authority, tls_of
from stator.testing.conversation_suite import ConversationSuite
from stator.testing.native_pair import CLIENT_PROCESS
from stator.testing.native_sockets import native_address, native_planes, with_native
from stator.testing.plane_pair import paired, plane_host
from stator.testing.plane_suite import Caller, PlanePair, PlaneSuite, count, eventually
from stator.transports.native import NativeConfig
from stator.transports.plane import PlaneHost
from stator.transports.tcp import CompatibleClient, CompatibleServer, TcpConfig

pytestmark = pytest.mark.timeout(120)

SECRET = "correct horse battery staple"


@cache
def certificates() -> tuple[tempfile.TemporaryDirectory[str], Tls, Tls]:
    """One authority for the whole run: a worker's certificates and a client's."""
    directory = tempfile.TemporaryDirectory(prefix="stator-test-tls-")
    authority = Authority(Path(directory.name))
    return directory, tls_of(authority, "worker", patience=20.0), tls_of(authority, "client", patience=20.0)


@pytest.fixture(autouse=True)
def certificates_made() -> None:
    """Before there is a loop: files are written and read."""
    certificates()


def hosts(*, tls: bool = True, secret: str = "", directory: Path | None = None) -> tuple[PlaneHost, PlaneHost]:
    """A worker's and a client's."""
    _, worker, client = certificates()
    return (
        plane_host(tls=worker if tls else None, secret=secret, directory=directory),
        plane_host(CLIENT_PROCESS, tls=client if tls else None, secret=secret),
    )


@asynccontextmanager
async def native(here: PlaneHost, there: PlaneHost, *, unix: bool = False) -> AsyncIterator[PlanePair]:
    async with native_planes(NativeConfig(unix=unix), here, there) as pair:
        yield pair
    assert not here.refusals.counts and not there.refusals.counts


@asynccontextmanager
async def compatible(here: PlaneHost, there: PlaneHost) -> AsyncIterator[PlanePair]:
    config = TcpConfig(connect_timeout=20.0)  # each answer is a handshake, and hundreds are made at once
    server = await CompatibleServer.listen(config, here)
    client = await CompatibleClient.start(config, there)
    async with paired(server, client, cut=client.cut) as pair:
        yield pair
    assert not here.refusals.counts and not there.refusals.counts


class TestNativeTls(PlaneSuite):
    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return native(*hosts())


class TestNativeTlsSecret(PlaneSuite):
    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return native(*hosts(secret=SECRET))


class TestNativeUnixSecret(PlaneSuite):
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        with tempfile.TemporaryDirectory() as directory:
            async with native(*hosts(tls=False, secret=SECRET, directory=Path(directory)), unix=True) as pair:
                yield pair


class TestCompatibleTls(PlaneSuite):
    max_buffered = 20_000  # the kernel's buffers on loopback

    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return compatible(*hosts())


class TestNativeTlsConversations(ConversationSuite):
    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return native(*hosts(secret=SECRET))


class TestCompatibleTlsConversations(ConversationSuite):
    max_buffered = 20_000
    patience = 40.0  # two handshakes for each of them

    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return compatible(*hosts())


class Overhearing(asyncio.Protocol):
    """Somebody on the way, who passes on what both sides say and keeps it."""

    def __init__(self, heard: list[bytes], host: str, port: int, scope: Scope) -> None:
        self._heard = heard
        self._onward = (host, port)
        self._scope = scope
        self._other: Overhearing | None = None
        self._transport: asyncio.Transport | None = None
        self._waiting: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._other is None:
            self._other = Overhearing(self._heard, *self._onward, self._scope)
            self._other._other = self
            other = self._other
            self._scope.spawn(asyncio.get_running_loop().create_connection(lambda: other, *self._onward))
        self._transport.write(b"".join(self._waiting))

    def data_received(self, data: bytes) -> None:
        self._heard.append(data)
        assert self._other is not None
        if self._other._transport is None:
            self._other._waiting.append(data)
        else:
            self._other._transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._other is not None and self._other._transport is not None:
            self._other._transport.close()


@asynccontextmanager
async def overheard(address: str, heard: list[bytes]) -> AsyncIterator[str]:
    """An address from which everything is passed on to `address`."""
    host, _, port = address.rpartition(":")
    async with Scope("overhearing") as scope:
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: Overhearing(heard, host, int(port), scope), "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        finally:
            listener.close()


@pytest.mark.parametrize("plane", ["native", "compatible"])
async def test_what_is_said_is_encrypted(plane: str) -> None:
    heard: list[bytes] = []
    here, there = hosts()
    async with asyncio.timeout(20), (native if plane == "native" else compatible)(here, there) as pair:
        caller = Caller(pair, here.wheel, count, "generate")
        tcp = caller.record.transport.tcp or ""
        address = native_address(caller.record).address if plane == "native" else tcp.partition("/")[0]
        async with overheard(address, heard) as through:
            if plane == "native":
                record = with_native(caller.record, address=through)
            else:
                record = msgspec.structs.replace(caller.record, transport=Transport(tcp=tcp.replace(address, through)))
            assert await caller.collect({"n": 3, "word": "supercalifragilistic"}, record=record) == [0, 1, 2]
    everything = b"".join(heard)
    assert everything[:2] == b"\x16\x03"
    assert b"supercalifragilistic" not in everything and b"generate" not in everything


@pytest.fixture
def renewable(tmp_path: Path) -> tuple[Authority, Tls, Tls]:
    authority = Authority(tmp_path)
    return authority, tls_of(authority, "worker"), tls_of(authority, "client")


async def shown(record: EndpointRecord, client: Tls) -> str:
    """The serial number of the certificate that a worker shows on a new connection."""
    host, _, port = native_address(record).address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=client.client_context(), server_hostname="stator")
    found = writer.get_extra_info("peercert")["serialNumber"]
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return str(found)


async def test_renewed_certificates_are_used_without_a_restart(renewable: tuple[Authority, Tls, Tls]) -> None:
    authority, worker, client = renewable
    here, there = plane_host(tls=worker), plane_host(CLIENT_PROCESS, tls=client)
    async with native(here, there) as pair, Scope("certificates") as scope, asyncio.timeout(20):
        caller = Caller(pair, here.wheel, count, "generate")
        scope.spawn(worker.follow(), name="worker's")
        before = await shown(caller.record, client)
        assert await caller.collect({"n": 1}) == [0]
        await asyncio.to_thread(authority.issue, "worker")
        while await shown(caller.record, client) == before:
            await asyncio.sleep(0.1)
        assert await caller.collect({"n": 2}) == [0, 1]  # the connection that was there goes on


async def test_closing_does_not_wait_for_an_idle_handshake() -> None:
    here, there = hosts()
    async with native(here, there) as pair, asyncio.timeout(10):
        caller = Caller(pair, here.wheel, count, "generate")
        host, _, port = native_address(caller.record).address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        server: Any = pair.server
        await eventually(lambda: len(server._entrance._shaking) == 1, what="it is accepted")  # and says nothing
        started = asyncio.get_running_loop().time()
        await pair.server.aclose()
        with suppress(ConnectionError):
            assert await reader.read(100) == b""
        assert asyncio.get_running_loop().time() - started < 5  # the handshake had twenty seconds
        writer.close()
