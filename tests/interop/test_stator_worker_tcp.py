"""A client of the reference calls a Stator worker over TCP."""

import asyncio
import hashlib
import itertools
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from interop.peers import Peer, discovery_root, needs_reference, peer
from stator.runtime import Context, Runtime, ServedEndpoint
from stator.testing.plane_suite import eventually

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discovery_root(tmp_path_factory)


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[Peer]:
    with peer("peer_client.py", root) as process:
        yield process


@pytest.fixture(scope="module")
def msgpack_client(root: Path) -> Iterator[Peer]:
    with peer("peer_client.py", root, DYN_REQUEST_PLANE_CODEC="msgpack") as process:
        yield process


@pytest.fixture(scope="module")
def tracing_client(root: Path) -> Iterator[Peer]:
    with peer("peer_client.py", root, DYN_LOGGING_JSONL="1", DYN_LOG="info") as process:
        yield process


class Worker:
    """A served handler and what became of its requests."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.contexts: list[Context] = []
        self.ended: list[str] = []
        self.served: ServedEndpoint

    async def observed(self, handler: Any, request: Any, context: Context) -> AsyncIterator[Any]:
        self.contexts.append(context)
        how = "complete"
        try:
            async for item in handler(request, context):
                yield item
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            self.ended.append(how)


@asynccontextmanager
async def working(root: Path, handler: Any, *, bare: bool = False, **settings: Any) -> AsyncIterator[Worker]:
    """Serve `handler` under a name of its own; `bare`: as it is, without noting what becomes of requests."""
    worker = Worker(f"demo.backend.t{next(_numbers)}x")

    async def observed(request: Any, context: Context) -> AsyncIterator[Any]:
        async for item in worker.observed(handler, request, context):
            yield item

    async with (
        Runtime.connect(plane="compatible", discovery="file", file__root=str(root), **settings) as runtime,
        runtime.endpoint(worker.endpoint).serving(handler if bare else observed) as worker.served,
    ):
        yield worker
        await eventually(lambda: worker.served.inflight == 0, what="handlers ended")


async def count(request: Any, context: Context) -> AsyncIterator[Any]:
    for number in range(request["n"]):
        yield {"token_ids": [number], "text": "tok"}


def counted(n: int) -> list[Any]:
    return [{"token_ids": [number], "text": "tok"} for number in range(n)]


def digest(items: list[Any]) -> dict[str, Any]:
    return {"count": len(items), "sha256": hashlib.sha256(json.dumps(items).encode()).hexdigest()}


async def endless(request: Any, context: Context) -> AsyncIterator[Any]:
    number = 0
    while not context.is_stopped:
        yield number
        number += 1
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("n", [0, 1, 3])
async def test_few_items(root: Path, client: Peer, n: int) -> None:
    async with working(root, count) as worker:
        answer = await client.ask(endpoint=worker.endpoint, request={"n": n})
        assert answer["error"] is None
        assert answer["items"] == counted(n)


async def test_ten_thousand_items(root: Path, client: Peer) -> None:
    async with working(root, count) as worker:
        answer = await client.ask(endpoint=worker.endpoint, request={"n": 10_000})
        assert answer["error"] is None
        assert answer["items"] == digest(counted(10_000))


async def test_a_request_and_an_item_of_ten_megabytes(root: Path, client: Peer) -> None:
    async def echo(request: Any, context: Context) -> AsyncIterator[Any]:
        yield request["text"]

    text = "abcdefghij" * 1_000_000
    async with working(root, echo) as worker:
        answer = await client.ask(endpoint=worker.endpoint, request={"text": text})
        assert answer["error"] is None
        assert answer["items"] == digest([text])


@pytest.mark.parametrize("codec", ["json", "msgpack"])
async def test_values_arrive_as_they_are(root: Path, client: Peer, msgpack_client: Peer, codec: str) -> None:
    values = [
        None,
        True,
        -1.5,
        "grüße 👍\u2028\x00",
        [1, [2]],
        {"a": {"b": None}},
        2**63,
        -(2**63),
        {"data": 1, "event": "error"},
    ]

    async def echo(request: Any, context: Context) -> AsyncIterator[Any]:
        yield request
        for value in request["values"][1:]:
            yield value
        yield {"nan": float("nan")}

    asked = client if codec == "json" else msgpack_client
    async with working(root, echo) as worker:
        answer = await asked.ask(endpoint=worker.endpoint, request={"values": values})
        assert answer["error"] is None
        assert answer["items"] == [{"values": values}, *values[1:], {"nan": None}]


@pytest.mark.parametrize("first", [0, 2])
async def test_an_error(root: Path, client: Peer, first: int) -> None:
    async def fails(request: Any, context: Context) -> AsyncIterator[Any]:
        for number in range(first):
            yield number
        raise ValueError("boom")

    async with working(root, fails) as worker:
        answer = await client.ask(endpoint=worker.endpoint, request={})
        assert answer["items"] == list(range(first))
        assert answer["error"] == "ValueError: BackendInvalidArgument: ValueError: boom"


async def test_an_item_that_cannot_be_sent_is_an_error(root: Path, client: Peer) -> None:
    async def unsendable(request: Any, context: Context) -> AsyncIterator[Any]:
        yield 1
        yield object()

    async with working(root, unsendable) as worker:
        answer = await client.ask(endpoint=worker.endpoint, request={})
        assert answer["items"] == [1]
        assert answer["error"].startswith("ValueError: BackendUnknown: object value cannot be sent")


async def test_a_handler_that_does_not_start(root: Path, client: Peer) -> None:
    class Refuses:
        def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
            raise TypeError("no model")

    async with working(root, Refuses(), bare=True) as worker:
        answer = await client.ask(endpoint=worker.endpoint, request={})
        assert answer["error"] is not None
        assert "CannotConnect" in answer["error"]
        assert "Generate Error: TypeError: no model" in answer["error"]


async def test_stop(root: Path, client: Peer) -> None:
    async with working(root, endless) as worker:
        answer = await client.ask(endpoint=worker.endpoint, request={}, take=3, then="stop")
        assert answer["error"] is None
        assert answer["items"][:3] == [0, 1, 2]
        await eventually(lambda: worker.ended == ["complete"], what="the handler ended by itself")
        assert not worker.contexts[0].is_killed


async def test_a_dropped_stream_is_a_kill(root: Path, client: Peer) -> None:
    async with working(root, endless) as worker:
        answer = await client.ask(endpoint=worker.endpoint, request={}, take=3, then="drop")
        assert answer["items"] == [0, 1, 2]
        await eventually(lambda: len(worker.ended) == 1, what="the handler ended")
        assert worker.contexts[0].is_killed


async def test_metadata_and_id(root: Path, client: Peer) -> None:
    async with working(root, count) as worker:
        metadata = {"tenant": "t1", "ü": "ö"}
        await client.ask(endpoint=worker.endpoint, request={"n": 1}, id="my-request", metadata=metadata)
        assert worker.contexts[0].id == "my-request"
        assert worker.contexts[0].metadata == metadata
        assert "traceparent" not in worker.contexts[0].headers


async def test_trace_headers(root: Path, tracing_client: Peer) -> None:
    async with working(root, count) as worker:
        answer = await tracing_client.ask(endpoint=worker.endpoint, request={"n": 1})
        assert answer["error"] is None
        version, trace, span, flags = worker.contexts[0].headers["traceparent"].split("-")
        assert (version, len(trace), len(span), len(flags)) == ("00", 32, 16, 2)


async def test_a_worker_killed_in_mid_stream(root: Path, client: Peer) -> None:
    endpoint = f"demo.backend.t{next(_numbers)}x"
    script = Path(__file__).with_name("stator_worker.py")
    process = await asyncio.create_subprocess_exec(sys.executable, str(script), str(root), endpoint)
    try:
        warm = await client.ask(endpoint=endpoint, request={}, take=1, then="stop")
        assert warm["error"] is None
        answer = client.ask_soon(endpoint=endpoint, request={})
        await asyncio.sleep(0.3)
        process.kill()
        got = await asyncio.to_thread(answer.get, True, 15)
        assert "Disconnected: Stream ended before generation completed" in got["error"]
        assert got["items"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_two_hundred_at_once(root: Path, client: Peer) -> None:
    async with working(root, count) as worker:
        answer = await client.ask(endpoint=worker.endpoint, request={"n": 30}, times=200)
        assert {result["error"] for result in answer["results"]} == {None}
        assert all(result["items"] == counted(30) for result in answer["results"])


async def test_a_worker_at_capacity(root: Path, client: Peer) -> None:
    go = asyncio.Event()

    async def waits(request: Any, context: Context) -> AsyncIterator[Any]:
        await go.wait()
        yield 1

    async with working(root, waits, admission__slots=1, admission__queue=2) as worker:
        running = [client.ask_soon(endpoint=worker.endpoint, request={}, id=f"r{n}") for n in range(6)]
        await eventually(lambda: sum(not one.empty() for one in running) == 3, within=20, what="three were refused")
        assert len(worker.contexts) == 1
        go.set()
        answers = [await asyncio.to_thread(one.get, True, 30) for one in running]
        refused = [answer["error"] for answer in answers if answer["error"]]
        assert len(refused) == 3
        assert all("ResourceExhausted" in error for error in refused)
        assert len(worker.contexts) == 3


async def test_an_endpoint_that_left_is_not_waited_for(root: Path, client: Peer) -> None:
    """Its record may still be listed: the reference's client would wait until it is not."""
    async with working(root, count) as worker:
        assert (await client.ask(endpoint=worker.endpoint, request={"n": 1}))["error"] is None
        worker.served.drain()
        answer = await client.ask(endpoint=worker.endpoint, request={"n": 1}, within=10)
        assert "Unavailable" in answer["error"]
        worker.served._services.network.unregister(worker.served._path)  # pyright: ignore[reportPrivateUsage]
        answer = await client.ask(endpoint=worker.endpoint, request={"n": 1}, within=10)
        assert "CannotConnect" in answer["error"]
        assert "no endpoint is served" in answer["error"]
