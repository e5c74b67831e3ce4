"""Broken bytes on the native plane: the connection they came on ends with a reason, nobody else notices, nothing grows.

First every kind of frame broken by hand, on real sockets beside a neighbour; then 100 000 frames broken by a seeded dice, without a socket.
"""

import asyncio
import logging
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from random import Random
from struct import pack
from typing import Any

import msgspec
import pytest

from stator.errors import ConnectFailed, Disconnected, PeerProtocolError
from stator.protocol.native.frames import (
    ACCEPT,
    CREDIT,
    CRITICAL,
    END,
    GOAWAY,
    HEADER_SIZE,
    HELLO,
    ITEMS,
    KILL,
    LAST,
    MAX_PAYLOAD,
    MORE,
    OPEN,
    PING,
    PONG,
    REFUSE,
    STOP,
    frame,
    pack_header,
)
from stator.protocol.native.hello import Goaway, Hello, Limits, read_goaway
from stator.runtime.context import Context
from stator.testing.conversation_suite import Talker
from stator.testing.native_pair import CLIENT_PROCESS, WORKER_PROCESS, NativePair
from stator.testing.native_sockets import RawPeer, native_caller, native_record, raw_listener
from stator.testing.plane_suite import INSTANCE, Caller, drain, endless, eventually
from stator.transports.inbox import Inbox
from stator.transports.native import NativeConfig

pytestmark = pytest.mark.timeout(240)

HELLO_CLIENT = frame(HELLO, payload=Hello(process=CLIENT_PROCESS, role="client").encode(), flags=CRITICAL)
HELLO_WORKER = frame(HELLO, payload=Hello(process=WORKER_PROCESS, role="worker").encode(), flags=CRITICAL)
PATH = f"{INSTANCE:x}/generate"


def body(*, head: bytes | None = None, payload: bytes = b"null", credit: int = 16384) -> bytes:
    head = msgspec.json.encode([PATH, "r1", {}, {}, None]) if head is None else head
    return pack(">IH", credit, len(head)) + head + payload


def opening(number: int = 1, **changes: Any) -> bytes:
    return frame(OPEN, number, body(**changes))


def conversing(number: int = 1) -> bytes:
    """A bidirectional request: for an endpoint of its own, which takes nothing."""
    return opening(number, head=msgspec.json.encode([f"{INSTANCE:x}/converse", "r1", {}, {}, None]), payload=b"")


# What no worker takes, as one connection says it from its first byte. Each is (name, bytes, text in the reason).
TO_WORKER: list[tuple[str, bytes, str]] = [
    ("no frame at all", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "announces"),
    ("random bytes", Random(7).randbytes(4096), ""),
    ("zeros", bytes(4096), "first frame must be HELLO"),
    ("open before hello", opening(), "first frame must be HELLO"),
    ("unknown kind before hello", frame(77), "first frame must be HELLO"),
    ("oversized hello header", pack_header(MAX_PAYLOAD + 1, HELLO, 0, 0, 0), "announces 65537 bytes"),
    ("hello above 4 KiB", frame(HELLO, payload=b" " * 4097), "allowed are 4096"),
    ("hello not json", frame(HELLO, payload=b"{"), "HELLO cannot be read"),
    ("hello empty", frame(HELLO), "HELLO cannot be read"),
    ("hello of wrong types", frame(HELLO, payload=b'{"process": 1, "role": "client"}'), "HELLO cannot be read"),
    ("hello nested too deep", frame(HELLO, payload=b"[" * 4096), "HELLO cannot be read"),
    ("hello of a worker", HELLO_WORKER, "both ends"),
    ("two hellos", HELLO_CLIENT * 2, "HELLO came twice"),
    ("unknown critical kind", HELLO_CLIENT + frame(77, flags=CRITICAL), "unknown kind 77"),
    ("unknown critical kind on a stream", HELLO_CLIENT + frame(77, 1, flags=CRITICAL), "unknown kind 77"),
    *[
        (f"kind {kind} oversized", HELLO_CLIENT + pack_header(MAX_PAYLOAD + 1, kind, 0, 0, 1), "announces 65537 bytes")
        for kind in range(1, 14)
    ],
    ("length of four gigabytes", HELLO_CLIENT + pack_header(2**32 - 1, ITEMS, 0, 0, 1), "announces 4294967295 bytes"),
    ("even stream id", HELLO_CLIENT + opening(2), "stream id 2 is even"),
    ("stream id in use", HELLO_CLIENT + opening() * 2, "stream id 1 is in use"),
    ("open on stream 0", HELLO_CLIENT + frame(OPEN, 0, body()), "kind 2 there"),
    ("empty open", HELLO_CLIENT + frame(OPEN, 1), "OPEN has only 0 bytes"),
    ("open shorter than its head", HELLO_CLIENT + frame(OPEN, 1, pack(">IH", 1, 999) + b"[]"), "announces a head"),
    ("open without credit", HELLO_CLIENT + opening(credit=0), "no credit"),
    ("open head not json", HELLO_CLIENT + opening(head=b"["), "head of OPEN"),
    ("open head not utf-8", HELLO_CLIENT + opening(head=b'["\xff","",{},{},null]'), "head of OPEN"),
    ("open head of wrong types", HELLO_CLIENT + opening(head=b'["",1,{},{},null]'), "head of OPEN"),
    ("open head with one more", HELLO_CLIENT + opening(head=b'["","",{},{},null,1]'), "head of OPEN"),
    ("open head nested too deep", HELLO_CLIENT + opening(head=b"[" * 60_000), "head of OPEN"),
    ("fragment that is not full", HELLO_CLIENT + frame(OPEN, 1, b"x", flags=MORE), "fragment of OPEN"),
    ("empty fragment", HELLO_CLIENT + frame(OPEN, 1, flags=MORE), "fragment of OPEN"),
    ("request above the limit", HELLO_CLIENT + frame(OPEN, 1, bytes(MAX_PAYLOAD), flags=MORE) * 30, "request is larger"),
    ("short credit", HELLO_CLIENT + opening() + frame(CREDIT, 1, b"123"), "CREDIT has 3 bytes"),
    ("too much credit", HELLO_CLIENT + opening() + frame(CREDIT, 1, b"\xff" * 4) * 3, "was granted"),
    ("inputs not json", HELLO_CLIENT + conversing() + frame(ITEMS, 1, b"{\n", count=1), "is not JSON"),
    ("inputs not utf-8", HELLO_CLIENT + conversing() + frame(ITEMS, 1, b'"\xff"\n', count=1), "is not JSON"),
    ("inputs that lie", HELLO_CLIENT + conversing() + frame(ITEMS, 1, b"1\n", count=2), "announces 2 items"),
    (
        "input begun without credit",
        HELLO_CLIENT + conversing() + frame(ITEMS, 1, b"1", flags=MORE),
        "began an item without credit",
    ),
    (
        "inputs behind their end",
        HELLO_CLIENT + conversing() + frame(END, 1) + frame(ITEMS, 1, b"1\n", count=1),
        "behind their end",
    ),
    ("two ends of inputs", HELLO_CLIENT + conversing() + frame(END, 1) * 2, "ended twice"),
    (
        "inputs without credit",
        HELLO_CLIENT + conversing() + frame(ITEMS, 1, b" " * 65_000 + b"1\n", count=1) * 9,
        "into a window",
    ),
    ("accept from a client", HELLO_CLIENT + opening() + frame(ACCEPT, 1), "kind 3 there"),
    ("refuse from a client", HELLO_CLIENT + opening() + frame(REFUSE, 1, b"{}"), "kind 4 there"),
    ("stop on stream 0", HELLO_CLIENT + frame(STOP), "kind 8 there"),
    ("kill on stream 0", HELLO_CLIENT + frame(KILL), "kind 9 there"),
    ("ping on a stream", HELLO_CLIENT + frame(PING, 1, b"12345678"), "kind 10 there"),
    ("short ping", HELLO_CLIENT + frame(PING, 0, b"1234"), "PING has 4 bytes"),
    ("long ping", HELLO_CLIENT + frame(PING, 0, bytes(MAX_PAYLOAD)), "PING has 65536 bytes"),
]

# What no client takes, after HELLO and the OPEN of stream 1.
TO_CLIENT: list[tuple[str, bytes, str]] = [
    ("random bytes", Random(8).randbytes(4096), ""),
    ("two hellos", HELLO_WORKER, "HELLO came twice"),
    ("unknown critical kind", frame(77, 1, flags=CRITICAL), "unknown kind 77"),
    *[(f"kind {kind} oversized", pack_header(MAX_PAYLOAD + 1, kind, 0, 0, 1), "announces 65537") for kind in range(1, 14)],
    ("open from a worker", opening(), "kind 2 there"),
    ("stop from a worker", frame(STOP, 1), "kind 8 there"),
    ("kill from a worker", frame(KILL, 1), "kind 9 there"),
    ("items on stream 0", frame(ITEMS, 0, b"1\n", count=1), "kind 5 there"),
    ("items not json", frame(ITEMS, 1, b"{\n", count=1), "is not JSON"),
    ("items not utf-8", frame(ITEMS, 1, b'"\xff"\n', count=1), "is not JSON"),
    ("items nested too deep", frame(ITEMS, 1, b"[" * MAX_PAYLOAD, count=1), "is not JSON"),
    ("fewer items than counted", frame(ITEMS, 1, b"1\n", count=2), "announces 2 items and holds 1"),
    ("more items than counted", frame(ITEMS, 1, b"1\n2\n", count=1), "announces 1 items and holds 2"),
    ("fragment that is not full", frame(ITEMS, 1, b"1", flags=MORE), "fragment of an item"),
    ("fragment that counts", frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE, count=1), "fragment of an item"),
    ("fragment that is the last", frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE | LAST), "fragment of an item"),
    ("end in mid-item", frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE) + frame(END, 1), "in the middle of an item"),
    ("item above the limit", frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE) * 30, "item is larger"),
    ("more than the window", frame(ITEMS, 1, b" " * 65_000 + b"1\n", count=1) * 20, "into a window"),
    ("item without credit", (frame(ITEMS, 1, b" " * MAX_PAYLOAD, flags=MORE) + frame(ITEMS, 1, b"1\n", count=1)) * 9, "credit"),
    ("short ping", frame(PING, 0, b"1"), "PING has 1 bytes"),
    ("open for inputs from a worker", conversing(), "kind 2 there"),
    ("pong on a stream", frame(PONG, 1, b"12345678"), "kind 11 there"),
]

AT_ONCE = 200_000
"""bytes of a case whose broken frame is its last; of a longer one the rest is unread, and the reset it causes may overtake the reason"""

CONFIG = NativeConfig(max_item=1_000_000, max_request=1_000_000, unix=False, pulse=False)


async def counting(request: Any, context: Context) -> AsyncIterator[Any]:
    """Quietly alive for strangers, talkative for the neighbour."""
    if request == "neighbour":
        async for item in endless(request, context):
            yield item
    await asyncio.Event().wait()


async def silent(inputs: Any, context: Context) -> AsyncIterator[Any]:
    """Takes no input."""
    await asyncio.Event().wait()
    yield


@asynccontextmanager
async def undisturbed(caller: Caller) -> AsyncGenerator[Inbox, None]:
    """A neighbour's stream, which goes on through whatever is done in the block, and nothing is left of others afterwards."""
    neighbour = await caller.open("neighbour", id="neighbour")
    assert await neighbour.more()
    yield neighbour
    await eventually(lambda: caller.serving.inflight == 1, what="only the neighbour is left")
    got = len(neighbour.items)
    await eventually(lambda: len(neighbour.items) > got, what="the neighbour goes on")
    assert list(neighbour.items) == list(range(len(neighbour.items)))
    neighbour.kill()
    await eventually(lambda: caller.pair.open_streams() == 0, what="no stream left")


@pytest.mark.parametrize(("broken", "reason"), [case[1:] for case in TO_WORKER], ids=[case[0] for case in TO_WORKER])
async def test_a_broken_client_is_told_and_cut(broken: bytes, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    async with native_caller(counting, config=CONFIG) as caller, undisturbed(caller):
        talker = Talker(caller.pair, caller.wheel, silent, "converse")
        async with await RawPeer.connect(caller.record.stator.address) as peer:  # type: ignore[union-attr]
            with suppress(ConnectionError):  # it may be cut before it has said everything
                await peer.say(broken)
            said = await peer.until_closed()
        if len(broken) < AT_ONCE:
            goaway = read_goaway(next(each for each in said if each.kind == GOAWAY).payload)
            assert goaway.code == "protocol" and reason in goaway.reason
        await eventually(lambda: talker.serving.inflight == 0, what="no conversation left")
        warning = next(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
        assert "native connection with" in warning and reason in warning


@pytest.mark.parametrize(("broken", "reason"), [case[1:] for case in TO_CLIENT], ids=[case[0] for case in TO_CLIENT])
async def test_a_broken_worker_is_told_and_cut(broken: bytes, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    async with native_caller(counting, config=CONFIG) as caller, undisturbed(caller), raw_listener() as listener:
        record = native_record(listener.address, process="b" * 32)

        async def be_broken() -> list[Any]:
            async with await listener.accepted() as peer:
                await peer.greet("worker", process="b" * 32)
                await peer.until(OPEN)
                with suppress(ConnectionError):
                    await peer.say(broken)
                return await peer.until_closed()

        peer = asyncio.create_task(be_broken())
        inbox = await caller.open(record=record)
        with pytest.raises(Disconnected):
            await drain(inbox)
        said = await peer
        if len(broken) < AT_ONCE:
            goaway = read_goaway(next(each for each in said if each.kind == GOAWAY).payload)
            assert goaway.code == "protocol" and reason in goaway.reason
        assert reason in "".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "hello",
    [
        Hello(process=CLIENT_PROCESS, role="client", versions=(2, 9)),
        Hello(process=CLIENT_PROCESS, role="client", codecs=("msgpack",)),
    ],
)
async def test_a_client_without_common_version_or_codec_is_told(hello: Hello) -> None:
    async with native_caller(counting, config=CONFIG) as caller, undisturbed(caller):
        async with await RawPeer.connect(caller.record.stator.address) as peer:  # type: ignore[union-attr]
            await peer.say(frame(HELLO, payload=hello.encode(), flags=CRITICAL))
            said = await peer.until_closed()
        assert read_goaway(said[-1].payload).code == "no_version"


@pytest.mark.parametrize("size", [1, 5, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 10, len(opening()) - 1])
@pytest.mark.parametrize("hard", [False, True])
async def test_a_client_that_ends_in_mid_frame_leaves_nothing(size: int, hard: bool) -> None:
    async with native_caller(counting, config=CONFIG) as caller, undisturbed(caller):
        async with await RawPeer.connect(caller.record.stator.address) as peer:  # type: ignore[union-attr]
            await peer.greet()
            await peer.say(opening(1), frame(OPEN, 3, bytes(MAX_PAYLOAD), flags=MORE), opening(5)[:size])
            await eventually(lambda: len(caller.contexts) == 2, what="the whole request was taken")
            if hard:
                peer.writer.transport.abort()
        await eventually(lambda: caller.contexts[1].is_killed, what="its handler was told")


# -- by dice


class Dice:
    """Frames of a session's peer, most of them broken in some way."""

    def __init__(self, random: Random, kinds: list[Callable[[], bytes]]) -> None:
        self.random = random
        self.kinds = kinds

    def roll(self) -> bytes:
        random = self.random
        data = bytearray(random.choice(self.kinds)())
        how = random.randrange(10)
        if how == 0:  # some bit, header included
            for _ in range(random.randrange(1, 4)):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        elif how == 1:  # some bit of the payload
            if len(data) > HEADER_SIZE:
                data[random.randrange(HEADER_SIZE, len(data))] = random.randrange(256)
        elif how == 2:  # kind
            data[4] = random.randrange(256)
        elif how == 3:  # flags
            data[5] = random.choice([0, MORE, LAST, MORE | LAST, CRITICAL, 255])
        elif how == 4:  # count
            data[6:8] = pack(">H", random.choice([0, 1, 2, 65535]))
        elif how == 5:  # stream
            data[8:12] = pack(">I", random.choice([0, 1, 2, 3, 5, 9, 2**32 - 1]))
        elif how == 6:  # payload of another length, honestly announced
            payload = data[HEADER_SIZE : HEADER_SIZE + random.randrange(len(data) - HEADER_SIZE + 1)]
            data[HEADER_SIZE:] = payload
            data[0:4] = pack(">I", len(payload))
        elif how == 7:  # length that lies
            data[0:4] = pack(">I", random.choice([0, 1, len(data), 65536, 65537, 2**31]))
        elif how == 8:  # truncated: what follows is read as its rest
            del data[random.randrange(1, len(data) + 1) :]
        return bytes(data)


def error_payload(random: Random) -> bytes:
    return random.choice([b"", b'{"code":"engine","message":"m","kind":"Unknown"}', b'{"code":"x"}', b"{", b"null"])


def client_dice(random: Random) -> Dice:
    """What a client sends."""
    number = lambda: random.choice([1, 3, 5, 7, 9, 11])  # noqa: E731
    return Dice(
        random,
        [
            lambda: opening(number(), payload=random.choice([b"1", b'{"a":[1,2]}', b"{"])),
            lambda: opening(number(), payload=b'"' + b"x" * random.randrange(3000) + b'"'),
            lambda: frame(OPEN, number(), body(payload=b" " * MAX_PAYLOAD)[:MAX_PAYLOAD], flags=MORE),
            lambda: frame(OPEN, number(), b"1"),
            lambda: frame(CREDIT, number(), pack(">I", random.choice([0, 1, 65536, 2**32 - 1]))),
            lambda: conversing(number()),
            lambda: frame(ITEMS, number(), b'1\n{"a":[1,2]}\n', count=2),
            lambda: frame(ITEMS, number(), b"1\n", count=1, flags=random.choice([0, 0, 0, LAST])),
            lambda: frame(ITEMS, number(), b'"' + b"x" * random.randrange(3000) + b'"\n', count=1),
            lambda: frame(ITEMS, number(), b" " * MAX_PAYLOAD, flags=MORE),
            lambda: frame(END, number(), error_payload(random)),
            lambda: frame(STOP, number()),
            lambda: frame(KILL, number()),
            lambda: frame(PING, 0, b"12345678"),
            lambda: frame(PONG, 0, b"12345678"),
            lambda: frame(GOAWAY, payload=Goaway(code="unavailable").encode()),
        ],
    )


def worker_dice(random: Random) -> Dice:
    """What a worker sends."""
    number = lambda: random.choice([1, 3, 5, 7, 9, 11])  # noqa: E731
    return Dice(
        random,
        [
            lambda: frame(ACCEPT, number()),
            lambda: frame(REFUSE, number(), error_payload(random)),
            lambda: frame(END, number(), error_payload(random)),
            lambda: frame(ITEMS, number(), b'1\n{"a":[1,2]}\n', count=2),
            lambda: frame(
                ITEMS, number(), b'"' + b"x" * random.randrange(3000) + b'"\n', count=1, flags=random.choice([0, LAST])
            ),
            lambda: frame(ITEMS, number(), b" " * MAX_PAYLOAD, flags=MORE),
            lambda: frame(ITEMS, number(), b"1\n", count=1),
            lambda: frame(CREDIT, number(), pack(">I", random.choice([0, 1, 65536, 2**31, 2**32 - 1]))),
            lambda: frame(PING, 0, b"12345678"),
            lambda: frame(PONG, 0, b"12345678"),
            lambda: frame(GOAWAY, payload=Goaway(code=random.choice(["unavailable", "protocol"])).encode()),
        ],
    )


def feed(pair: NativePair, data: bytes, random: Random, *, to_client: bool) -> None:
    """Give one side `data` in two chunks."""
    session = pair.client if to_client else pair.server
    cut = random.randrange(len(data) + 1)
    session.receive_data(data[:cut], 0.0)
    session.receive_data(data[cut:], 0.0)


def live(pair: NativePair, random: Random) -> None:
    """What handlers and readers do meanwhile."""
    for call in pair.calls:
        if not call.stream.dead:
            if call.stream.credit > 0:
                call.stream.push(b"1")
            inputs = call.stream.inputs
            if inputs is not None and random.random() < 0.5:
                if not inputs._window:
                    call.stream.accept()
                call.request.body.items.clear()
                inputs.taken()
            if random.random() < 0.1:
                call.stream.end()
    pair.calls[:] = [call for call in pair.calls if not call.stream.dead]
    for link in list(pair.client.streams.values()):
        link.receiver.items.clear()
        link.taken()
        if link.sender is not None and not link.sender.over and link.sender.credit > 0:
            link.sender.put("x" * random.randrange(3000))
            if random.random() < 0.05:
                link.sender.end()
        if random.random() < 0.05:
            link.kill()
    while len(pair.client.streams) < 4 and len(pair.client.streams) + len(pair.client.killed) < 6:
        pair.converse() if random.random() < 0.4 else pair.open(1)
    assert len(pair.client.outgoing.data_to_send()) < 1_000_000
    assert len(pair.server.outgoing.data_to_send()) < 2_000_000


def check_bounds(pair: NativePair) -> None:
    assert pair.server.open_streams <= 2 * 6 and pair.client.open_streams <= 6
    assert pair.server_budget.out <= 6 * (1_000_000 + 3 * MAX_PAYLOAD + pair.server.budget._most)
    assert pair.client_budget.out <= 6 * 16384
    for session in (pair.client, pair.server):
        assert session._reader.buffered < HEADER_SIZE + MAX_PAYLOAD
    readers = [stream.inputs for stream in pair.server.streams.values() if stream.inputs is not None]
    for link in (*pair.client.streams.values(), *readers):
        assert len(link._begun or b"") <= 1_000_000 + MAX_PAYLOAD


def a_pair() -> NativePair:
    limits = Limits(item=1_000_000, request=1_000_000, streams=6)
    pair = NativePair(window=16384, client_limits=limits, server_limits=limits, record=False)
    for _ in range(4):
        pair.open(1)
    pair.client.outgoing.data_to_send()
    return pair


def end(pair: NativePair) -> None:
    """Nothing is left of a session that was closed."""
    pair.client.close("broken")
    pair.server.close()
    assert pair.client.open_streams == pair.server.open_streams == 0
    assert pair.client_budget.out == pair.server_budget.out == 0
    assert all(call.stream.dead for call in pair.calls)


@pytest.mark.parametrize("to_client", [False, True], ids=["worker", "client"])
def test_fifty_thousand_mutated_frames(to_client: bool) -> None:
    """Times two sides. Only `PeerProtocolError` and `ConnectFailed` come out, and what is held stays within its limits."""
    random = Random(20_25)
    dice = worker_dice(random) if to_client else client_dice(random)
    pair = a_pair()
    refused = 0
    early = 0
    tracemalloc.start()
    try:
        for number in range(50_000):
            try:
                feed(pair, dice.roll(), random, to_client=to_client)
            except (PeerProtocolError, ConnectFailed) as error:
                assert error.message
                refused += 1
                end(pair)
                pair = a_pair()
                continue
            live(pair, random)
            check_bounds(pair)
            if number == 10_000:
                early = tracemalloc.get_traced_memory()[0]
        late = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    end(pair)
    assert 5_000 < refused < 45_000, refused
    assert late - early < 8_000_000, (early, late)
