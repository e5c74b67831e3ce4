"""A Stator client calls a worker of the reference over TCP."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interop.peers import Peer, discovery_root, needs_reference, peer, records_in
from stator.errors import Cancelled, ConnectFailed, Disconnected, EngineError, StatorError, StreamIncomplete
from stator.protocol.envelope import RequestEnvelope
from stator.runtime import Client, ResponseStream, Runtime
from stator.transports.inbox import Inbox, Patience, PhaseLimits

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discovery_root(tmp_path_factory)


@pytest.fixture(scope="module")
def worker(root: Path) -> Iterator[Peer]:
    with peer("peer_worker.py", root, DYN_LOGGING_JSONL="1", DYN_LOG="info") as process:
        wait_for_records(root, 2)
        yield process


def wait_for_records(root: Path, n: int) -> None:
    deadline = time.monotonic() + 30
    while len(records_in(root)) < n:
        assert time.monotonic() < deadline, "the worker did not register"
        time.sleep(0.05)


class Caller:
    """Stator clients of the reference's endpoints."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.clients: dict[str, Client] = {}

    async def client(self, endpoint: str = "generate") -> Client:
        if endpoint not in self.clients:
            client = self.clients[endpoint] = await self.runtime.endpoint(f"demo.backend.{endpoint}").client()
            await client.wait_for_instances()
        return self.clients[endpoint]

    async def stream(self, request: Any, *, endpoint: str = "generate", **options: Any) -> ResponseStream:
        return (await self.client(endpoint)).generate(request, **options)

    async def collect(self, request: Any, **options: Any) -> list[Any]:
        return await (await self.stream(request, **options)).collect()

    async def journal(self, id: str) -> dict[str, Any]:
        """What the worker noted at the end of request `id`."""
        deadline = asyncio.get_running_loop().time() + 10
        while True:
            (ended,) = await self.collect({"mode": "journal", "of": id})
            if ended:
                return ended[0]
            assert asyncio.get_running_loop().time() < deadline, f"{id} did not end at the worker"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def calling(root: Path, **settings: Any) -> AsyncIterator[Caller]:
    async with Runtime.connect(plane="compatible", discovery="file", file__root=str(root), **settings) as runtime:
        yield Caller(runtime)


async def take(stream: ResponseStream, into: list[Any]) -> None:
    """Read to the end, or to the error that comes after the items."""
    async for batch in stream.batches():
        into.extend(batch)


def counted(n: int) -> list[Any]:
    return [{"token_ids": [number], "text": "tok"} for number in range(n)]


@pytest.mark.parametrize("n", [0, 1, 10_000])
async def test_items(root: Path, worker: Peer, n: int) -> None:
    async with calling(root) as caller:
        assert await caller.collect({"mode": "count", "n": n}) == counted(n)


async def test_an_item_of_ten_megabytes(root: Path, worker: Peer) -> None:
    async with calling(root) as caller:
        assert await caller.collect({"mode": "big", "n": 10_000_000}) == ["x" * 10_000_000]


@pytest.mark.parametrize("codec", ["json", "msgpack"])
@pytest.mark.parametrize(
    "value", [None, "grüße 👍\u2028", [1, [2.5, {"a": None}]], 2**63, -(2**63), {"data": 1, "event": "error"}, "x" * 3_000_000]
)
async def test_values_arrive_as_they_are(root: Path, worker: Peer, codec: str, value: Any) -> None:
    async with calling(root, tcp__codec=codec) as caller:
        assert await caller.collect({"mode": "echo", "value": value}) == [value]


@pytest.mark.parametrize("n", [0, 2])
async def test_an_error(root: Path, worker: Peer, n: int) -> None:
    async with calling(root) as caller:
        got: list[Any] = []
        with pytest.raises(EngineError, match="ValueError: boom") as caught:
            await take(await caller.stream({"mode": "raise", "n": n}), got)
        assert got == list(range(n))
        assert caught.value.kind == "InvalidArgument"
        assert [caught.value.instance] == (await caller.client()).instance_ids()


async def test_an_item_that_the_reference_cannot_send(root: Path, worker: Peer) -> None:
    """It cuts the connection, sometimes before the items that were fine have left."""
    async with calling(root) as caller:
        got: list[Any] = []
        with pytest.raises(Disconnected):
            await take(await caller.stream({"mode": "unsendable"}, retry="never"), got)
        assert got in ([], [1])


async def test_a_handler_that_does_not_start(root: Path, worker: Peer) -> None:
    async with calling(root) as caller:
        with pytest.raises(ConnectFailed, match="not today") as caught:
            await caller.collect({}, endpoint="broken", retry="never")
        assert caught.value.phase == "prologue"


@pytest.mark.parametrize("first", [0, 1, 5])
async def test_stop(root: Path, worker: Peer, first: int) -> None:
    async with calling(root) as caller:
        id = f"stopped after {first}"
        got = 0
        async with await caller.stream({"mode": "until stopped"}, id=id) as stream:
            if not first:
                stream.stop()
            async for _ in stream:
                got += 1
                if got == first:
                    stream.stop()
        assert got >= first
        noted = await caller.journal(id)
        assert noted["stopped"]
        assert not noted["killed"]


@pytest.mark.parametrize("mode", ["hold", "until stopped"])
async def test_a_dropped_stream_is_a_kill(root: Path, worker: Peer, mode: str) -> None:
    """At once, although the worker that holds sends nothing more."""
    async with calling(root) as caller:
        id = f"dropped in {mode}"
        async with await caller.stream({"mode": mode}, id=id) as stream:
            assert await anext(stream) in (0, 1)
        assert (await caller.journal(id))["killed"]


async def test_kill(root: Path, worker: Peer) -> None:
    async with calling(root) as caller:
        stream = await caller.stream({"mode": "hold"}, id="to be killed")
        assert await anext(stream) == 1
        stream.kill()
        with pytest.raises((Cancelled, StopAsyncIteration)):
            await anext(stream)
        assert (await caller.journal("to be killed"))["killed"]


async def test_metadata_id_and_trace(root: Path, worker: Peer) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with calling(root) as caller:
        metadata = {"tenant": "t1", "ü": "ö"}
        (facts,) = await caller.collect({"mode": "facts"}, id="id-1", metadata=metadata, headers={"traceparent": trace})
        assert facts == {
            "id": "id-1",
            "metadata": metadata,
            "trace_id": "0af7651916cd43dd8448eb211c80319c",
            "parent_span_id": "b7ad6b7169203331",
        }


async def test_two_hundred_at_once(root: Path, worker: Peer) -> None:
    async with calling(root) as caller:
        answers = await asyncio.gather(*(caller.collect({"mode": "count", "n": 30}, id=f"r{n}") for n in range(200)))
        assert answers == [counted(30)] * 200


async def test_an_endpoint_the_worker_does_not_know(root: Path, worker: Peer) -> None:
    async with calling(root) as caller:
        (record,) = (await caller.client()).instances()
        moved = msgspec.structs.replace(
            record, transport=msgspec.structs.replace(record.transport, tcp=f"{record.transport.tcp}-gone")
        )
        services = caller.runtime._services  # pyright: ignore[reportPrivateUsage]
        inbox = Inbox(wheel=services.wheel, patience=Patience(PhaseLimits()), instance=record.instance_id)
        await services.network.open(moved, RequestEnvelope(id="nowhere", payload=b"{}"), inbox)
        with pytest.raises(StatorError, match="Unknown endpoint") as caught:
            await inbox.more()
        assert caught.value.retryable


async def test_a_request_larger_than_the_worker_takes(root: Path, worker: Peer) -> None:
    async with calling(root, tcp__max_message_size=50_000_000) as caller:
        with pytest.raises(StatorError) as caught:
            await caller.collect({"mode": "echo", "value": "x" * 40_000_000}, retry="never")
        assert caught.value.phase == "accept"
        assert await caller.collect({"mode": "count", "n": 1}) == counted(1)


async def test_a_worker_killed_in_mid_stream(root: Path, tmp_path: Path) -> None:
    with peer("peer_worker.py", tmp_path) as doomed:
        await asyncio.to_thread(wait_for_records, tmp_path, 2)
        async with calling(tmp_path) as caller:
            streaming = await caller.stream({"mode": "until stopped"})
            waiting = await caller.stream({"mode": "hold"})
            assert await anext(streaming) == 0
            assert await anext(waiting) == 1
            await asyncio.to_thread(doomed.kill)
            for stream in (streaming, waiting):
                with pytest.raises(StreamIncomplete):
                    async with asyncio.timeout(5):
                        await stream.collect()
            with pytest.raises(StatorError) as caught:
                await caller.collect({"mode": "count", "n": 1})
            assert caught.value.retryable
