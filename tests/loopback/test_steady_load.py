"""The kit of the fault tests sees what it is there to see: answers that are short, wrong, late or none, and doors that are shut."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from stator.errors import EngineError
from stator.runtime import Context
from stator.testing.cluster import Cluster
from stator.testing.gate import Gate
from stator.testing.steady_load import SteadyLoad

pytestmark = pytest.mark.timeout(20)


async def right(request: Any, context: Context) -> AsyncIterator[int]:
    for number in range(request["n"]):
        yield number


async def short(request: Any, context: Context) -> AsyncIterator[int]:
    for number in range(request["n"] - 1):
        yield number


async def twice(request: Any, context: Context) -> AsyncIterator[int]:
    yield 0
    for number in range(request["n"]):
        yield number


async def broken(request: Any, context: Context) -> AsyncIterator[int]:
    yield 0
    raise ValueError("nope")


@pytest.mark.parametrize(
    ("handler", "failure"),
    [
        (right, ""),
        (short, "ended after 4 of 5 items"),
        (twice, "item 1 is 0"),
        (broken, "EngineError after 1 items"),
    ],
)
async def test_every_answer_is_looked_at(handler: Any, failure: str) -> None:
    async with Cluster.open("memory") as cluster:
        await cluster.worker(handler)
        client = await cluster.client()
        async with SteadyLoad(client, rate=100, items=5, pause=0.0).running() as load:
            await asyncio.sleep(0.3)
        assert 10 < len(load.requests) < 60, "the rate is kept"
        assert len(load.failures) == (len(load.requests) if failure else 0)
        assert all(each.failure.startswith(failure) for each in load.failures)
        assert all(isinstance(each.error, EngineError) for each in load.failures) or failure != "EngineError after 1 items"
        assert f"{len(load.failures)} failed" in load.report()
        assert load.running_now == 0


async def test_the_rate_does_not_wait_for_answers() -> None:
    started: list[int] = []
    going = asyncio.Event()

    async def slow(request: Any, context: Context) -> AsyncIterator[int]:
        started.append(1)
        await going.wait()
        yield 0

    async with Cluster.open("memory") as cluster:
        await cluster.worker(slow)
        client = await cluster.client()
        async with SteadyLoad(client, rate=200, items=1).running() as load:
            async with asyncio.timeout(5):
                while len(started) < 40:
                    await asyncio.sleep(0.01)
            assert load.requests == []
            going.set()
        assert len(load.requests) >= 40
        assert load.failures == []
        assert max(each.took for each in load.requests) > 0.1


async def test_a_gate_opens_and_shuts() -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line.upper())
        writer.close()

    server = await asyncio.start_server(shout, "127.0.0.1", 0)
    async with Gate(server.sockets[0].getsockname()[1]) as gate:

        async def ask() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
            try:
                writer.write(b"hi\n")
                return await reader.readline()
            except ConnectionResetError:
                return b""
            finally:
                writer.close()

        assert await ask() == b"HI\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", gate.port)
        writer.write(b"hi\n")
        assert await reader.readline() == b"HI\n"
        gate.shut()
        assert await reader.read() == b"", "what was open is cut"
        writer.close()
        assert await ask() == b""
        gate.open()
        assert await ask() == b"HI\n"
    server.close()
