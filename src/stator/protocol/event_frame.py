"""Messages of the event plane: the msgpack envelope, and the four ZMQ frames about it (`spec/40 §1.3–1.4`).

    frame 0   topic, UTF-8: the bare topic, not the subject
    frame 1   publisher id, u64 big endian
    frame 2   sequence, u64 big endian
    frame 3   0x01, u32 big endian length of the envelope, the envelope

A NATS message is the bare envelope.
"""

from collections.abc import Sequence
from struct import Struct
from typing import Annotated

import msgspec

from stator.errors import PeerProtocolError

__all__ = [
    "FRAMES",
    "HEADER_SIZE",
    "MAX_ENVELOPE",
    "OVERHEAD",
    "Event",
    "decode_envelope",
    "decode_frames",
    "encode_envelope",
    "encode_frames",
]

FRAMES = 4
"""frames of a ZMQ message"""
HEADER_SIZE = 5
"""bytes before the envelope in the last frame"""
OVERHEAD = 96
"""most bytes that an envelope has besides topic and payload"""
MAX_ENVELOPE = 16 * 2**20
"""bytes of an envelope that are read unless said otherwise"""

_VERSION = 1
_U64 = Struct(">Q")
_HEADER = Struct(">BI")
_pack_id = _U64.pack
_pack_header = _HEADER.pack

Unsigned = Annotated[int, msgspec.Meta(ge=0)]


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One message. Field order is the envelope's."""

    publisher_id: Unsigned
    """random, 64 bits"""
    sequence: Unsigned
    """0, 1, 2 … per publisher"""
    published_at: Unsigned
    """ms since the epoch, by the publisher's clock"""
    topic: str
    payload: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Event).decode


def encode_envelope(event: Event) -> bytes:
    """The envelope as the reference writes it: a map in this order, integers in their shortest form."""
    return _encode(event)


def decode_envelope(data: bytes | memoryview, *, limit: int = MAX_ENVELOPE) -> Event:
    """Read an envelope of at most `limit` bytes; keys that are not known are ignored. `PeerProtocolError` says what does not fit."""
    if len(data) > limit:
        raise PeerProtocolError(f"event envelope of {len(data)} bytes, more than the {limit} that are taken")
    try:
        return _decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerProtocolError(f"event envelope cannot be read: {error}") from error


def encode_frames(event: Event, topic: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """The four frames. `topic` is the event's in UTF-8, which a publisher has ready."""
    envelope = _encode(event)
    return (
        topic,
        _pack_id(event.publisher_id),
        _pack_id(event.sequence),
        _pack_header(_VERSION, len(envelope)) + envelope,
    )


def decode_frames(frames: Sequence[bytes], *, limit: int = MAX_ENVELOPE) -> Event:
    """Read a message whose envelope has at most `limit` bytes. What follows the envelope is ignored.

    `PeerProtocolError` says what is wrong: the number of frames, the size of one, the version, the envelope, or that the frames before
    the envelope say something else than it does.
    """
    if len(frames) != FRAMES:
        raise PeerProtocolError(f"event message of {len(frames)} frames, expected {FRAMES}")
    topic, publisher, sequence, body = frames
    for name, frame in (("publisher id", publisher), ("sequence", sequence)):
        if len(frame) != _U64.size:
            raise PeerProtocolError(f"event frame with the {name} has {len(frame)} bytes, expected {_U64.size}")
    if len(body) < HEADER_SIZE:
        raise PeerProtocolError(f"last event frame has {len(body)} bytes, its header alone takes {HEADER_SIZE}")
    version, size = _HEADER.unpack_from(body)
    if version != _VERSION:
        raise PeerProtocolError(f"event frame of version {version}, expected {_VERSION}")
    if size > len(body) - HEADER_SIZE:
        raise PeerProtocolError(f"event envelope is short: {len(body) - HEADER_SIZE} bytes of {size}")
    event = decode_envelope(memoryview(body)[HEADER_SIZE : HEADER_SIZE + size], limit=limit)
    if _U64.unpack(publisher)[0] != event.publisher_id or _U64.unpack(sequence)[0] != event.sequence:
        raise PeerProtocolError("event frames and envelope name different publishers or sequence numbers")
    if topic != event.topic.encode():
        raise PeerProtocolError(f"event frames and envelope name different topics: {topic[:100]!r} and {event.topic[:100]!r}")
    return event
