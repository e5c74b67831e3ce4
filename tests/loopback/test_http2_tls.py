"""Who is let in over HTTP/2 with TLS, and what the others are told."""

import asyncio
import ssl
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path

import aiohttp
import msgspec
import pytest

from loopback.test_http2_plane import http2_pair
from stator.errors import ConnectFailed, NotTrusted
from stator.security import Tls, TlsConfig
from stator.tasks import DeadlineWheel, SystemClock
from stator.testing.certificates import Authority, tls_of
from stator.testing.conversation_suite import ConversationSuite
from stator.testing.plane_suite import Caller, PlanePair, count
from stator.transports.http2.client import Http2Client
from stator.transports.http2.server import Http2Server

pytestmark = pytest.mark.timeout(30)


def process(
    authority: Authority, name: str, *, trusts: Authority | None = None, server_name: str = "stator", **issued: timedelta
) -> Tls:
    """A process whose certificate is issued as told."""
    cert, key = authority.issue(name, **issued)  # type: ignore[arg-type]
    trusted = (trusts or authority).path
    config = TlsConfig(
        cert_path=cert,
        key_path=key,
        ca_cert_path=trusted,
        client_ca_cert_path=trusted,
        server_name=server_name,
        handshake_timeout=1.0,
    )
    return Tls(config, clock=SystemClock())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def two(server_tls: Tls, client_tls: Tls) -> AbstractAsyncContextManager[PlanePair]:
    return http2_pair(server_tls=server_tls, client_tls=client_tls)


@pytest.fixture(params=["wrong authority", "expired", "not yet valid", "wrong name", "no certificate"])
def strangers(request: pytest.FixtureRequest, authority: Authority, tmp_path: Path) -> tuple[Tls, Tls, set[str]]:
    """Two processes that do not trust each other, and the reasons of it that may be counted."""
    good = tls_of(authority, "good")
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    match request.param:
        case "wrong authority":
            return good, tls_of(other, "stranger"), {"untrusted"}
        case "expired":
            return process(authority, "old", begins=timedelta(hours=-2), ends=timedelta(hours=-1)), good, {"expired"}
        case "not yet valid":
            return process(authority, "new", begins=timedelta(hours=1), ends=timedelta(hours=2)), good, {"expired"}
        case "wrong name":
            return (
                good,
                process(authority, "caller", server_name="somebody-else"),
                {"wrong_name", "bad_certificate", "untrusted"},
            )
        case _:
            bare = TlsConfig(ca_cert_path=authority.path, server_name="stator", handshake_timeout=1.0)
            return good, Tls(bare, clock=SystemClock()), {"no_certificate"}


async def test_strangers_are_refused_with_a_reason_and_counted(strangers: tuple[Tls, Tls, set[str]]) -> None:
    server_tls, client_tls, reasons = strangers
    async with two(server_tls, client_tls) as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), count, "generate")
        async with asyncio.timeout(5):
            with pytest.raises(NotTrusted) as caught:
                await caller.collect({"n": 1})
        assert caught.value.reason in reasons
        assert caught.value.phase == "connect"
        assert not caller.contexts
        counted = [pair.client._host.refusals, pair.server._host.refusals]  # type: ignore[attr-defined]
        assert sum(each.of(reason) for each in counted for reason in reasons) >= 1


async def test_certificates_that_changed_are_shown_to_the_next_connection(authority: Authority) -> None:
    server_tls, client_tls = await asyncio.to_thread(lambda: (tls_of(authority, "worker"), tls_of(authority, "caller")))
    async with two(server_tls, client_tls) as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), count, "generate")
        assert await caller.collect({"n": 2}) == [0, 1]
        assert isinstance(pair.client, Http2Client)
        (line,) = pair.client._lines()  # pyright: ignore[reportPrivateUsage]
        first = line.connection._transport.get_extra_info("peercert")["serialNumber"]  # type: ignore[union-attr]
        await asyncio.to_thread(authority.issue, "worker")
        assert await asyncio.to_thread(server_tls.look)
        assert await caller.collect({"n": 2}) == [0, 1]
        pair.client.cut()
        assert await caller.collect({"n": 2}) == [0, 1]
        (line,) = pair.client._lines()  # pyright: ignore[reportPrivateUsage]
        assert line.connection._transport.get_extra_info("peercert")["serialNumber"] != first  # type: ignore[union-attr]


async def test_who_does_not_agree_to_http2_is_a_failed_connect(authority: Authority) -> None:
    tls = await asyncio.to_thread(tls_of, authority)
    context = await asyncio.to_thread(tls.server_context, ("http/1.1",))
    assert isinstance(context, ssl.SSLContext)
    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda reader, writer: writers.append(writer), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    async with two(tls, tls) as pair:
        caller = Caller(pair, DeadlineWheel(asyncio.get_running_loop(), resolution=0.02), count, "generate")
        url = f"https://127.0.0.1:{port}/v1/rpc/1/x"
        record = msgspec.structs.replace(caller.record, transport=msgspec.structs.replace(caller.record.transport, http=url))
        with pytest.raises(ConnectFailed, match="ALPN"):
            await caller.collect({"n": 1}, record=record)
    for writer in writers:
        writer.transport.abort()
    server.close()
    await server.wait_closed()


async def test_older_peers_are_answered_over_tls_too(authority: Authority) -> None:
    tls = await asyncio.to_thread(tls_of, authority, mutual=False)
    context = await asyncio.to_thread(tls.client_context, ("http/1.1",))
    async with two(tls, tls) as pair:
        assert isinstance(pair.server, Http2Server)
        connector = aiohttp.TCPConnector(ssl=context)
        async with aiohttp.ClientSession(connector=connector) as session:
            response = await session.post(pair.server.url + "/v1/rpc/1/x", data=b"x", server_hostname="stator")
            assert (response.status, await response.read()) == (404, b"Endpoint not found")


class TestConversationsOverTls(ConversationSuite):
    tls: Tls

    @pytest.fixture(autouse=True)
    def certificates(self, tmp_path: Path) -> None:
        self.tls = tls_of(Authority(tmp_path))

    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        return two(self.tls, self.tls)
