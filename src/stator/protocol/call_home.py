"""What is said on a call-home connection besides items (`spec/10 §3.1, §3.2, §4.1`).

Worker: handshake, prologue, …, sentinel. Client: "stop" or "kill" at any time. All are TwoPart frames with a JSON header and
without data.
"""

from enum import Enum
from typing import Any

import msgspec

from stator.errors import ConnectFailed, PeerProtocolError, StatorError
from stator.protocol.partial import Data
from stator.protocol.stream import Phase
from stator.protocol.two_part import PREFIX_SIZE, TwoPartParser, encode_frame
from stator.protocol.values import DECODE_ERRORS
from stator.protocol.wire_errors import WireError, from_wire, to_wire

__all__ = [
    "KILL",
    "PROLOGUE",
    "SENTINEL",
    "SENTINEL_HEADER",
    "STOP",
    "Control",
    "ControlReader",
    "Handshake",
    "HandshakeReader",
    "encode_handshake",
    "encode_refusal",
    "read_prologue",
]

MAX_GREETING_SIZE = 65_536
"""Limit of a handshake and of a control frame, in bytes. The reference's have less than 200."""

SENTINEL_HEADER = b'"sentinel"'
SENTINEL = encode_frame(SENTINEL_HEADER)
PROLOGUE = encode_frame(b'{"error":null}')
"""The prologue of a request whose handler was called."""
STOP = encode_frame(b'"stop"')
KILL = encode_frame(b'"kill"')


class Handshake(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame: which request this connection answers. `stream_type` is `response` or `request`."""

    subject: str
    stream_type: str


class Prologue(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The second frame. `typed_error` is 1.6.1's; readers of 1.3.1 ignore it and know the text alone."""

    error: str | None = None
    typed_error: Any = None


class Control(Enum):
    """What the client wants of a running stream."""

    STOP = "stop"
    KILL = "kill"


_encode = msgspec.json.Encoder().encode
_decode_handshake = msgspec.json.Decoder(Handshake).decode
_decode_prologue = msgspec.json.Decoder(Prologue).decode
_decode_text = msgspec.json.Decoder(str).decode


def encode_handshake(subject: str, stream_type: str = "response") -> bytes:
    """The handshake frame."""
    return encode_frame(_encode(Handshake(subject=subject, stream_type=stream_type)))


def encode_refusal(error: StatorError) -> bytes:
    """The prologue frame of a request that no handler took."""
    wire: WireError = to_wire(error)
    return encode_frame(_encode(Prologue(error=f"Generate Error: {error.message}", typed_error=wire)))


def read_prologue(header: bytes, data: Data, *, instance: int = 0) -> StatorError | None:
    """The worker's refusal, or None when it said yes. `PeerProtocolError` when the frame is no prologue."""
    try:
        if not header or data:
            raise ValueError("expected a frame with a header alone")
        prologue = _decode_prologue(header)
    except DECODE_ERRORS as error:
        raise PeerProtocolError(f"malformed prologue: {error}") from error
    if prologue.error is None:
        return None
    if prologue.typed_error is not None:
        refusal = from_wire(prologue.typed_error, phase=Phase.PROLOGUE, instance=instance)
        refusal.phase = refusal.phase or Phase.PROLOGUE.label
        return refusal
    return ConnectFailed(
        f"the worker failed before the response stream: {prologue.error}", instance=instance, phase=Phase.PROLOGUE.label
    )


class HandshakeReader:
    """The client's listener on a new connection: nothing but the first frame is looked at."""

    __slots__ = ("_frames", "_received")

    def __init__(self) -> None:
        self._frames = TwoPartParser(limit=MAX_GREETING_SIZE)
        self._received = 0

    def receive_data(self, data: bytes) -> tuple[Handshake, bytes] | None:
        """The handshake and the bytes behind it, or None while it is not complete. Raises `PeerProtocolError`."""
        self._received += len(data)
        for header, payload in self._frames.receive_data(data):
            behind = self._received - PREFIX_SIZE - len(header) - len(payload)
            return _read_handshake(header, payload), data[len(data) - behind :]
        return None


def _read_handshake(header: bytes, data: Data) -> Handshake:
    try:
        if data:
            raise ValueError("expected a frame with a header alone")
        handshake = _decode_handshake(header)
    except DECODE_ERRORS as error:
        raise PeerProtocolError(f"malformed handshake: {error}") from error
    if handshake.stream_type not in ("response", "request"):
        raise PeerProtocolError(f"malformed handshake: stream type {handshake.stream_type!r} is neither response nor request")
    return handshake


class ControlReader:
    """The worker's ear on a response connection. Never raises: whatever is not "stop" counts as "kill" (`spec/10 §4.2`)."""

    __slots__ = ("_frames", "_killed")

    def __init__(self) -> None:
        self._frames = TwoPartParser(limit=MAX_GREETING_SIZE)
        self._killed = False

    def receive_data(self, data: bytes) -> list[Control]:
        """The wishes that `data` completed, in order; nothing comes after a kill."""
        wishes: list[Control] = []
        if self._killed:
            return wishes
        try:
            for header, payload in self._frames.receive_data(data):
                if payload or not _is_stop(header):
                    self._killed = True
                    break
                wishes.append(Control.STOP)
        except PeerProtocolError:
            self._killed = True
        if self._killed:
            wishes.append(Control.KILL)
        return wishes


def _is_stop(header: bytes) -> bool:
    try:
        return _decode_text(header) == "stop"
    except DECODE_ERRORS:
        return False
