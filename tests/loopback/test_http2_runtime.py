"""Whole runtimes over HTTP/2: what a worker's record says, and which plane a caller takes."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from stator.errors import EngineError, StreamIncomplete, Unavailable
from stator.protocol.records import EndpointRecord, NativeAddress
from stator.runtime import Client, Context
from stator.testing.cluster import Cluster, echo
from stator.testing.plane_suite import eventually
from stator.transports.http2.client import Http2Client
from stator.transports.http2.server import Http2Server

# pyright: reportPrivateUsage=false

pytestmark = pytest.mark.timeout(60)


async def endless(request: Any, context: Context) -> AsyncIterator[Any]:
    while not context.is_stopped:
        yield request
        await asyncio.sleep(0.001)
    yield "bye"


async def fails(request: Any, context: Context) -> AsyncIterator[Any]:
    yield 1
    raise ValueError("no such voice")


def planes_used(client: Client) -> list[str]:
    return sorted(client._services.network._clients)


async def test_requests_answers_and_their_ends() -> None:
    async with Cluster.open("compatible", request_plane="http2") as cluster:
        worker = await cluster.worker(endless)
        client = await cluster.client()
        async with client.generate("x", metadata={"a": "ü"}) as stream:
            assert await anext(stream) == "x"
            stream.stop()
            assert [item async for item in stream][-1] == "bye"
        async with client.generate("x") as stream:
            assert await anext(stream) == "x"
        await eventually(lambda: worker.served._serving.inflight == 0, what="leaving the block killed it")
        assert planes_used(client) == ["http2"]


async def test_errors_of_a_handler() -> None:
    async with Cluster.open("compatible", request_plane="http2") as cluster:
        await cluster.worker(fails)
        client = await cluster.client()
        with pytest.raises(EngineError, match="ValueError: no such voice"):
            await client.generate(1).collect()


async def test_the_native_plane_goes_first_and_http_where_it_does_not_answer() -> None:
    async with Cluster.open("auto", request_plane="http2") as cluster:
        worker = await cluster.worker(echo)
        record = worker.served.record
        assert isinstance(record, EndpointRecord) and isinstance(record.stator, NativeAddress)
        assert record.transport.tcp is None and record.transport.http is not None and record.stator.http2 == 1
        client = await cluster.client()
        assert await client.generate(1).collect() == [1]
        assert planes_used(client) == ["native"]
        await worker.served.unregister()
        ghost = await cluster.join()
        deaf = msgspec.structs.replace(record.stator, address="127.0.0.1:1", path="")
        await ghost.discovery.register(msgspec.structs.replace(record, stator=deaf))
        other = await cluster.client()
        await other.wait_for_instances(timeout=5)
        assert await other.generate(2).collect() == [2]
        assert "http2" in planes_used(other)


async def test_a_worker_that_is_cut_off_in_mid_stream() -> None:
    async with Cluster.open("compatible", request_plane="http2", check=False) as cluster:
        worker = await cluster.worker(endless)
        client = await cluster.client()
        async with client.generate("x") as stream:
            assert await anext(stream) == "x"
            caller = client._services.network._clients["http2"]
            assert isinstance(caller, Http2Client)
            caller.cut()
            with pytest.raises(StreamIncomplete):
                async for _ in stream:
                    pass
        await eventually(lambda: worker.served._serving.inflight == 0, what="the handler was told")


async def test_a_worker_that_leaves_lets_its_streams_finish() -> None:
    release = asyncio.Event()

    async def waits(request: Any, context: Context) -> AsyncIterator[Any]:
        yield 1
        await release.wait()
        yield 2

    async with Cluster.open("compatible", request_plane="http2") as cluster:
        worker = await cluster.worker(waits)
        client = await cluster.client()
        async with client.generate("x") as stream:
            assert await anext(stream) == 1
            (server,) = (worker.runtime._services.network._servers or {}).values()
            assert isinstance(server, Http2Server)
            server.drain()
            with pytest.raises(Unavailable):
                await client.generate("y").collect()
            release.set()
            assert [item async for item in stream] == [2]


def test_plugging_the_plane_in_imports_no_library() -> None:
    code = (
        "import sys; import stator.transports.http2 as plane; plane.Http2Plane();"
        "print(sorted(name for name in ('h2', 'hpack', 'aiohttp', 'cryptography') if name in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert found.stdout.strip() == "[]"
