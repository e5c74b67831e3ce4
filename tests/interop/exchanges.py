"""What a release of the reference and Stator exchange, whatever it goes by: subclass `Exchanges`, say which release, which plane and
which discovery; or `Meeting`, for cases of one's own alone.

One worker and one client of the reference per class; workers and clients of ours per case.
"""

import asyncio
import hashlib
import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from interop.peers import REFERENCE, Peer, discovery_root, peer, records_in
from stator.errors import Cancelled, EngineError, StatorError, StreamIncomplete
from stator.protocol.records import EndpointRecord
from stator.runtime import Client, Context, Runtime
from stator.runtime.plugins import load_plugin
from stator.testing.etcd_server import EtcdServer, etcd_server
from stator.testing.nats_server import NatsServer, nats_server
from stator.testing.plane_suite import eventually

__all__ = [
    "VALUES",
    "Exchanges",
    "Meeting",
    "Place",
    "count",
    "counted",
    "digest",
    "journal",
    "killed_in_mid_stream",
    "refusals_of_one_that_left",
]

_numbers = itertools.count(1)

VALUES = [None, True, -1.5, "grüße 👍\u2028\x00", [1, [2]], {"a": {"b": None}}, 2**63, -(2**63), {"data": 1, "event": "error"}]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where both sides meet."""

    root: Path
    python: Path
    nats: NatsServer | None
    etcd: EtcdServer | None
    """where discovery is; None: in files at `root`"""

    @property
    def variables(self) -> dict[str, str]:
        """What a process of the reference is told."""
        told: dict[str, str] = {}
        if self.nats is not None:
            told |= {"DYN_REQUEST_PLANE": "nats", "NATS_SERVER": self.nats.url}
        if self.etcd is not None:
            told |= {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": self.etcd.url}
        return told

    @property
    def settings(self) -> dict[str, Any]:
        """What a runtime of ours is told."""
        common: dict[str, Any] = {"plane": "compatible"}
        if self.etcd is None:
            common |= {"discovery": "file", "file__root": str(self.root)}
        else:
            common |= {"discovery": "etcd", "etcd__endpoints": (self.etcd.url,)}
        if self.nats is not None:
            common |= {"request_plane": "nats", "nats__servers": (self.nats.url,)}
        return common

    @contextmanager
    def peer(self, script: str, **env: str) -> Iterator[Peer]:
        with peer(script, self.root, python=self.python, **self.variables, **env) as process:
            yield process

    def wait_for(self, *endpoints: str) -> None:
        """Wait until the reference has registered them."""
        deadline = time.monotonic() + 60
        while missing := [endpoint for endpoint in endpoints if not self._is_there(endpoint)]:
            assert time.monotonic() < deadline, f"{missing} were not registered"
            time.sleep(0.05)

    def _is_there(self, endpoint: str) -> bool:
        if self.etcd is not None:
            return bool(self.etcd.keys(f"v1/instances/demo/backend/{endpoint}/"))
        return any(record.endpoint == endpoint for record in records_in(self.root))

    def record(self, endpoint: str) -> EndpointRecord:
        """The record of an endpoint of the reference, from a file."""
        return next(record for record in records_in(self.root) if record.endpoint == endpoint)

    @asynccontextmanager
    async def calling(self, endpoint: str, **settings: Any) -> AsyncGenerator[Client, None]:
        """A client of ours."""
        async with Runtime.connect(**self.settings, **settings) as runtime:
            client = await runtime.endpoint(f"demo.backend.{endpoint}").client()
            await client.wait_for_instances()
            yield client

    @asynccontextmanager
    async def working(self, handler: Any, **settings: Any) -> AsyncGenerator["Ours", None]:
        """A worker of ours, at an endpoint of its own."""
        ours = Ours(handler, f"demo.backend.t{next(_numbers)}")
        async with (
            Runtime.connect(**self.settings, **settings) as runtime,
            runtime.endpoint(ours.endpoint).serving(ours.generate) as ours.served,
        ):
            yield ours
            await eventually(lambda: ours.served.inflight == 0, what="handlers ended")


class Ours:
    """What a worker of ours saw."""

    def __init__(self, handler: Any, endpoint: str) -> None:
        self._handler = handler
        self.endpoint = endpoint
        self.contexts: list[Context] = []
        self.ended: list[str] = []
        self.served: Any = None

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.contexts.append(context)
        end = "complete"
        try:
            async for item in self._handler(request, context):
                yield item
        except BaseException as error:
            end = type(error).__name__
            raise
        finally:
            self.ended.append(end)


async def journal(client: Client, id: str) -> dict[str, Any]:
    """What the reference's worker noted at the end of request `id`."""
    deadline = asyncio.get_running_loop().time() + 10
    while True:
        (ended,) = await client.generate({"mode": "journal", "of": id}).collect()
        if ended:
            return ended[0]
        assert asyncio.get_running_loop().time() < deadline, f"{id} did not end at the worker"
        await asyncio.sleep(0.05)


async def count(request: Any, context: Context) -> AsyncIterator[Any]:
    for number in range(request["n"]):
        yield {"token_ids": [number], "text": "tok"}


async def endless(request: Any, context: Context) -> AsyncIterator[Any]:
    number = 0
    while not context.is_stopped:
        yield number
        number += 1
        await asyncio.sleep(0.002)


def counted(n: int) -> list[Any]:
    return [{"token_ids": [number], "text": "tok"} for number in range(n)]


def digest(items: list[Any]) -> dict[str, Any]:
    return {"count": len(items), "sha256": hashlib.sha256(json.dumps(items).encode()).hexdigest()}


async def refusals_of_one_that_left(place: Place, client: Peer) -> tuple[str, str]:
    """What its client says of an endpoint of ours that drains, and of one that is gone but still listed: it would wait until it is
    not."""
    async with place.working(count) as ours:
        assert (await client.ask(endpoint=ours.endpoint, request={"n": 1}))["error"] is None
        ours.served.drain()
        draining = await client.ask(endpoint=ours.endpoint, request={"n": 1}, within=10)
        ours.served._services.network.unregister(ours.served._path)
        gone = await client.ask(endpoint=ours.endpoint, request={"n": 1}, within=10)
        return draining["error"], gone["error"]


async def killed_in_mid_stream(place: Place) -> None:
    """A worker of the reference dies at `place`, where no other is: streams end, whether items came or not."""
    with place.peer("peer_worker.py") as doomed:
        await asyncio.to_thread(place.wait_for, "generate", "broken")
        async with place.calling("generate") as client:
            streaming = client.generate({"mode": "until stopped"})
            waiting = client.generate({"mode": "hold"})
            assert await anext(streaming) == 0
            assert await anext(waiting) == 1
            await asyncio.to_thread(doomed.kill)
            for stream in (streaming, waiting):
                with pytest.raises(StreamIncomplete):
                    async with asyncio.timeout(5):
                        await stream.collect()
            with pytest.raises(StatorError) as caught:
                await client.generate({"mode": "count", "n": 1}).collect()
            assert caught.value.retryable


class Meeting:
    """A place, and the processes of the reference there."""

    reference: ClassVar[Path] = REFERENCE
    over_nats: ClassVar[bool] = False
    over_etcd: ClassVar[bool] = False

    @pytest.fixture(scope="class")
    @classmethod
    def place(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
        root = discovery_root(tmp_path_factory)
        with ExitStack() as stack:
            nats = stack.enter_context(nats_server(tmp_path_factory.mktemp("nats"))) if cls.over_nats else None
            etcd = None
            if cls.over_etcd:
                load_plugin("stator.discovery", "etcd")
                etcd = stack.enter_context(etcd_server(tmp_path_factory.mktemp("etcd")))
            yield Place(root=root, python=cls.reference, nats=nats, etcd=etcd)

    @pytest.fixture(scope="class")
    @classmethod
    def worker(cls, place: Place) -> Iterator[Peer]:
        with place.peer("peer_worker.py") as process:
            place.wait_for("generate", "broken")
            yield process

    @pytest.fixture(scope="class")
    @classmethod
    def talker(cls, place: Place) -> Iterator[Peer]:
        with place.peer("peer_bidirectional.py") as process:
            place.wait_for("converse", "journal")
            yield process

    @pytest.fixture(scope="class")
    @classmethod
    def client(cls, place: Place) -> Iterator[Peer]:
        with place.peer("peer_client.py") as process:
            yield process


class Exchanges(Meeting):
    """The cases."""

    error_text: ClassVar[str] = "ValueError: BackendInvalidArgument: ValueError: boom"
    """how its Python client shows a `ValueError("boom")` of our worker"""
    unsendable: ClassVar[str] = "ValueError: BackendUnknown: object value cannot be sent"
    overloaded: ClassVar[str] = "ResourceExhausted"

    # -- its worker, our client

    @pytest.mark.parametrize("n", [0, 1, 10_000])
    async def test_its_items(self, place: Place, worker: Peer, n: int) -> None:
        async with place.calling("generate") as client:
            assert await client.generate({"mode": "count", "n": n}).collect() == counted(n)

    @pytest.mark.parametrize("codec", ["json", "msgpack"])
    async def test_values_there_and_back(self, place: Place, worker: Peer, codec: str) -> None:
        async with place.calling("generate", tcp__codec=codec) as client:
            for value in [*VALUES, "x" * 500_000]:
                assert await client.generate({"mode": "echo", "value": value}).collect() == [value]

    async def test_an_item_of_ten_megabytes(self, place: Place, worker: Peer) -> None:
        async with place.calling("generate") as client:
            assert await client.generate({"mode": "big", "n": 10_000_000}).collect() == ["x" * 10_000_000]

    async def test_its_facts(self, place: Place, worker: Peer) -> None:
        async with place.calling("generate") as client:
            (facts,) = await client.generate({"mode": "facts"}, id="my-id", metadata={"tenant": "t1", "ü": "ö"}).collect()
            assert (facts["id"], facts["metadata"]) == ("my-id", {"tenant": "t1", "ü": "ö"})

    @pytest.mark.parametrize("n", [0, 2])
    async def test_its_error(self, place: Place, worker: Peer, n: int) -> None:
        async with place.calling("generate") as client:
            got: list[Any] = []
            with pytest.raises(EngineError, match="boom") as caught:
                async for item in client.generate({"mode": "raise", "n": n}):
                    got.append(item)
            assert got == list(range(n))
            assert caught.value.kind == "InvalidArgument"
            assert [caught.value.instance] == client.instance_ids()

    async def test_its_handler_that_does_not_start(self, place: Place, worker: Peer) -> None:
        async with place.calling("broken") as client:
            with pytest.raises(StatorError, match="not today"):
                await client.generate({}, retry="never").collect()

    async def test_stopping_it(self, place: Place, worker: Peer) -> None:
        async with place.calling("generate") as client:
            async with client.generate({"mode": "until stopped"}, id="stopped") as stream:
                async for item in stream:
                    if item == 3:
                        stream.stop()
            noted = await journal(client, "stopped")
            assert (noted["stopped"], noted["killed"]) == (True, False)

    async def test_killing_it(self, place: Place, worker: Peer) -> None:
        async with place.calling("generate") as client:
            async with client.generate({"mode": "hold"}, id="killed") as stream:
                assert await anext(stream) == 1
                stream.kill()
                with pytest.raises(Cancelled):
                    await anext(stream)
            assert (await journal(client, "killed"))["killed"]

    @pytest.mark.parametrize("mode", ["hold", "until stopped"])
    async def test_dropping_its_stream(self, place: Place, worker: Peer, mode: str) -> None:
        """At once, although the worker that holds sends nothing more."""
        async with place.calling("generate") as client:
            async with client.generate({"mode": mode}, id=f"dropped in {mode}") as stream:
                assert await anext(stream) in (0, 1)
            assert (await journal(client, f"dropped in {mode}"))["killed"]

    async def test_two_hundred_requests_to_it_at_once(self, place: Place, worker: Peer) -> None:
        async with place.calling("generate") as client:
            answers = await asyncio.gather(*(client.generate({"mode": "count", "n": 30}).collect() for _ in range(200)))
            assert all(answer == counted(30) for answer in answers)

    async def test_a_conversation_with_it(self, place: Place, talker: Peer) -> None:
        async with place.calling("converse") as client, client.converse(id="talk", metadata={"a": "b"}) as conversation:
            for number, value in enumerate([{"x": 1}, 2, "drei 👍", [None]]):
                assert await conversation.send(value)
                assert await anext(conversation) == {"echo": value, "n": number + 1}
            await conversation.end_input()
            assert await conversation.collect() == ["bye"]

    async def test_stopping_a_conversation_with_it(self, place: Place, talker: Peer) -> None:
        async with place.calling("converse") as client, place.calling("journal") as noted:
            async with client.converse(id="stopped talk") as conversation:
                await conversation.send({"mode": "hold"})
                assert await anext(conversation) == "holding"
                conversation.stop()
                assert await conversation.collect() == []
            seen = await journal(noted, "stopped talk")
            assert (seen["stopped"], seen["killed"]) == (True, False)

    # -- its client, our worker

    @pytest.mark.parametrize("n", [0, 1, 3])
    async def test_our_items(self, place: Place, client: Peer, n: int) -> None:
        async with place.working(count) as ours:
            answer = await client.ask(endpoint=ours.endpoint, request={"n": n})
            assert answer["error"] is None, answer
            assert answer["items"] == counted(n)

    async def test_ten_thousand_of_our_items(self, place: Place, client: Peer) -> None:
        async with place.working(count) as ours:
            answer = await client.ask(endpoint=ours.endpoint, request={"n": 10_000})
            assert answer["error"] is None, answer
            assert answer["items"] == digest(counted(10_000))

    async def test_our_values(self, place: Place, client: Peer) -> None:
        async def echo(request: Any, context: Context) -> AsyncIterator[Any]:
            yield request
            for value in request["values"][1:]:
                yield value
            yield {"nan": float("nan")}

        async with place.working(echo) as ours:
            answer = await client.ask(endpoint=ours.endpoint, request={"values": VALUES})
            assert answer["error"] is None, answer
            assert answer["items"] == [{"values": VALUES}, *VALUES[1:], {"nan": None}]

    @pytest.mark.parametrize("first", [0, 2])
    async def test_our_error(self, place: Place, client: Peer, first: int) -> None:
        async def fails(request: Any, context: Context) -> AsyncIterator[Any]:
            for number in range(first):
                yield number
            raise ValueError("boom")

        async with place.working(fails) as ours:
            answer = await client.ask(endpoint=ours.endpoint, request={})
            assert answer["items"] == list(range(first))
            assert answer["error"] == self.error_text, answer

    async def test_our_item_that_cannot_be_sent(self, place: Place, client: Peer) -> None:
        async def unsendable(request: Any, context: Context) -> AsyncIterator[Any]:
            yield 1
            yield object()

        async with place.working(unsendable) as ours:
            answer = await client.ask(endpoint=ours.endpoint, request={})
            assert answer["items"] == [1]
            assert answer["error"].startswith(self.unsendable), answer

    async def test_it_stops_us(self, place: Place, client: Peer) -> None:
        async with place.working(endless) as ours:
            answer = await client.ask(endpoint=ours.endpoint, request={}, take=3, then="stop")
            assert answer["error"] is None, answer
            assert answer["items"][:3] == [0, 1, 2]
            await eventually(lambda: ours.ended == ["complete"], what="the handler ended by itself")
            assert not ours.contexts[0].is_killed

    async def test_it_drops_our_stream(self, place: Place, client: Peer) -> None:
        async with place.working(endless) as ours:
            answer = await client.ask(endpoint=ours.endpoint, request={}, take=3, then="drop")
            assert answer["items"] == [0, 1, 2]
            await eventually(lambda: len(ours.ended) == 1, what="the handler ended")
            assert ours.contexts[0].is_killed

    async def test_our_facts(self, place: Place, client: Peer) -> None:
        async with place.working(count) as ours:
            metadata = {"tenant": "t1", "ü": "ö"}
            await client.ask(endpoint=ours.endpoint, request={"n": 1}, id="my-request", metadata=metadata)
            assert (ours.contexts[0].id, ours.contexts[0].metadata) == ("my-request", metadata)

    async def test_two_hundred_requests_of_it_at_once(self, place: Place, client: Peer) -> None:
        async with place.working(count) as ours:
            answer = await client.ask(endpoint=ours.endpoint, request={"n": 30}, times=200)
            assert {result["error"] for result in answer["results"]} == {None}
            assert all(result["items"] == counted(30) for result in answer["results"])

    async def test_we_are_at_capacity(self, place: Place, client: Peer) -> None:
        go = asyncio.Event()

        async def waits(request: Any, context: Context) -> AsyncIterator[Any]:
            if request:
                await go.wait()
            yield 1

        async with place.working(waits, admission__slots=1, admission__queue=2) as ours:
            await client.ask(endpoint=ours.endpoint, request=0)  # over NATS, 1.6.1 hangs when it makes many clients at once
            running = [client.ask_soon(endpoint=ours.endpoint, request=1, id=f"r{n}") for n in range(6)]
            await eventually(lambda: sum(not one.empty() for one in running) == 3, within=20, what="three were refused")
            assert len(ours.contexts) == 2
            go.set()
            answers = [await asyncio.to_thread(one.get, True, 30) for one in running]
            refused = [answer["error"] for answer in answers if answer["error"]]
            assert len(refused) == 3
            assert all(self.overloaded in error for error in refused), refused
            assert len(ours.contexts) == 4
