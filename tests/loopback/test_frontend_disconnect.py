"""Clients that leave or stop reading: their engine calls are killed at once, and nothing piles up for them."""

import asyncio
import random
import socket
from collections.abc import AsyncGenerator

import pytest

from stator.llm.output import EngineOutput
from stator.testing.fake_models import EngineCall, FakeEngine, FakeModels
from stator.testing.frontend_kit import RawClient, chat_body, frontend

pytestmark = pytest.mark.timeout(60)

CHAT = "/v1/chat/completions"
CANCELLED = {"endpoint": "chat_completions", "status": "error", "error_type": "cancelled"}


async def endless(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
    """A token every millisecond."""
    while True:
        yield [EngineOutput(token_ids=[97])]
        await asyncio.sleep(0.001)


async def never(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
    """No token at all."""
    await asyncio.Event().wait()
    yield []


async def killed(engine: FakeEngine, calls: int = 1, seconds: float = 5.0) -> float:
    """Wait until `calls` calls have ended, all killed; the time it took."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    async with asyncio.timeout(seconds):
        while len(engine.calls) < calls:
            await asyncio.sleep(0.001)
        await asyncio.gather(*[call.ended.wait() for call in engine.calls])
    assert [call.outcome for call in engine.calls] == ["killed"] * calls
    return loop.time() - begin


async def entered(engine: FakeEngine, calls: int) -> None:
    async with asyncio.timeout(5):
        while sum(call.entered for call in engine.calls) < calls:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_before_the_first_token_kills(stream: bool, n: int) -> None:
    models = FakeModels()
    engine = models.add("never", FakeEngine(never))
    async with frontend(models) as running:
        async with RawClient(running.port) as raw:
            await raw.request("POST", CHAT, chat_body("x", model="never", stream=stream, n=n))
            await entered(engine, n)
        assert await killed(engine, n) < 1.0
        await running.until_idle()
        request_type = "stream" if stream else "unary"
        assert running.sample("dynamo_frontend_requests_total", model="never", request_type=request_type, **CANCELLED) == 1
        assert (
            running.sample(
                "dynamo_frontend_model_cancellation_total",
                model="never",
                endpoint="chat_completions",
                request_type=request_type,
            )
            == 1
        )
        assert running.sample("dynamo_frontend_disconnected_clients") == 1
        assert running.sample("dynamo_frontend_inflight_requests", model="never") == 0


@pytest.mark.parametrize("reset", [False, True])
async def test_leaving_in_mid_stream_kills(reset: bool) -> None:
    models = FakeModels()
    engine = models.add("endless", FakeEngine(endless))
    async with frontend(models) as running:
        async with RawClient(running.port) as raw:
            await raw.request("POST", CHAT, chat_body("x", model="endless", stream=True))
            await raw.read_until(b'"a"')
            if reset:
                raw.writer.transport.abort()
        assert await killed(engine) < 1.0
        await running.until_idle()
        assert running.sample("dynamo_frontend_requests_total", model="endless", request_type="stream", **CANCELLED) == 1


async def test_leaving_at_random_points_leaves_nothing() -> None:
    models = FakeModels()
    engine = models.add("endless", FakeEngine(endless))
    models.add("echo", FakeEngine())
    rng = random.Random(7)

    async def one(port: int) -> None:
        async with RawClient(port) as raw:
            body = chat_body(
                "hello world", model=rng.choice(["endless", "echo"]), stream=rng.random() < 0.7, n=rng.choice([1, 2])
            )
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            whole = head.encode() + body
            await raw.send(whole[: rng.choice([5, len(head) + 3, len(whole), len(whole), len(whole), len(whole)])])
            await asyncio.sleep(rng.choice([0.0, 0.0, 0.001, 0.005, 0.02]))
            if rng.random() < 0.5:
                raw.writer.transport.abort()

    async with frontend(models) as running:
        tasks = asyncio.all_tasks()
        await asyncio.gather(*[one(running.port) for _ in range(150)])
        await running.until_idle()
        async with asyncio.timeout(5):
            while asyncio.all_tasks() - tasks:
                await asyncio.sleep(0.01)
        assert {call.outcome for call in engine.calls} <= {"killed"}
        assert running.state.bodies.held == 0
        for model in ("echo", "endless"):
            assert running.sample("dynamo_frontend_inflight_requests", model=model) == 0
            assert running.sample("dynamo_frontend_queued_requests", model=model) == 0


class Fountain:
    """Batches of 64 KiB of text, as fast as they are taken."""

    def __init__(self) -> None:
        self.batches = 0

    async def script(self, call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        text = "x" * 65_536
        while True:
            self.batches += 1
            yield [EngineOutput(token_ids=[120], text=text)]
            await asyncio.sleep(0)

    async def dried_up(self) -> None:
        """Nothing was taken for a while."""
        seen = -1
        async with asyncio.timeout(5):
            while seen != self.batches:
                seen = self.batches
                await asyncio.sleep(0.05)


async def narrow_client(port: int, body: bytes) -> socket.socket:
    """A client with a small receive buffer that has sent a request and reads nothing."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await loop.sock_connect(sock, ("127.0.0.1", port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    await loop.sock_sendall(sock, head.encode() + body)
    return sock


async def test_a_client_that_does_not_read_stops_its_engine_and_is_cut() -> None:
    models, fountain = FakeModels(), Fountain()
    engine = models.add("fountain", FakeEngine(fountain.script))
    async with frontend(models, write_timeout=0.3) as running:
        sock = await narrow_client(running.port, chat_body("x", model="fountain", stream=True))
        try:
            await entered(engine, 1)
            await fountain.dried_up()
            assert fountain.batches < 200  # what the kernel's buffers hold
            await killed(engine, seconds=5)
            await running.until_idle()
        finally:
            sock.close()


async def test_a_slow_client_that_reads_is_not_cut() -> None:
    models, fountain = FakeModels(), Fountain()
    engine = models.add("fountain", FakeEngine(fountain.script))
    loop = asyncio.get_running_loop()
    async with frontend(models, write_timeout=0.4) as running:
        sock = await narrow_client(running.port, chat_body("x", model="fountain", stream=True))
        try:
            for _ in range(25):
                assert await asyncio.wait_for(loop.sock_recv(sock, 8192), 5)
                await asyncio.sleep(0.05)
            assert engine.calls[0].outcome == ""
        finally:
            sock.close()
        await killed(engine)


async def test_a_client_that_does_not_read_a_large_unary_answer_is_cut() -> None:
    async def large(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        yield [EngineOutput(token_ids=[120], text="x" * 20_000_000, finish_reason="stop")]

    models = FakeModels()
    models.add("large", FakeEngine(large))
    async with frontend(models, write_timeout=0.2) as running:
        sock = await narrow_client(running.port, chat_body("x", model="large"))
        try:
            async with asyncio.timeout(5):
                while (
                    running.sample(
                        "dynamo_frontend_requests_started_total",
                        model="large",
                        endpoint="chat_completions",
                        request_type="unary",
                    )
                    == 0
                ):
                    await asyncio.sleep(0.001)
                await running.state.idle.wait()
                while connections(running.server):
                    await asyncio.sleep(0.01)
        finally:
            sock.close()


def connections(server: object) -> int:
    """Open connections of a frontend server."""
    return len(server._runner.server.connections)  # type: ignore[attr-defined]  # only tests ask


async def test_a_slow_reader_does_not_disturb_others() -> None:
    models, fountain = FakeModels(), Fountain()
    models.add("fountain", FakeEngine(fountain.script))
    models.add("echo", FakeEngine())
    async with frontend(models) as running:
        sock = await narrow_client(running.port, chat_body("x", model="fountain", stream=True))
        try:
            async with RawClient(running.port) as raw:
                for number in range(20):
                    await raw.request("POST", CHAT, chat_body(f"number {number}", stream=True))
                    assert (await raw.answer()).status == 200
        finally:
            sock.close()
