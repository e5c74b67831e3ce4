"""The listening side: ports, sharing, draining, TLS."""

import asyncio
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path

import aiohttp
import pytest

from stator.errors import ConfigError
from stator.frontend import FrontendConfig, FrontendMetrics, FrontendServer, bind, create_app
from stator.llm.output import EngineOutput
from stator.tasks import SystemClock
from stator.telemetry import MetricSet
from stator.testing.fake_models import EngineCall, FakeEngine, FakeModels
from stator.testing.frontend_kit import RawClient, RunningFrontend, chat_body, events_of, frontend

pytestmark = pytest.mark.timeout(60)

CHAT = "/v1/chat/completions"


def echo_models() -> FakeModels:
    models = FakeModels()
    models.add("echo", FakeEngine())
    return models


def server_on(config: FrontendConfig, **options: object) -> FrontendServer:
    clock = SystemClock()
    app = create_app(echo_models(), config=config, metrics=FrontendMetrics(MetricSet(), clock), clock=clock)
    return FrontendServer(app, config=config, **options)  # type: ignore[arg-type]  # passed through


async def test_several_servers_share_a_port() -> None:
    first = bind(FrontendConfig(port=0), shared=True)
    port = first.getsockname()[1]
    config = FrontendConfig(port=port, graceful_shutdown=0.1)
    second = bind(config, shared=True)
    async with server_on(config, sock=first) as one, server_on(config, sock=second) as two:
        assert one.port == two.port == port
        with pytest.raises(ConfigError, match=str(port)):
            bind(config)
        for _ in range(20):
            async with RawClient(port) as raw:
                await raw.request("GET", "/live")
                assert (await raw.answer()).status == 200


async def test_a_taken_port_is_a_config_error() -> None:
    listener = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    with pytest.raises(ConfigError, match=str(port)):
        bind(FrontendConfig(port=port))
    listener.close()
    await listener.wait_closed()
    with pytest.raises(ConfigError, match="cannot listen"):
        bind(FrontendConfig(host="192.0.2.1", insecure_bind=True))


async def test_nagle_is_off() -> None:
    async with frontend(echo_models()) as running, RawClient(running.port) as raw:
        await raw.request("GET", "/live")
        await raw.answer()
        (connection,) = running.server._runner.server.connections  # type: ignore[union-attr]  # only tests ask
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(6, 1) != 0


async def test_closing_twice_and_without_starting() -> None:
    server = server_on(FrontendConfig(port=0))
    await server.aclose()
    await server.aclose()
    async with server_on(FrontendConfig(port=0)) as server:
        await server.aclose()


class Held:
    """A model that sends one token and then waits for the test."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.models = echo_models()
        self.engine = self.models.add("held", FakeEngine(self.script))

    async def script(self, call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        yield [EngineOutput(token_ids=[97])]
        await self.go_on.wait()
        yield [EngineOutput(token_ids=[98], finish_reason="stop")]


async def draining(running: RunningFrontend) -> None:
    async with asyncio.timeout(5):
        while not running.state.draining:
            await asyncio.sleep(0.001)


async def test_draining_lets_running_requests_finish() -> None:
    held = Held()
    async with (
        frontend(held.models, graceful_shutdown=10) as running,
        RawClient(running.port) as raw,
        RawClient(running.port) as late,
    ):
        await raw.request("POST", CHAT, chat_body("x", model="held", stream=True))
        await raw.read_until(b'"a"')
        await late.request("GET", "/live")
        await late.answer()
        closing = asyncio.ensure_future(running.server.aclose())
        await draining(running)
        for path, expected in (("/v1/models", "unavailable"), ("/live", "shutting_down"), ("/health", "not_ready")):
            async with RawClient(running.port) as new:
                await new.request("GET", path)
                refused = await new.answer()
            assert refused.status == 503
            assert expected in refused.body.decode()
            assert refused.headers["connection"] == "close"
        await late.request("POST", CHAT, chat_body("x"))
        refused = await late.answer()
        assert (refused.status, refused.json()["error"]["code"]) == (503, "unavailable")
        assert "retry-after" in refused.headers
        async with RawClient(running.port) as new:
            await new.request("GET", "/metrics")
            assert (await new.answer()).status == 200
        assert not closing.done()
        held.go_on.set()
        assert b'"b"' in await raw.read_until(b"[DONE]")
        await asyncio.wait_for(closing, 5)
        assert held.engine.calls[0].outcome == "complete"
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", running.port)


async def test_what_does_not_finish_ends_with_an_error() -> None:
    held = Held()
    async with (
        frontend(held.models, graceful_shutdown=0.1) as running,
        RawClient(running.port) as stream,
        RawClient(running.port) as unary,
    ):
        await stream.request("POST", CHAT, chat_body("x", model="held", stream=True))
        await unary.request("POST", CHAT, chat_body("x", model="held"))
        status, _ = await stream.head()
        async with asyncio.timeout(5):
            while len(held.engine.calls) < 2:
                await asyncio.sleep(0.001)
        await asyncio.wait_for(running.server.aclose(), 5)
        body = b"".join([chunk async for chunk in stream.chunks()])
        assert status == 200
        assert events_of(body)[-1]["error"]["code"] == "unavailable"
        answer = await unary.answer()
        assert (answer.status, answer.json()["error"]["code"]) == (503, "unavailable")
        assert [call.outcome for call in held.engine.calls] == ["killed", "killed"]
        labels = {"model": "held", "endpoint": "chat_completions", "status": "error", "error_type": "unavailable"}
        assert running.sample("dynamo_frontend_requests_total", request_type="stream", **labels) == 1
        assert running.sample("dynamo_frontend_requests_total", request_type="unary", **labels) == 1


async def test_an_idle_server_closes_at_once() -> None:
    loop = asyncio.get_running_loop()
    async with frontend(echo_models(), graceful_shutdown=30) as running, RawClient(running.port) as raw:
        await raw.request("GET", "/live")
        await raw.answer()
        begin = loop.time()
        await running.server.aclose()
        assert loop.time() - begin < 1
        assert await raw.read() == b""


# Made for this test; nothing else trusts it.
PEM_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBfzCCASWgAwIBAgIUODtPFmQniezsKqZvU4/CozbrrMMwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTA4MTk1MloYDzIxMjYxMDI4
MDgxOTUyWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATU1vkZfKsTnDtHFFf3ZRL4XCg+CMcG0XHnxVc4DfR9ESIJuLruGtTE
a1qZbokwxjvWF4z+zzdnvlbQcRnoofAdo1MwUTAdBgNVHQ4EFgQUZ+kjF6e6MinW
+e5vMPDfVgbR23UwHwYDVR0jBBgwFoAUZ+kjF6e6MinW+e5vMPDfVgbR23UwDwYD
VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiEA5IXUdEAI+/7Tu9lqw9JV
R7NRfq+qfZGMvA/am54qh/4CIE0QOkwDO6VlIO54cAxOZS676KnJ5s0EKg4qitjG
Bpc3
-----END CERTIFICATE-----
"""
PEM_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjvCrW+rdvESuzVEO
rJ0vVQaoih3PxePL3MfGaADmzauhRANCAATU1vkZfKsTnDtHFFf3ZRL4XCg+CMcG
0XHnxVc4DfR9ESIJuLruGtTEa1qZbokwxjvWF4z+zzdnvlbQcRnoofAd
-----END PRIVATE KEY-----
"""


async def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(PEM_CERT)
    key.write_text(PEM_KEY)
    trusted = ssl.create_default_context(cadata=PEM_CERT)
    trusted.check_hostname = False
    async with frontend(echo_models(), tls_cert_path=cert, tls_key_path=key) as running:
        assert running.url.startswith("https://127.0.0.1:")
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                running.url + CHAT, json={"model": "echo", "messages": [{"role": "user", "content": "secret"}]}, ssl=trusted
            ) as answer,
        ):
            assert (await answer.json())["choices"][0]["message"]["content"] == "secret"
    with pytest.raises(ConfigError, match="cannot use"):
        async with frontend(echo_models(), tls_cert_path=cert, tls_key_path=cert):
            pass
