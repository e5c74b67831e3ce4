"""Frames of the native plane: 12 bytes of header, at most 64 KiB of payload (`docs/native-plane.md §3`)."""

from collections.abc import Iterator
from struct import Struct

from stator.errors import PeerProtocolError

__all__ = [
    "ACCEPT",
    "CREDIT",
    "CRITICAL",
    "END",
    "GOAWAY",
    "HEADER_SIZE",
    "HELLO",
    "ITEMS",
    "KILL",
    "KINDS",
    "LAST",
    "MAX_PAYLOAD",
    "MORE",
    "OPEN",
    "PING",
    "PONG",
    "PROOF",
    "QUEUED",
    "REFUSE",
    "STOP",
    "FrameReader",
    "frame",
    "pack_header",
]

# Plain integers, not an enum: they are compared for every frame.
HELLO, OPEN, ACCEPT, REFUSE, ITEMS, END, CREDIT, STOP, KILL, PING, PONG, GOAWAY, QUEUED, PROOF = range(1, 15)
KINDS = range(HELLO, PROOF + 1)

MORE = 0x01
"""flag: the message goes on in the next frame of this kind and stream; a frame with it is full (`MAX_PAYLOAD`)"""
LAST = 0x02
"""flag of ITEMS: the stream is complete after this frame; stands for the END that would follow"""
CRITICAL = 0x80
"""flag: close the connection if the kind is not known"""

HEADER_SIZE = 12
MAX_PAYLOAD = 65536

_HEADER = Struct(">IBBHI")

pack_header = _HEADER.pack
"""`(length, kind, flags, count, stream)` → 12 bytes"""


def frame(kind: int, stream: int = 0, payload: bytes = b"", *, flags: int = 0, count: int = 0) -> bytes:
    """One whole frame. The payload must fit (`MAX_PAYLOAD`)."""
    return pack_header(len(payload), kind, flags, count, stream) + payload


class FrameReader:
    """Cuts received bytes into frames, in time linear in the bytes however they arrive; holds at most one incomplete frame."""

    __slots__ = ("_have", "_need", "_parts")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._have = 0
        self._need = HEADER_SIZE

    @property
    def buffered(self) -> int:
        """Bytes of an incomplete frame."""
        return self._have

    def feed(self, data: bytes) -> Iterator[tuple[int, int, int, int, bytes]]:
        """Yield `(kind, flags, count, stream, payload)` for each frame that `data` completes.

        Raises `PeerProtocolError` on a frame that is too long, after the frames before it were yielded. The iterator must be exhausted.
        """
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return
            data = b"".join(self._parts)
            self._parts.clear()
        size = len(data)
        position = 0
        unpack = _HEADER.unpack_from
        need = HEADER_SIZE
        while size - position >= HEADER_SIZE:
            length, kind, flags, count, stream = unpack(data, position)
            if length > MAX_PAYLOAD:
                raise PeerProtocolError(f"frame of kind {kind} announces {length} bytes, allowed are {MAX_PAYLOAD}")
            start = position + HEADER_SIZE
            end = start + length
            if end > size:
                need = HEADER_SIZE + length
                break
            yield kind, flags, count, stream, data[start:end]
            position = end
        self._need = need
        self._have = size - position
        if self._have:
            self._parts.append(data[position:] if position else data)
