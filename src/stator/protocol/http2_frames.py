"""HTTP/2 frames, looked at before the library reads them (RFC 9113 §4, §6).

The library ends a connection at GOAWAY, also at the graceful one that proxies and draining workers send while streams go on. So GOAWAY
is taken out of the bytes and written here. On the same walk lengths are checked before anything is buffered, header blocks are
bounded, and the frames that cost a sender nothing are counted.
"""

from struct import Struct

import msgspec

from stator.errors import PeerProtocolError

__all__ = ["PREFACE", "ErrorCode", "FrameScanner", "FrameViolation", "Goaway", "encode_goaway"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""what a client's connection begins with"""

_HEADER = 9
_START = Struct(">IB")
"""u24 length and u8 type in one word, then the flags; the u32 stream id follows"""
_GOAWAY_FIXED = Struct(">II")

_DATA, _HEADERS, _PUSH_PROMISE, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 5, 7, 8, 9
_END_HEADERS = 4
_END_STREAM = 1
_MOST_OF_GOAWAY = 4096
_LARGEST_ID = 2**31 - 1


class ErrorCode:
    """The error codes used here (RFC 9113 §7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    ENHANCE_YOUR_CALM = 11


class FrameViolation(PeerProtocolError):
    """The other side broke HTTP/2, or a limit of ours; `wire_code` is what its GOAWAY says."""

    def __init__(self, message: str, *, wire_code: int = ErrorCode.PROTOCOL_ERROR) -> None:
        super().__init__(message)
        self.wire_code = wire_code


class Goaway(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing new on this connection: the last stream that was or will be looked at, and why."""

    last: int = _LARGEST_ID
    code: int = ErrorCode.NO_ERROR
    reason: str = ""


def encode_goaway(goaway: Goaway) -> bytes:
    """The whole frame; the reason is cut at 500 characters."""
    body = _GOAWAY_FIXED.pack(goaway.last, goaway.code) + goaway.reason[:500].encode(errors="replace")
    return _START.pack(len(body) << 8 | _GOAWAY, 0) + bytes(4) + body


def _read_goaway(body: bytes) -> Goaway:
    if len(body) < _GOAWAY_FIXED.size:
        raise FrameViolation(f"GOAWAY of {len(body)} bytes", wire_code=ErrorCode.FRAME_SIZE_ERROR)
    last, code = _GOAWAY_FIXED.unpack_from(body)
    return Goaway(last=last & _LARGEST_ID, code=code, reason=body[_GOAWAY_FIXED.size :].decode(errors="replace"))


class FrameScanner:
    """Walks from frame to frame. `idle_frames` counts those that carry nothing: resets, pings, settings, priorities, empty data."""

    __slots__ = ("_block", "_goaway", "_held", "_left", "_max_block", "_max_frame", "_passing", "idle_frames")

    def __init__(self, *, max_frame: int, max_block: int, preface: bool) -> None:
        """`max_frame`: bytes of a frame's payload; `max_block`: of a header block, compressed; `preface`: the client's is still to come."""
        self._max_frame = max_frame
        self._max_block = max_block
        self._passing = len(PREFACE) if preface else 0
        """bytes that belong to the library and are not looked at"""
        self._held = b""
        """the beginning of a frame header"""
        self._goaway: bytearray | None = None
        self._left = 0
        """bytes that the GOAWAY being read still lacks"""
        self._block = 0
        """bytes of the header block being received"""
        self.idle_frames = 0

    def receive_data(self, data: bytes) -> list[bytes | Goaway]:
        """Bytes for the library, and each GOAWAY between them. Raises `FrameViolation`; nothing of `data` counts then."""
        if self._held:
            data = self._held + data
            self._held = b""
        out: list[bytes | Goaway] = []
        start = offset = 0
        end = len(data)
        while True:
            if self._goaway is not None:
                step = min(self._left, end - offset)
                self._goaway += data[offset : offset + step]
                self._left -= step
                start = offset = offset + step
                if self._left:
                    break
                out.append(_read_goaway(bytes(self._goaway)))
                self._goaway = None
            step = min(self._passing, end - offset)
            offset += step
            self._passing -= step
            if end - offset < _HEADER:
                if not self._passing:
                    self._held = data[offset:]
                break
            word, flags = _START.unpack_from(data, offset)
            length, kind = word >> 8, word & 0xFF
            self._check(length, kind, flags)
            if kind == _GOAWAY:
                if offset > start:
                    out.append(data[start:offset])
                offset += _HEADER
                start = offset
                self._goaway, self._left = bytearray(), length
            else:
                self._passing = _HEADER + length
        if offset > start:
            out.append(data if offset - start == end else data[start:offset])
        return out

    def _check(self, length: int, kind: int, flags: int) -> None:
        if length > self._max_frame or (kind == _GOAWAY and length > _MOST_OF_GOAWAY):
            raise FrameViolation(
                f"frame of type {kind} and {length} bytes, allowed are {self._max_frame}", wire_code=ErrorCode.FRAME_SIZE_ERROR
            )
        if kind == _DATA:
            if not length and not flags & _END_STREAM:
                self.idle_frames += 1
        elif kind in (_HEADERS, _PUSH_PROMISE, _CONTINUATION):
            self._block += length
            if self._block > self._max_block:
                raise FrameViolation(
                    f"header block of more than {self._max_block} bytes", wire_code=ErrorCode.ENHANCE_YOUR_CALM
                )
            if flags & _END_HEADERS:
                self._block = 0
            elif not length:
                self.idle_frames += 1
        elif kind != _WINDOW_UPDATE:
            self.idle_frames += 1
