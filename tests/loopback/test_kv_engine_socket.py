"""A PUB socket as an engine has it, followed over TCP."""

import asyncio
import itertools
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import zmq

from stator.engines.loopback_ports import free_ports
from stator.errors import ConfigError
from stator.kv.engine_events import EngineStatistics
from stator.kv.engine_socket import follow_engine_socket
from stator.kv.sources import ZmqSource
from stator.tasks import Scope
from stator.testing.list_sink import ListSink
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(30)


class Engine:
    """Publishes as vLLM and SGLang do: topic, sequence as 8 bytes big endian, batch."""

    def __init__(self, endpoint: str = "tcp://127.0.0.1:0", topic: bytes = b"") -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PUB)
        self.socket.set_hwm(100_000)
        self.socket.bind(endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.topic = topic
        self.sequence = itertools.count()

    def publish(self, *events: Any, rank: int | None = 0) -> None:
        self.send(next(self.sequence), msgspec.msgpack.encode([1.0, list(events), rank]))

    def send(self, sequence: int, payload: bytes) -> None:
        self.socket.send_multipart([self.topic, struct.pack(">q", sequence), payload])

    def close(self) -> None:
        self.context.destroy(linger=0)


@asynccontextmanager
async def followed(engine: Engine, **source: Any) -> AsyncGenerator[tuple[list[Any], EngineStatistics]]:
    """What a sink is told, once the subscription is there."""
    sink, statistics = ListSink(), EngineStatistics()
    async with Scope("follower") as scope:
        scope.spawn(follow_engine_socket(ZmqSource(endpoint=engine.endpoint, **source), sink, statistics=statistics))
        await until_heard(engine, sink.told)
        yield sink.told, statistics


async def until_heard(engine: Engine, told: list[Any]) -> None:
    """A PUB socket has no memory: repeat until the first message has come."""
    async with asyncio.timeout(10):
        before = len(told)
        while len(told) == before:
            engine.send(0, msgspec.msgpack.encode([1.0, [["BlockRemoved", [0]]], None]))
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)
        told.clear()
    engine.sequence = itertools.count(1)


@pytest.fixture
def engine() -> Any:
    one = Engine()
    yield one
    one.close()


async def test_batches_arrive_in_order(engine: Engine) -> None:
    async with followed(engine) as (told, statistics):
        for number in range(1, 301):
            engine.publish(["BlockRemoved", [number]], ["BlockRemoved", [-number]])
        await eventually(lambda: len(told) == 600)
        assert [one[2][0] for one in told] == [name for number in range(1, 301) for name in (number, -number)]
        assert (statistics.gaps, statistics.malformed) == (0, 0)


async def test_other_topics_are_not_heard() -> None:
    engine = Engine(topic=b"kv@model")
    async with followed(engine, topic="kv@") as (told, _):
        engine.topic = b"stats"
        engine.publish(["BlockRemoved", [1]])
        engine.topic = b"kv@model"
        engine.publish(["BlockRemoved", [2]])
        await eventually(lambda: bool(told))
        assert told == [(0, "removed", [2], "device")]
    engine.close()


async def test_missing_batches_are_counted_and_a_new_beginning_clears(engine: Engine) -> None:
    async with followed(engine) as (told, statistics):
        engine.publish(["BlockRemoved", [1]])
        engine.sequence = itertools.count(5)
        engine.publish(["BlockRemoved", [2]])
        await eventually(lambda: len(told) == 2)
        assert (statistics.gaps, statistics.restarts) == (3, before := statistics.restarts)
        engine.sequence = itertools.count(0)
        engine.publish(["BlockRemoved", [3]])
        await eventually(lambda: len(told) == 4)
        assert told[2:] == [(0, "cleared"), (0, "removed", [3], "device")]
        assert (statistics.gaps, statistics.restarts) == (3, before + 1)


async def test_other_messages_are_counted(engine: Engine) -> None:
    async with followed(engine) as (told, statistics):
        for frames in ([b""], [b"", b"12345678"], [b"", b"1234", b"x"], [b"", b"12345678", b"x", b"y"]):
            engine.socket.send_multipart(frames)
        engine.send(1, b"\xc1")
        engine.sequence = itertools.count(2)
        engine.publish(["AllBlocksCleared"])
        await eventually(lambda: bool(told))
        assert told == [(0, "cleared")]
        assert (statistics.malformed, statistics.gaps) == (5, 0)


async def test_an_engine_that_comes_back_is_heard_again() -> None:
    engine = Engine()
    async with followed(engine) as (told, statistics):
        engine.publish(["BlockRemoved", [1]])
        await eventually(lambda: bool(told))
        engine.close()
        told.clear()
        engine = Engine(engine.endpoint)
        await until_heard(engine, told)
        engine.publish(["BlockRemoved", [2]])
        await eventually(lambda: bool(told))
        assert statistics.restarts
    engine.close()


async def test_the_loop_gets_its_turns_under_a_flood(engine: Engine) -> None:
    """All messages are there before the first one is read."""
    async with followed(engine) as (told, _):
        for number in range(2000):
            engine.publish(["BlockRemoved", [number]])
        seen = [0]
        async with asyncio.timeout(20):
            while seen[-1] < 2000:
                await asyncio.sleep(0)
                seen.append(len(told))
        assert max(after - before for before, after in itertools.pairwise(seen)) < 50


async def test_an_engine_may_connect_to_us() -> None:
    """Where it would otherwise bind all interfaces."""
    base = free_ports(1)
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    socket.connect(f"tcp://127.0.0.1:{base}")
    sink, source = ListSink(), ZmqSource(endpoint=f"tcp://127.0.0.1:{base}", bind=True)
    async with Scope("follower") as scope:
        scope.spawn(follow_engine_socket(source, sink))
        async with asyncio.timeout(10):
            while not sink.told:
                socket.send_multipart([b"", bytes(8), msgspec.msgpack.encode([1.0, [["AllBlocksCleared"]], 0])])
                await asyncio.sleep(0.02)
        assert sink.told[0] == (0, "cleared")
        with pytest.raises(ConfigError, match=f"'tcp://127.0.0.1:{base}' cannot be used"):
            await follow_engine_socket(source, ListSink())
    context.destroy(linger=0)


async def test_an_endpoint_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="'warp://engine'"):
        await follow_engine_socket(ZmqSource(endpoint="warp://engine"), ListSink())
