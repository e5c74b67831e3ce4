"""The TwoPart codec: every frame of a call-home connection and every request payload is one (`spec/10 §2.1`).

u64 header length, u64 data length, u64 checksum (0, ignored), header, data; big-endian.
"""

from collections.abc import Iterator
from struct import Struct

from stator.errors import PeerProtocolError
from stator.protocol.partial import LARGE, Data, Partial

__all__ = ["PREFIX_SIZE", "TwoPartParser", "decode_message", "encode_frame", "message_parts"]

_PREFIX = Struct(">QQQ")
_pack = _PREFIX.pack
_unpack_from = _PREFIX.unpack_from

PREFIX_SIZE = _PREFIX.size
"""Bytes before the header: 24."""


def encode_frame(header: bytes = b"", data: bytes = b"") -> bytes:
    """One message; the checksum is 0, as in the reference's release builds."""
    return b"".join(message_parts(header, data))


def message_parts(header: bytes, data: bytes) -> tuple[bytes, bytes, bytes]:
    """One message as the parts to be written one after the other."""
    return _pack(len(header), len(data), 0), header, data


def decode_message(payload: Data) -> tuple[bytes, Data]:
    """Header and data of the message at the start of `payload`, whatever follows it. `PeerProtocolError` when it is short."""
    if len(payload) >= PREFIX_SIZE:
        header_size, data_size, _ = _unpack_from(payload)
        middle = PREFIX_SIZE + header_size
        end = middle + data_size
        if end <= len(payload):
            return bytes(payload[PREFIX_SIZE:middle]), payload[middle:end]
        raise PeerProtocolError(f"TwoPart message is short: {len(payload)} bytes of {end}")
    raise PeerProtocolError(f"TwoPart message is short: {len(payload)} bytes, its prefix alone takes {PREFIX_SIZE}")


class TwoPartParser:
    """Incremental parser of a connection that carries nothing but TwoPart frames."""

    __slots__ = ("_failure", "_limit", "_partial")

    def __init__(self, *, limit: int) -> None:
        """`limit`: most bytes of one frame's header and data together."""
        self._limit = limit
        self._partial = Partial()
        self._failure: PeerProtocolError | None = None

    def receive_data(self, data: bytes) -> Iterator[tuple[bytes, Data]]:
        """Frames completed by `data` as (header, data), lazily: run the iterator to its end before the next chunk.

        Raises `PeerProtocolError` once a length beyond the limit was read (the frames before it were given out), and again at
        every further call.
        """
        if self._failure is not None:
            raise self._failure
        chunk = self._partial.join(data)
        if chunk is None:
            return
        offset, received, limit, need = 0, len(chunk), self._limit, PREFIX_SIZE
        while received - offset >= PREFIX_SIZE:
            header_size, data_size, _ = _unpack_from(chunk, offset)
            if header_size + data_size > limit:
                self._failure = PeerProtocolError(
                    f"frame of {header_size + data_size} bytes is larger than the limit of {limit} bytes"
                )
                raise self._failure
            start = offset + PREFIX_SIZE
            middle = start + header_size
            end = middle + data_size
            if end > received:
                need = end - offset
                break
            yield chunk[start:middle], chunk[middle:end] if data_size < LARGE else memoryview(chunk)[middle:end]
            offset = end
        self._partial.keep(chunk, offset, need)

    @property
    def unfinished(self) -> int:
        """Bytes held of a frame that is not complete."""
        return len(self._partial)
