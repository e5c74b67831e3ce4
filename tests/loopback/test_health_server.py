"""The status server over HTTP: routes, codes and bodies of `spec/25 §5`, and its bounds."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from stator.errors import UsageError
from stator.health import EngineRoutes, HealthConfig, SystemHealth
from stator.health.server import StatusServer
from stator.testing.manual_clock import ManualClock

pytestmark = pytest.mark.timeout(30)

PLAIN = "text/plain; charset=utf-8"


class Served:
    """A running server and a client of it."""

    def __init__(self, server: StatusServer, health: SystemHealth, clock: ManualClock, client: aiohttp.ClientSession) -> None:
        self.server = server
        self.health = health
        self.clock = clock
        self.client = client

    @property
    def port(self) -> int:
        assert self.server.port is not None
        return self.server.port

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, str, bytes]:
        async with self.client.request(method, f"{self.server.url}{path}", **options) as answer:
            return answer.status, answer.headers.get("Content-Type", ""), await answer.read()


@asynccontextmanager
async def serving(*, settings: dict[str, Any] | None = None, **options: Any) -> AsyncGenerator[Served]:
    clock = ManualClock()
    health = SystemHealth(clock=clock)
    options = {"metrics": lambda: b"# TYPE up gauge\nup 1\n", **options}
    server = StatusServer(HealthConfig(**{"port": 0, **(settings or {})}), health, **options)
    timeout = aiohttp.ClientTimeout(total=10)
    async with server, aiohttp.ClientSession(timeout=timeout) as client:
        yield Served(server, health, clock, client)


async def closed_after(reader: asyncio.StreamReader) -> float:
    """Seconds until the server ends the connection."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    try:
        await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        pass
    return loop.time() - begin


@pytest.mark.parametrize("path", ["/health", "/live"])
async def test_health_and_live_are_the_same_page(path: str) -> None:
    async with serving() as served:
        served.health.add("generate")
        served.clock.advance(1.5)
        body = b'{"status":"%b","uptime":{"secs":1,"nanos":500000000},"endpoints":{"generate":"ready"}}'
        assert await served.ask("GET", path) == (503, PLAIN, body % b"notready")
        served.health.set_system(True)
        assert await served.ask("GET", path) == (200, PLAIN, body % b"ready")
        assert (await served.ask("HEAD", path))[::2] == (200, b"")


async def test_paths_can_be_moved() -> None:
    async with serving(settings={"health_path": "/healthz", "live_path": "/a/live z"}) as served:
        assert (await served.ask("GET", "/healthz"))[0] == 503
        assert (await served.ask("GET", "/a/live%20z"))[0] == 503
        for old in ("/health", "/live"):
            assert await served.ask("GET", old) == (404, PLAIN, b"Route not found")


async def test_metrics_and_their_failure(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as served:
        assert await served.ask("GET", "/metrics") == (200, PLAIN, b"# TYPE up gauge\nup 1\n")

    def broken() -> bytes:
        raise ValueError("mine")

    async with serving(metrics=broken) as served:
        assert await served.ask("GET", "/metrics") == (500, PLAIN, b"Failed to get metrics")
    assert "the metrics page failed" in caplog.text


async def test_metadata() -> None:
    async with serving() as served:
        assert await served.ask("GET", "/metadata") == (404, PLAIN, b"Discovery metadata not available")
    async with serving(metadata=lambda: {"pod": "w-0"}) as served:
        assert await served.ask("GET", "/metadata") == (200, "application/json", b'{"pod":"w-0"}')
    async with serving(metadata=lambda: object()) as served:
        assert (await served.ask("GET", "/metadata"))[0] == 404


async def test_what_is_not_there() -> None:
    async with serving() as served:
        for path in ("/", "/nope", "/health/", "/HEALTH", "/engine", "/engine/", "/drain", "/resume", "/%ff"):
            for method in ("GET", "POST"):
                assert await served.ask(method, path) == (404, PLAIN, b"Route not found"), path
        for path in ("/health", "/live", "/metrics", "/metadata"):
            for method in ("POST", "DELETE", "PURGE"):
                assert (await served.ask(method, path))[::2] == (405, b""), path


async def test_engine_routes_take_any_method() -> None:
    async def echo(value: Any) -> Any:
        return {"got": value}

    async def fail(value: Any) -> Any:
        raise ValueError("nope")

    routes = EngineRoutes()
    async with serving(engine=routes) as served:
        missing = b'{"error":"Route not found","message":"Route /engine/control/echo not found"}'
        assert await served.ask("POST", "/engine/control/echo") == (404, PLAIN, missing)
        routes.register("control/echo", echo)
        served.server.engine.register("fail", fail)
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            assert await served.ask(method, "/engine/control/echo", data=b"[1]") == (200, PLAIN, b'{"got":[1]}')
        assert await served.ask("GET", "/engine/control/echo") == (200, PLAIN, b'{"got":{}}')
        status, kind, body = await served.ask("POST", "/engine/control/echo", data=b"nope")
        assert (status, kind) == (400, PLAIN)
        assert body.startswith(b'{"error":"Invalid JSON","message":"')
        expected = b'{"error":"Handler error","message":"Python callback failed: ValueError: nope"}'
        assert await served.ask("POST", "/engine/fail", data=b"{}") == (500, PLAIN, expected)


async def test_drain_and_resume() -> None:
    done: list[str] = []

    async def drain() -> Any:
        done.append("drain")
        return {"status": "draining", "inflight": 3}

    async def resume() -> Any:
        done.append("resume")
        raise RuntimeError("still draining")

    async with serving(drain=drain, resume=resume) as served:
        for path in ("/drain", "/resume"):
            assert (await served.ask("GET", path))[::2] == (405, b"")
        assert done == []
        assert await served.ask("POST", "/drain") == (200, PLAIN, b'{"status":"draining","inflight":3}')
        expected = b'{"error":"Handler error","message":"Python callback failed: RuntimeError: still draining"}'
        assert await served.ask("POST", "/resume") == (500, PLAIN, expected)
        assert done == ["drain", "resume"]


async def test_web_pages_may_look_but_not_touch() -> None:
    done: list[Any] = []

    async def touch(value: Any = None) -> Any:
        done.append(value)

    async with serving(drain=touch) as served:
        served.server.engine.register("x", touch)
        for headers in ({"Origin": "https://example.org"}, {"Sec-Fetch-Site": "cross-site"}):
            for path in ("/drain", "/engine/x"):
                assert (await served.ask("POST", path, headers=headers))[0] == 403
            assert (await served.ask("GET", "/metrics", headers=headers))[0] == 200
    assert done == []


async def test_a_callback_that_takes_too_long_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    async def slow(value: Any = None) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # a clean-up that takes a while
            ended.append("slow")

    async with serving(settings={"callback_timeout": 0.05}, drain=slow) as served:
        served.server.engine.register("slow", slow)
        expected = b'{"error":"Handler error","message":"took longer than 0.05 s and is cancelled"}'
        async with asyncio.timeout(3):
            assert await served.ask("POST", "/engine/slow") == (500, PLAIN, expected)
        assert await served.ask("POST", "/drain") == (500, PLAIN, expected)
    assert ended == ["slow", "slow"]
    assert "/engine/slow took longer" in caplog.text


async def test_a_client_that_leaves_cancels_its_callback() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def slow(value: Any) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    async with serving() as served:
        served.server.engine.register("slow", slow)
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"POST /engine/slow HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        await asyncio.wait_for(started.wait(), 5)
        writer.close()
        await asyncio.wait_for(ended.wait(), 5)


async def test_callbacks_that_do_not_let_themselves_be_cancelled_are_bounded() -> None:
    release = asyncio.Event()

    async def stubborn(value: Any) -> Any:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async with serving(settings={"callback_timeout": 0.05, "max_connections": 2}) as served:
        served.server.engine.register("stubborn", stubborn)
        texts = [(await served.ask("GET", "/engine/stubborn"))[::2] for _ in range(3)]
        assert [status for status, _ in texts] == [500, 500, 503]
        assert b"too many callbacks" in texts[2][1]
        release.set()


async def test_bodies_are_bounded() -> None:
    async def size(value: Any) -> Any:
        return len(value)

    async def chunks() -> AsyncGenerator[bytes]:
        for _ in range(4):
            yield b"x" * 50

    async with serving(settings={"body_limit": 100}) as served:
        served.server.engine.register("size", size)
        exact = b'"' + b"x" * 98 + b'"'
        assert await served.ask("POST", "/engine/size", data=exact) == (200, PLAIN, b"98")
        assert (await served.ask("POST", "/engine/size", data=b"x" * 101))[0] == 413
        assert (await served.ask("POST", "/engine/size", data=chunks()))[0] == 413


@pytest.mark.parametrize(
    "begin",
    [b"", b"GET /hea", b"POST /engine/x HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12"],
    ids=["nothing", "half a head", "half a body"],
)
async def test_whoever_does_not_finish_a_request_is_disconnected(begin: bytes) -> None:
    async with serving(settings={"http_timeout": 0.2}) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(begin)
        assert await closed_after(reader) < 5
        writer.close()


async def test_whoever_does_not_read_the_answer_is_disconnected() -> None:
    async with serving(settings={"http_timeout": 0.3}, metrics=lambda: b"x" * 50_000_000) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1024)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        manager = served.server._http  # pyright: ignore[reportPrivateUsage]  # only tests ask
        assert manager is not None
        async with asyncio.timeout(5):
            while not manager.connections:
                await asyncio.sleep(0.01)
            while manager.connections:
                await asyncio.sleep(0.01)
        writer.transport.abort()
        del reader


async def test_connections_are_bounded_and_closed_after_one_request(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(settings={"max_connections": 2}) as served:
        held = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(2)]
        async with asyncio.timeout(5):
            while len(served.server._http.connections) < 2:  # type: ignore[union-attr]  # only tests ask
                await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        assert await closed_after(reader) < 5
        assert "has 2 connections" in caplog.text
        writer.close()
        reader, writer = held[0]
        writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"Connection: close" in await asyncio.wait_for(reader.read(), 5)
        for _, writer in held:
            writer.close()


async def test_bytes_that_are_no_http() -> None:
    async with serving() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.0 400 ")
        writer.close()
        assert (await served.ask("GET", "/live"))[0] == 503


async def test_it_is_off_unless_a_port_is_given() -> None:
    async with serving(settings={"port": -1}) as served:
        assert (served.server.listening, served.server.port, served.server.url) == (False, None, None)


async def test_a_taken_port_is_logged_and_the_start_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as first, serving(settings={"port": first.port}) as second:
        assert not second.server.listening
        assert first.server.listening
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 2
        assert str(first.port) in errors[0]
        await second.server.aclose()
    async with serving(settings={"port": 0, "host": "192.0.2.1", "insecure_bind": True}) as unreachable:
        assert not unreachable.server.listening


async def test_closing_lets_a_callback_end_that_is_about_to() -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def brief(value: Any) -> Any:
        started.set()
        await go.wait()
        return "done"

    async with serving() as served, asyncio.TaskGroup() as group:
        served.server.engine.register("brief", brief)
        answer = group.create_task(served.ask("POST", "/engine/brief"))
        await asyncio.wait_for(started.wait(), 5)
        closing = group.create_task(served.server.aclose())
        await asyncio.sleep(0)
        go.set()
        assert await answer == (200, PLAIN, b'"done"')
        await closing


async def test_it_closes_promptly_with_everything_open() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def slow(value: Any) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # a clean-up that takes a while
            ended.set()

    async with serving() as served:
        server, port = served.server, served.port
        server.engine.register("slow", slow)
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        connections[1][1].write(b"GET /hea")
        connections[2][1].write(b"POST /engine/slow HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        async with asyncio.timeout(5):
            await started.wait()
            while len(server._http.connections) < 3:  # type: ignore[union-attr]  # only tests ask
                await asyncio.sleep(0.01)
        async with asyncio.timeout(2):
            await server.aclose()
            await server.aclose()
        assert ended.is_set()
        for reader, writer in connections:
            assert await closed_after(reader) < 5
            writer.close()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(UsageError, match="closed"):
            await server.start()
