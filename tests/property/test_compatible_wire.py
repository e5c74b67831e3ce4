"""The compatible wire under every split of the bytes, under mutation, and there and back."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.errors import PeerProtocolError
from stator.protocol.call_home import ControlReader, HandshakeReader
from stator.protocol.control_message import (
    CallHomeAddress,
    ConnectionInfo,
    ControlMessage,
    decode_control_message,
    encode_control_message,
    read_call_home,
)
from stator.protocol.envelope import Codec
from stator.protocol.request_frame import AcknowledgementParser, RequestFrameParser, encode_request_frame
from stator.protocol.request_stream import RequestReader
from stator.protocol.response_stream import ResponseReader, ResponseWriter
from stator.protocol.stream import Receiver
from stator.protocol.two_part import TwoPartParser, decode_message, encode_frame
from stator.testing.recorded import recorded, recorded_names

LIMIT = 4096

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    """`data` cut at `places` (any numbers; taken modulo its length)."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


def events(receive: Callable[[bytes], Iterator[Any] | list[Any] | None], chunks: list[bytes]) -> list[Any]:
    """Everything that comes out; a `PeerProtocolError` is the last event."""
    seen: list[Any] = []
    try:
        for chunk in chunks:
            seen.extend(receive(chunk) or ())
    except PeerProtocolError as error:
        seen.append(("error", error.message))
    return seen


def read_stream(chunks: list[bytes], codec: Codec) -> list[Any]:
    """What a client makes of the bytes of a call-home connection, to its end."""
    receiver = Receiver()
    reader = ResponseReader(receiver, codec=codec, limit=LIMIT)
    handshake = HandshakeReader()
    seen: list[Any] = []
    greeted = False
    try:
        for chunk in chunks:
            if greeted:
                reader.receive_data(chunk)
            elif (found := handshake.receive_data(chunk)) is not None:
                greeted = True
                reader.connected()
                reader.receive_data(found[1])
            while reader.full:
                seen.extend(receiver.items)
                receiver.items.clear()
                reader.resume()
        reader.receive_eof()
    except PeerProtocolError as error:
        seen.append(("violation", error.message))
    assert receiver.ended or not greeted
    outcome = (receiver.phase, type(receiver.error), str(receiver.error))
    return [*receiver.items, *seen, outcome, reader.data_to_send()]


def read_inputs(chunks: list[bytes], codec: Codec) -> list[Any]:
    """What a worker makes of the bytes of a request stream, to its end."""
    receiver = Receiver()
    reader = RequestReader(receiver, codec=codec, limit=LIMIT)
    wishes: list[Any] = []
    seen: list[Any] = []
    for chunk in chunks:
        wishes.append(reader.receive_data(chunk))
        while reader.full:
            seen.extend(receiver.items)
            receiver.items.clear()
            wishes.append(reader.resume())
    wishes.append(reader.receive_eof())
    assert receiver.ended
    assert reader.closed
    wished = [wish for wish in wishes if wish is not None]
    assert len(wished) <= 1
    return [*seen, *receiver.items, wished, type(receiver.error), str(receiver.error)]


def machines() -> dict[str, Callable[[list[bytes]], list[Any]]]:
    return {
        "frames": lambda chunks: events(TwoPartParser(limit=LIMIT).receive_data, chunks),
        "requests": lambda chunks: events(RequestFrameParser(limit=LIMIT).receive_data, chunks),
        "acknowledgements": lambda chunks: events(AcknowledgementParser(limit=LIMIT).receive_data, chunks),
        "controls": lambda chunks: events(ControlReader().receive_data, chunks),
        "json stream": lambda chunks: read_stream(chunks, "json"),
        "msgpack stream": lambda chunks: read_stream(chunks, "msgpack"),
        "json inputs": lambda chunks: read_inputs(chunks, "json"),
        "msgpack inputs": lambda chunks: read_inputs(chunks, "msgpack"),
    }


def corpus() -> list[bytes]:
    names = [name for name in recorded_names() if name.endswith(".bin")]
    together = [b"".join(recorded(name) for name in recorded_names(prefix)) for prefix in ("0", "2", "3")]
    return [recorded(name) for name in names] + together


@pytest.mark.parametrize("machine", machines())
@given(data=st.sampled_from(corpus()) | st.binary(max_size=200), places=st.lists(st.integers(0, 10_000), max_size=12))
@settings(max_examples=150, deadline=None)
def test_any_split_of_the_bytes_gives_the_same_events(machine: str, data: bytes, places: list[int]) -> None:
    run = machines()[machine]
    assert run(cuts(data, places)) == run([data] if data else [])


def mutated(data: bytes, random: Random) -> bytes:
    """`data` with one to four injuries."""
    raw = bytearray(data)
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(raw) + 1)
        match random.randrange(6):
            case 0 if raw:
                raw[place % len(raw)] ^= 1 << random.randrange(8)
            case 1 if raw:
                raw[place % len(raw)] = random.choice((0, 1, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xC1, 0xFF))
            case 2:
                del raw[place : place + random.randrange(1, 30)]
            case 3:
                raw[place:place] = random.randbytes(random.randrange(1, 30))
            case 4:
                del raw[place:]
            case _:
                other = random.randrange(len(raw) + 1)
                raw[place:place] = raw[other : other + 40]
    return bytes(raw)


@pytest.mark.timeout(100)
def test_a_hundred_thousand_mutated_recordings_are_events_or_protocol_errors() -> None:
    """Only `PeerProtocolError` ever leaves the machines (each turns it into an event), and little is kept."""
    random = Random(20261)
    data, runs = corpus()[:-3], list(machines().values())
    for _ in range(100_000):
        raw = mutated(random.choice(data), random)
        split = cuts(raw, [random.randrange(1000)])
        for run in runs:
            run(split)


def test_what_is_kept_of_an_unfinished_frame_is_what_was_received() -> None:
    parser = TwoPartParser(limit=2**40)
    start = (0).to_bytes(8, "big") + (2**40).to_bytes(8, "big") + bytes(8)
    assert list(parser.receive_data(start)) == []
    for _ in range(1000):
        list(parser.receive_data(b"x"))
    assert parser.unfinished == 1024


@given(data=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_random_bytes_as_messages(data: bytes) -> None:
    for read in (decode_message, decode_control_message, read_call_home):
        try:
            read(data)
        except PeerProtocolError:
            pass


# -- there and back


@given(
    frames=st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=200)), max_size=10),
    places=st.lists(st.integers(0, 3000)),
)
def test_frames_there_and_back(frames: list[tuple[bytes, bytes]], places: list[int]) -> None:
    data = b"".join(encode_frame(header, payload) for header, payload in frames)
    assert events(TwoPartParser(limit=LIMIT).receive_data, cuts(data, places)) == frames


@given(path=st.text(max_size=50), headers=st.dictionaries(st.text(), st.text(), max_size=5), payload=st.binary(max_size=200))
def test_requests_there_and_back(path: str, headers: dict[str, str], payload: bytes) -> None:
    (frame,) = RequestFrameParser().receive_data(encode_request_frame(path, headers, payload))
    assert (frame.path, frame.headers, frame.payload) == (path, headers, payload)


@given(id=st.text(), metadata=st.dictionaries(st.text(), st.text(), max_size=5), host=st.text(min_size=1), subject=st.text())
def test_control_messages_there_and_back(id: str, metadata: dict[str, str], host: str, subject: str) -> None:
    address = CallHomeAddress(address=f"{host}:1", subject=subject, context=id)
    message = ControlMessage(id=id, connection_info=ConnectionInfo.of(address), metadata=metadata, payload_codec="msgpack")
    data = encode_control_message(message)
    assert decode_control_message(data) == message
    assert read_call_home(data) == address


@pytest.mark.parametrize("codec", ["json", "msgpack"])
@given(values=st.lists(VALUES, max_size=10), places=st.lists(st.integers(0, 3000), max_size=8))
@settings(deadline=None)
def test_streams_there_and_back(codec: Codec, values: list[Any], places: list[int]) -> None:
    writer = ResponseWriter(subject="s", codec=codec)
    writer.accept()
    for value in values:
        writer.send(value)
    writer.end()
    receiver = Receiver()
    reader = ResponseReader(receiver, codec=codec)
    found = HandshakeReader().receive_data(b"".join(writer.data_to_send()))
    assert found is not None
    for chunk in cuts(found[1], places):
        reader.receive_data(chunk)
    assert list(receiver.items) == values
    assert receiver.ended
    assert receiver.error is None
