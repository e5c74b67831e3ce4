"""Connecting to NATS servers that want to know who comes, speak TLS, keep streams, or are not what they should be."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stator.config import Secret
from stator.errors import ConfigError
from stator.testing.certificates import Authority
from stator.testing.nats_identity import NatsIdentity, NatsOperator
from stator.testing.nats_server import NatsServer, nats_server
from stator.testing.plane_suite import eventually
from stator.transports.nats import NatsConfig
from stator.transports.nats.connection import NatsConnection
from stator.transports.nats.wire import Message

pytestmark = pytest.mark.timeout(60)

USER = {"authorization": '{ user: "me", password: "pass word" }'}
TOKEN = {"authorization": '{ token: "t0ken" }'}


def config(server: NatsServer, **settings: Any) -> NatsConfig:
    return NatsConfig(servers=(server.url,), **{"reconnect_first": 0.02, "reconnect_most": 0.1, **settings})


@asynccontextmanager
async def connection(own: NatsConfig) -> AsyncGenerator[NatsConnection, None]:
    """Tried once, whatever came of it."""
    made = NatsConnection(own, random=Random(1), name="test", meanwhile="nothing happens")
    try:
        await made.start()
        yield made
    finally:
        await made.aclose()


async def carries(made: NatsConnection) -> bool:
    """Whether a message gets through."""
    arrived: list[Message] = []
    listening = made.listen("a.subject", arrived.append)
    made.publish("a.subject", b"hello", reply="some.where", headers=b"NATS/1.0\r\na: b\r\n\r\n")
    await made.settled()
    made.leave(listening)
    return arrived == [Message("a.subject", b"hello", "some.where", b"NATS/1.0\r\na: b\r\n\r\n")]


async def refused(own: NatsConfig) -> str:
    """Why there is no connection."""
    async with connection(own) as made:
        assert not made.connected
        assert not made.publish("a.subject", b"hello")
        return made.reason


# -- logins


@contextmanager
def guarded(directory: Path, kind: str) -> Generator[tuple[NatsServer, dict[str, Any]], None, None]:
    """A server that wants a login, and the settings that have it."""
    good: dict[str, Any] = {}
    match kind:
        case "user":
            settings, good = USER, {"auth_username": "me", "auth_password": Secret("pass word")}
        case "token":
            settings, good = TOKEN, {"auth_token": Secret("t0ken")}
        case "nkey":
            identity = NatsIdentity("user")
            settings = {"authorization": f"{{ users: [ {{ nkey: {identity.public} }} ] }}"}
            good = {"auth_nkey": Secret(identity.seed)}
        case "credentials":
            operator = NatsOperator()
            settings, path = operator.settings, directory / "user.creds"
            directory.mkdir(parents=True, exist_ok=True)
            path.write_text(operator.user())
            good = {"auth_credentials_file": path}
        case _:
            settings = {"authorization": '{ user: "user", password: "user" }'}
    with nats_server(directory, settings=settings) as server:
        yield server, good


@pytest.mark.parametrize("kind", ["user", "token", "nkey", "credentials", "the reference's"])
async def test_a_login(tmp_path: Path, kind: str) -> None:
    with guarded(tmp_path, kind) as (server, good):
        async with connection(config(server, **good)) as made:
            assert made.connected, made.reason
            assert await carries(made)


@pytest.mark.parametrize("kind", ["user", "token", "nkey", "credentials"])
async def test_a_wrong_login(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    stranger = NatsIdentity("user").seed
    foreign = tmp_path / "foreign.creds"
    foreign.write_text(NatsOperator().user())
    wrong: list[dict[str, Any]] = [
        {},
        {"auth_username": "me", "auth_password": Secret("wr0ng")},
        {"auth_token": Secret("wr0ng")},
        {"auth_nkey": Secret(stranger)},
        {"auth_credentials_file": foreign},
    ]
    with guarded(tmp_path, kind) as (server, _):
        for login in wrong:
            assert "Authorization Violation" in await refused(config(server, **login)), login
    assert "NATS is away" in caplog.text
    for secret in ("wr0ng", stranger, foreign.read_text().split()[5]):
        assert secret not in caplog.text


async def test_a_login_in_the_address(tmp_path: Path) -> None:
    with nats_server(tmp_path, settings={"authorization": "{ user: me, password: hidden }"}) as server:
        url = server.url.replace("//", "//me:hidden@")
        async with connection(NatsConfig(servers=(url,))) as made:
            assert await carries(made)


async def test_a_login_that_cannot_be_used_is_said_at_once(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server, pytest.raises(ConfigError, match="auth_nkey"):
        await refused(config(server, auth_nkey=Secret("nonsense")))


async def test_a_credentials_file_that_is_replaced_is_used_at_the_next_connection(tmp_path: Path) -> None:
    with guarded(tmp_path, "credentials") as (server, good):
        path: Path = good["auth_credentials_file"]
        fine = path.read_text()
        async with connection(config(server, **good)) as made:
            path.write_text("nonsense")
            made.cut()
            await eventually(lambda: "no credentials file" in made.reason, what="the file was read again")
            assert not made.connected
            path.write_text(fine)
            await eventually(lambda: made.connected, what="the connection is back")
            assert await carries(made)


async def test_what_a_user_may_not_do_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"authorization": '{ users: [ { user: user, password: user, permissions: { subscribe: ["b"] } } ] }'}
    with nats_server(tmp_path, settings=settings) as server:
        async with connection(config(server)) as made:
            made.listen("a", lambda message: None)
            await made.settled()
            await eventually(lambda: "NATS forbids something" in caplog.text, what="it is said")
            assert made.connected


# -- TLS


@contextmanager
def tls_server(
    directory: Path, *, mutual: bool = False, first: bool = False
) -> Generator[tuple[NatsServer, Authority], None, None]:
    authority = Authority(directory)
    certificate, key = authority.issue("server")
    ask = f"ca_file: {str(authority.path)!r}, verify: true" if mutual else ""
    early = "handshake_first: true" if first else ""
    block = "{ " + f"cert_file: {str(certificate)!r}, key_file: {str(key)!r}, {ask} {early}" + " }"
    with nats_server(directory, settings={"tls": block}) as server:
        yield server, authority


@pytest.mark.parametrize("first", [False, True])
async def test_tls(tmp_path: Path, first: bool) -> None:
    with tls_server(tmp_path, first=first) as (server, authority):
        async with connection(config(server, tls_ca=authority.path, tls_first=first)) as made:
            assert made.connected, made.reason
            assert await carries(made)
            made.cut()
            await eventually(lambda: made.connected, what="the connection is back")


async def test_a_server_that_asks_for_our_certificate(tmp_path: Path) -> None:
    with tls_server(tmp_path, mutual=True) as (server, authority):
        certificate, key = authority.issue("client")
        own = {"tls_ca": authority.path, "tls_cert": certificate, "tls_key": key}
        async with connection(config(server, **own)) as made:
            assert await carries(made)
        await refused(config(server, tls_ca=authority.path))


async def test_an_authority_we_do_not_know(tmp_path: Path) -> None:
    with tls_server(tmp_path) as (server, _):
        stranger = Authority(tmp_path, "stranger")
        assert "certificate verify failed" in await refused(config(server, tls_ca=stranger.path))
        assert "certificate verify failed" in await refused(config(server))  # the system's do not vouch for it either


async def test_a_name_that_is_not_the_servers(tmp_path: Path) -> None:
    with tls_server(tmp_path) as (server, authority):
        own = {"tls_ca": authority.path}
        assert "certificate verify failed" in await refused(config(server, tls_name="other.test", **own))
        async with connection(config(server, tls_name="stator", **own)) as made:
            assert made.connected, made.reason


async def test_a_server_without_tls_learns_nothing_where_tls_is_insisted_on(tmp_path: Path) -> None:
    """Neither by its own wish nor by somebody's in between."""
    heard = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1000,"headers":true,"auth_required":true}\r\n')
        while data := await reader.read(1000):
            heard.extend(data)
        writer.close()

    plain = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = plain.sockets[0].getsockname()[1]
    login = {"auth_username": "me", "auth_password": Secret("hidden")}
    authority = Authority(tmp_path).path
    for own in (
        NatsConfig(servers=(f"tls://127.0.0.1:{port}",), **login),
        NatsConfig(servers=(f"nats://127.0.0.1:{port}",), tls_ca=authority, **login),
    ):
        assert "does not speak TLS" in await refused(own)
    plain.close()
    await plain.wait_closed()
    assert heard == b""


# -- servers that come and go


async def test_a_server_with_streams(tmp_path: Path) -> None:
    settings = {"jetstream": f"{{ store_dir: {str(tmp_path / 'streams')!r} }}"}
    with nats_server(tmp_path, settings=settings) as server:
        async with connection(config(server)) as made:
            assert await carries(made)


async def test_who_listened_hears_again_after_a_restart(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        arrived: list[bytes] = []
        async with connection(config(server)) as made:
            made.listen("kept", lambda message: arrived.append(message.body))
            left = made.listen("left", lambda message: arrived.append(b"wrong"))
            await asyncio.to_thread(server.stop)
            await eventually(lambda: not made.connected, what="the end was noticed")
            assert made.away_for >= 0
            assert not made.publish("kept", b"lost")
            made.leave(left)
            made.leave(left)
            await asyncio.to_thread(server.start)
            await eventually(lambda: made.connected, what="the connection is back")
            assert made.away_for == 0.0
            assert made.publish("kept", b"heard")
            assert made.publish("left", b"x")
            await made.settled()
            assert arrived == [b"heard"]
            assert made.subjects == ["kept"]


async def test_a_reader_that_raises_disturbs_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(message: Message) -> None:
        raise ValueError("mine")

    with nats_server(tmp_path) as server:
        async with connection(config(server)) as made:
            made.listen("a", broken)
            made.publish("a", b"")
            assert await carries(made)
            assert "could not be taken" in caplog.text


async def test_questions_that_are_given_up_leave_the_connection_alone(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        async with connection(config(server)) as made:
            for _ in range(20):
                asking = asyncio.get_running_loop().create_task(made.settled())
                await asyncio.sleep(0)
                asking.cancel()
            assert await carries(made)


async def test_a_server_that_does_not_answer_is_given_up_and_found_again(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        own = config(server, ping_interval=60.0, ping_timeout=0.3, connect_timeout=0.3)
        async with connection(own) as made:
            loop = asyncio.get_running_loop()
            with server.standing_still():
                began = loop.time()
                made.doubt()
                await eventually(lambda: not made.connected, what="it was noticed")
                assert 0.25 < loop.time() - began < 2
            began = loop.time()
            await eventually(lambda: made.connected, what="the connection is back")
            assert loop.time() - began < 2
            assert await carries(made)


async def test_what_waits_for_a_server_that_does_not_read_is_bounded(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        async with connection(config(server, ping_interval=60.0)) as made:
            with server.standing_still():
                taken = 0
                while made.publish("a", bytes(2**20)):
                    taken += 1
                    await asyncio.sleep(0)
                    assert made.full or taken < 32
                assert 60 < taken < 100  # some of it is in the kernel's buffers
                assert made.connected


async def test_the_question_comes_by_itself(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        async with connection(config(server, ping_interval=0.1, ping_timeout=0.2)) as made:
            with server.standing_still():
                await eventually(lambda: not made.connected, what="it was noticed")
