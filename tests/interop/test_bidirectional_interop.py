"""Bidirectional requests between Stator and the reference over TCP (`spec/10 §5`).

The reference has no bidirectional client in Python: as a client it is played by the bytes it was recorded with.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from interop.peers import Peer, discovery_root, needs_reference, peer, records_in
from stator.errors import Cancelled, EngineError, Timeout
from stator.protocol.two_part import TwoPartParser
from stator.runtime import Client, Context, Conversation, Runtime
from stator.testing.plane_suite import eventually
from stator.testing.recorded import recorded

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discovery_root(tmp_path_factory)


@pytest.fixture(scope="module")
def worker(root: Path) -> Iterator[Peer]:
    with peer("peer_bidirectional.py", root) as process:
        deadline = time.monotonic() + 30
        while len(records_in(root)) < 2:
            assert time.monotonic() < deadline, "the worker did not register"
            time.sleep(0.05)
        yield process


class Caller:
    """A Stator client of the reference's endpoints."""

    def __init__(self, conversations: Client, journal: Client) -> None:
        self.conversations = conversations
        self._journal = journal

    def converse(self, id: str, **options: Any) -> Conversation:
        return self.conversations.converse(id=id, **options)

    async def journal(self, id: str) -> dict[str, Any]:
        """What the worker noted at the end of conversation `id`."""
        deadline = asyncio.get_running_loop().time() + 10
        while True:
            (ended,) = await self._journal.generate({"of": id}).collect()
            if ended:
                return ended[0]
            assert asyncio.get_running_loop().time() < deadline, f"{id} did not end at the worker"
            await asyncio.sleep(0.05)


@asynccontextmanager
async def calling(root: Path, codec: str = "json") -> AsyncIterator[Caller]:
    async with Runtime.connect(plane="compatible", discovery="file", file__root=str(root), tcp__codec=codec) as runtime:
        conversations = await runtime.endpoint("demo.backend.converse").client()
        journal = await runtime.endpoint("demo.backend.journal").client()
        await conversations.wait_for_instances()
        await journal.wait_for_instances()
        yield Caller(conversations, journal)


@pytest.mark.parametrize("codec", ["json", "msgpack"])
async def test_each_input_is_answered(root: Path, worker: Peer, codec: str) -> None:
    async with calling(root, codec) as caller, caller.converse(f"echo-{codec}", metadata={"a": "b"}) as conversation:
        values = [{"x": 1}, 2, "drei 👍", [None], 2**63]
        for number, value in enumerate(values):
            assert await conversation.send(value)
            assert await anext(conversation) == {"echo": value, "n": number + 1}
        await conversation.end_input()
        assert await conversation.collect() == ["bye"]
        seen = await caller.journal(f"echo-{codec}")
        assert seen["end"] == "complete"
        assert seen["metadata"] == {"a": "b"}
        assert (seen["stopped"], seen["killed"]) == (False, False)


async def test_all_inputs_then_one_answer(root: Path, worker: Peer) -> None:
    async def numbers() -> AsyncIterator[Any]:
        yield {"mode": "total"}
        for number in range(5000):
            yield number

    async with calling(root) as caller, caller.converse("total", inputs=numbers()) as conversation:
        assert await conversation.collect() == [{"total": sum(range(5000))}, "bye"]


async def test_no_input(root: Path, worker: Peer) -> None:
    async with calling(root) as caller, caller.converse("none") as conversation:
        await conversation.end_input()
        assert await conversation.collect() == ["bye"]


async def test_an_input_of_a_megabyte(root: Path, worker: Peer) -> None:
    text = "x" * 1_000_000
    async with calling(root) as caller, caller.converse("large") as conversation:
        await conversation.send(text)
        await conversation.end_input()
        assert await conversation.collect() == [{"echo": text, "n": 1}, "bye"]


async def test_answers_behind_the_end_of_the_inputs(root: Path, worker: Peer) -> None:
    async with calling(root) as caller, caller.converse("after") as conversation:
        await conversation.send({"mode": "ignore", "n": 20})
        await conversation.end_input()
        assert await conversation.collect() == list(range(20))


async def test_a_worker_that_ends_early(root: Path, worker: Peer) -> None:
    async with calling(root) as caller, caller.converse("early") as conversation:
        await conversation.send({"mode": "leave"})
        assert await conversation.collect() == ["enough"]
        assert not await conversation.send(1)


async def test_a_handler_that_raises(root: Path, worker: Peer) -> None:
    async with calling(root) as caller, caller.converse("raise") as conversation:
        await conversation.send({"mode": "raise"})
        with pytest.raises(EngineError, match="ValueError: boom") as caught:
            await conversation.collect()
        assert caught.value.kind == "InvalidArgument"


async def test_stop(root: Path, worker: Peer) -> None:
    async with calling(root) as caller, caller.converse("stop") as conversation:
        await conversation.send({"mode": "hold"})
        assert await anext(conversation) == "holding"
        conversation.stop()
        assert await conversation.collect() == []
        seen = await caller.journal("stop")
        assert (seen["stopped"], seen["killed"]) == (True, False)


async def test_stop_while_the_handler_waits_for_input(root: Path, worker: Peer) -> None:
    async with calling(root) as caller, caller.converse("idle stop") as conversation:
        await conversation.send(1)
        await anext(conversation)
        conversation.stop()
        assert await conversation.collect() in ([], ["bye"])
        assert (await caller.journal("idle stop"))["stopped"]


async def test_kill(root: Path, worker: Peer) -> None:
    async with calling(root) as caller:
        async with caller.converse("kill") as conversation:
            await conversation.send({"mode": "hold"})
            assert await anext(conversation) == "holding"
            conversation.kill()
            with pytest.raises(Cancelled):
                await conversation.collect()
        assert (await caller.journal("kill"))["killed"]


async def test_leaving_kills(root: Path, worker: Peer) -> None:
    async with calling(root) as caller:
        async with caller.converse("left") as conversation:
            await conversation.send({"mode": "hold"})
            await anext(conversation)
        assert (await caller.journal("left"))["killed"]


async def test_a_unary_request_to_a_bidirectional_endpoint_of_the_reference_is_noticed_by_its_silence(
    root: Path, worker: Peer
) -> None:
    """Its worker drops such a request without a word (`spec/10 §5`)."""
    async with calling(root) as caller:
        with pytest.raises(Timeout) as caught:
            await caller.conversations.generate(1, limits={"call_home": 0.5}, retry="never").collect()
        assert caught.value.phase == "call home"


# -- the reference as a client, by its recorded bytes


class RecordedClient:
    """Sends the recorded request with our addresses in place of its own, and takes the two calls."""

    def __init__(self) -> None:
        self.request: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.response: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.handshakes: list[bytes] = []
        self._called = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> "RecordedClient":
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        size = int.from_bytes((prefix := await reader.readexactly(24))[:8], "big")
        header = await reader.readexactly(size)
        self.handshakes.append(prefix + header)
        if json.loads(header)["stream_type"] == "request":
            self.request = (reader, writer)
        else:
            self.response = (reader, writer)
        if self.request is not None and self.response is not None:
            self._called.set()

    async def say(self, address: str) -> bytes:
        """Send the recorded request to a worker's `host:port/path`; returns the acknowledgement."""
        assert self._server is not None
        home = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        where, _, path = address.partition("/")
        host, _, port = where.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        self._writers.append(writer)
        writer.write(readdressed(recorded("04-"), path, home))
        return await asyncio.wait_for(reader.readexactly(4), 5)

    async def called(self) -> None:
        async with asyncio.timeout(10):
            await self._called.wait()

    async def answer(self) -> list[tuple[bytes, bytes]]:
        """The frames of the answer, to the end of its connection."""
        assert self.response is not None
        async with asyncio.timeout(10):
            data = b""
            while b'"sentinel"' not in data and (more := await self.response[0].read(65536)):
                data += more
        return [(header, bytes(payload)) for header, payload in TwoPartParser(limit=2**20).receive_data(data)]


def readdressed(frame: bytes, path: str, home: str) -> bytes:
    """The recorded request frame for another path and another address to call."""
    old = int.from_bytes(frame[:2], "big")
    rest = frame[2 + old :]
    headers_size = int.from_bytes(rest[:2], "big")
    headers = rest[2 : 2 + headers_size]
    payload = rest[2 + headers_size + 4 :]
    header = re.sub(rb"192\.0\.2\.2:37629", home.encode(), payload[24:])
    payload = len(header).to_bytes(8, "big") + payload[8:24] + header
    name = path.encode()
    return b"".join(
        (
            len(name).to_bytes(2, "big"),
            name,
            len(headers).to_bytes(2, "big"),
            headers,
            len(payload).to_bytes(4, "big"),
            payload,
        )
    )


INPUTS = recorded("07-")
"""three inputs, then "stop\""""
STOP_SIZE = 24 + len('"stop"')
SENTINEL = (10).to_bytes(8, "big") + bytes(16) + b'"sentinel"'


def handshake(recording: str) -> bytes:
    """The handshake of a recorded worker, for the subject of the recorded request."""
    header = next(iter(TwoPartParser(limit=2**20).receive_data(recorded(recording))))[0]
    recorded_handshake = json.loads(header)
    kind = recorded_handshake["stream_type"]
    plain = recorded("04-").replace(b"\\", b"")
    (subject,) = re.findall(rb'"subject":"([0-9a-f-]+)","context":"[^"]*","stream_type":"' + kind.encode(), plain)
    header = header.replace(recorded_handshake["subject"].encode(), subject)
    return len(header).to_bytes(8, "big") + bytes(16) + header


class Worker:
    """A bidirectional endpoint of ours, and what it saw."""

    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.contexts: list[Context] = []
        self.ends: list[str] = []
        self.address = ""

    async def converse(self, inputs: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        self.contexts.append(context)
        try:
            async for each in inputs:
                self.inputs.append(each)
                yield {"echo": each, "n": len(self.inputs)}
            yield {"total": len(self.inputs)}
            self.ends.append("complete")
        except BaseException as error:
            self.ends.append(type(error).__name__)
            raise


@asynccontextmanager
async def working(root: Path) -> AsyncIterator[Worker]:
    worker = Worker()
    async with (
        Runtime.connect(plane="compatible", discovery="file", file__root=str(root)) as runtime,
        runtime.endpoint("demo.ours.converse").serving(worker.converse, bidirectional=True) as served,
    ):
        assert served.record.transport.tcp is not None
        worker.address = served.record.transport.tcp
        yield worker
        await eventually(lambda: served.inflight == 0, what="nothing in flight")


async def test_the_recorded_client_is_answered(root: Path) -> None:
    async with working(root) as worker, RecordedClient() as client:
        assert await client.say(worker.address) == bytes(4)
        await client.called()
        assert sorted(client.handshakes) == sorted(handshake(number) for number in ("36-", "37-"))
        assert client.request is not None
        client.request[1].write(INPUTS[:-STOP_SIZE] + SENTINEL)
        frames = await client.answer()
        assert frames[0] == (b'{"error":null}', b"")
        items = [json.loads(payload)["data"]["data"] for header, payload in frames[1:-2]]
        assert [item["echo"]["type"] for item in items[:-1]] == [each["type"] for each in worker.inputs]
        assert items[-1] == {"total": 3}
        assert frames[-2:] == [(b"", b'{"complete_final":true}'), (b'"sentinel"', b"")]
        assert worker.contexts[0].id == "269250b7-6b3e-4691-adb4-28805ad98baf"
        assert not worker.contexts[0].is_stopped


async def test_the_recorded_stop_is_heard(root: Path) -> None:
    async with working(root) as worker, RecordedClient() as client:
        await client.say(worker.address)
        await client.called()
        assert client.request is not None
        assert client.response is not None
        client.request[1].write(INPUTS)
        client.request[1].write_eof()
        client.response[1].write(recorded("05-"))
        await client.answer()
        await eventually(lambda: worker.ends == ["complete"], what="the handler ended")
        assert worker.contexts[0].is_stopped
        assert not worker.contexts[0].is_killed
        assert [each["type"] for each in worker.inputs][:1] == ["session.update"]


@pytest.mark.parametrize(
    "last",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(INPUTS[:-5], id="a part of a frame"),
        pytest.param((6).to_bytes(8, "big") + bytes(16) + b'"kill"', id="kill"),
        pytest.param((7).to_bytes(8, "big") + bytes(16) + b'"pause"', id="unknown control"),
        pytest.param((10).to_bytes(8, "big") + (1).to_bytes(8, "big") + bytes(8) + b'"sentinel"1', id="header and data"),
        pytest.param(bytes(8) + (1).to_bytes(8, "big") + bytes(8) + b"{", id="undecodable input"),
    ],
)
async def test_truncated_and_broken_inputs_kill(root: Path, last: bytes) -> None:
    async with working(root) as worker, RecordedClient() as client:
        await client.say(worker.address)
        await client.called()
        assert client.request is not None
        client.request[1].write(last)
        client.request[1].write_eof()
        await eventually(lambda: worker.ends == ["CancelledError"], what="the handler was killed")
        assert worker.contexts[0].is_killed
        frames = await client.answer()
        assert frames[-1][0] != b'"sentinel"'


async def test_a_reset_of_the_inputs_kills(root: Path) -> None:
    async with working(root) as worker, RecordedClient() as client:
        await client.say(worker.address)
        await client.called()
        assert client.request is not None
        client.request[1].transport.abort()
        await eventually(lambda: worker.ends == ["CancelledError"], what="the handler was killed")
