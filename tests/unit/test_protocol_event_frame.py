"""Event frames: the reference's to the byte, and what is said of those that are none."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stator.errors import PeerProtocolError
from stator.protocol.event_frame import (
    HEADER_SIZE,
    OVERHEAD,
    Event,
    decode_envelope,
    decode_frames,
    encode_envelope,
    encode_frames,
)

pytestmark = pytest.mark.timeout(10)

MESSAGES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("recorded_event_frames.json").read_text("utf-8"))[
    "messages"
]
EVENT = Event(publisher_id=2**64 - 1, sequence=7, published_at=1_795_232_664_280, topic="kv_metrics", payload=b"\x81\xa1a\x01")
U64 = bytes(7) + b"\x07"


def recorded_event(message: dict[str, Any]) -> Event:
    envelope = message["envelope"]
    return Event(
        publisher_id=int(envelope["publisher_id"]),
        sequence=int(envelope["sequence"]),
        published_at=int(envelope["published_at"]),
        topic=envelope["topic"],
        payload=bytes.fromhex(message["payload_hex"]),
    )


@pytest.mark.parametrize("message", MESSAGES, ids=[f"{m['envelope']['topic']}-{m['envelope']['sequence']}" for m in MESSAGES])
def test_the_references_messages_to_the_byte(message: dict[str, Any]) -> None:
    frames = [bytes.fromhex(frame) for frame in message["zmq_frames_hex"]]
    event = recorded_event(message)
    assert decode_frames(frames) == event
    assert decode_envelope(frames[3][HEADER_SIZE:]) == event
    assert list(encode_frames(event, event.topic.encode())) == frames
    assert encode_envelope(event) == frames[3][HEADER_SIZE:]


def frames() -> list[bytes]:
    return list(encode_frames(EVENT, b"kv_metrics"))


def changed(**fields: Any) -> bytes:
    """The envelope with other fields; None leaves one out."""
    envelope = msgspec.msgpack.decode(encode_envelope(EVENT)) | fields
    return msgspec.msgpack.encode({key: value for key, value in envelope.items() if value is not None})


def in_frames(envelope: bytes) -> list[bytes]:
    return [*frames()[:3], b"\x01" + len(envelope).to_bytes(4, "big") + envelope]


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ([], "0 frames, expected 4"),
        (frames()[:3], "3 frames, expected 4"),
        ([*frames(), b""], "5 frames, expected 4"),
        ([b"kv_metrics", b"short", *frames()[2:]], "publisher id has 5 bytes, expected 8"),
        ([*frames()[:2], b"", frames()[3]], "sequence has 0 bytes, expected 8"),
        ([*frames()[:3], b"\x01\0\0"], "3 bytes, its header alone takes 5"),
        ([*frames()[:3], b"\x02" + frames()[3][1:]], "version 2, expected 1"),
        ([*frames()[:3], frames()[3][:-1]], "envelope is short"),
        ([b"kv_metrics", U64, *frames()[2:]], "different publishers or sequence"),
        ([*frames()[:2], bytes(8), frames()[3]], "different publishers or sequence"),
        ([b"other", *frames()[1:]], "different topics"),
        ([b"\xff\xfe", *frames()[1:]], "different topics"),
        (in_frames(b""), "cannot be read"),
        (in_frames(b"\xc1"), "cannot be read"),
        (in_frames(b"\x91" * 100_000), "cannot be read"),
        (in_frames(b"\x81\xa1x" * 100_000), "cannot be read"),
        (in_frames(changed(publisher_id=-1)), "publisher_id"),
        (in_frames(changed(sequence="7")), "sequence"),
        (in_frames(changed(published_at=None)), "published_at"),
        (in_frames(changed(payload="text")), "payload"),
        (in_frames(changed(topic=b"kv_metrics")), "topic"),
    ],
)
def test_what_is_wrong_is_named(broken: list[bytes], text: str) -> None:
    with pytest.raises(PeerProtocolError, match=text):
        decode_frames(broken)


def test_unknown_keys_wide_numbers_and_what_follows_the_envelope_are_tolerated() -> None:
    more = changed(codec="msgpack", extra={"deep": [1, 2]})
    assert decode_frames(in_frames(more)) == EVENT
    wide = encode_envelope(EVENT).replace(b"\xa8sequence\x07", b"\xa8sequence\xcf" + U64)
    assert decode_frames(in_frames(wide)) == EVENT
    assert decode_frames([*frames()[:3], frames()[3] + b"trailer"]) == EVENT


def test_an_envelope_above_the_limit_is_not_read() -> None:
    size = len(encode_envelope(EVENT))
    assert decode_envelope(encode_envelope(EVENT), limit=size) == EVENT
    assert decode_frames(frames(), limit=size) == EVENT
    for read, data in ((decode_envelope, encode_envelope(EVENT)), (decode_frames, frames())):
        with pytest.raises(PeerProtocolError, match=f"{size} bytes, more than the {size - 1}"):
            read(data, limit=size - 1)  # type: ignore[operator, arg-type] - each with its own data


def test_the_overhead_is_no_less_than_it_can_be() -> None:
    largest = Event(
        publisher_id=2**64 - 1, sequence=2**64 - 1, published_at=2**64 - 1, topic="t" * 70_000, payload=b"p" * 70_000
    )
    assert len(encode_envelope(largest)) - 140_000 <= OVERHEAD
