"""Request frames of the compatible TCP plane and their acknowledgements (`spec/10 §1.2, §1.3, §1.5`).

Request: u16 path length, path, u16 headers length, headers (JSON object of strings), u32 payload length, payload (TwoPart).
Acknowledgement: u32 length, text; empty means accepted. One per request, in request order.
"""

from collections.abc import Iterator, Mapping
from struct import Struct

import msgspec

from stator.errors import ConnectFailed, Overloaded, PeerProtocolError, StatorError, Unavailable, UsageError
from stator.protocol.partial import LARGE, Data, Partial
from stator.protocol.values import DECODE_ERRORS

__all__ = [
    "ACCEPTED",
    "INVALID_PATH",
    "MAX_MESSAGE_SIZE",
    "OVERLOADED",
    "SHUTTING_DOWN",
    "AcknowledgementParser",
    "RequestFrame",
    "RequestFrameParser",
    "acknowledgement_error",
    "encode_acknowledgement",
    "encode_request_frame",
    "overloaded",
    "too_large",
    "unavailable",
    "unknown_endpoint",
]

MAX_MESSAGE_SIZE = 33_554_432
"""Default limit of a whole request frame, in bytes (`DYN_TCP_MAX_MESSAGE_SIZE`)."""

MAX_ACKNOWLEDGEMENT_SIZE = 65_536
"""Limit of an acknowledgement text, in bytes. The reference's texts have less than 200."""

ACCEPTED = b""
OVERLOADED = b"Server overloaded: worker at capacity"
SHUTTING_DOWN = b"Server unavailable: worker is shutting down"
INVALID_PATH = b"Invalid endpoint path"

_LENGTH_16 = Struct(">H")
_LENGTH_32 = Struct(">I")
_FIXED_SIZE = 2 * _LENGTH_16.size + _LENGTH_32.size

_encode_json = msgspec.json.Encoder().encode
_decode_headers = msgspec.json.Decoder(dict[str, str]).decode


class RequestFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One request as it left the wire. `path` is None when its bytes are not UTF-8; the answer to that is `INVALID_PATH`."""

    path: str | None
    headers: dict[str, str]
    payload: Data


def encode_request_frame(path: str, headers: Mapping[str, str], *payload: Data, limit: int = MAX_MESSAGE_SIZE) -> bytes:
    """One request frame; `payload` may come in parts, as `message_parts` gives them.

    Raises `UsageError` when a part or the whole is larger than the wire format or `limit` allows.
    """
    path_bytes = path.encode()
    header_bytes = _encode_json(headers)
    for what, size in (("path", len(path_bytes)), ("headers", len(header_bytes))):
        if size > 0xFFFF:
            raise UsageError(f"request {what} of {size} bytes is larger than the limit of 65535 bytes")
    payload_size = sum(map(len, payload))
    size = _FIXED_SIZE + len(path_bytes) + len(header_bytes) + payload_size
    if size > limit:
        raise UsageError(
            f"request of {size} bytes is larger than the limit of {limit} bytes (DYN_TCP_MAX_MESSAGE_SIZE on both sides)"
        )
    return b"".join(
        (
            _LENGTH_16.pack(len(path_bytes)),
            path_bytes,
            _LENGTH_16.pack(len(header_bytes)),
            header_bytes,
            _LENGTH_32.pack(payload_size),
            *payload,
        )
    )


class RequestFrameParser:
    """The worker's side of a request connection: bytes in, request frames out."""

    __slots__ = ("_failure", "_limit", "_partial")

    def __init__(self, *, limit: int = MAX_MESSAGE_SIZE) -> None:
        """`limit`: most bytes of a whole frame, all six fields."""
        self._limit = limit
        self._partial = Partial()
        self._failure: PeerProtocolError | None = None

    def receive_data(self, data: bytes) -> Iterator[RequestFrame]:
        """Requests completed by `data`, lazily: run the iterator to its end before the next chunk.

        Raises `PeerProtocolError` as soon as the length fields say that a frame is beyond the limit, and again at every
        further call; `too_large` turns it into the acknowledgement that is due before closing.
        """
        if self._failure is not None:
            raise self._failure
        chunk = self._partial.join(data)
        if chunk is None:
            return
        offset = 0
        while True:
            frame, end = self._parse(chunk, offset)
            if frame is None:
                self._partial.keep(chunk, offset, end - offset)
                return
            yield frame
            offset = end

    def _parse(self, chunk: bytes, offset: int) -> tuple[RequestFrame | None, int]:
        """The frame at `offset` and its end; or None and the end of what must be there before it can be parsed further."""
        received = len(chunk)
        path_start = offset + _LENGTH_16.size
        if received < path_start:
            return None, path_start
        path_end = path_start + _LENGTH_16.unpack_from(chunk, offset)[0]
        headers_start = path_end + _LENGTH_16.size
        if received < headers_start:
            return None, headers_start
        headers_end = headers_start + _LENGTH_16.unpack_from(chunk, path_end)[0]
        payload_start = headers_end + _LENGTH_32.size
        if received < payload_start:
            return None, payload_start
        end = payload_start + _LENGTH_32.unpack_from(chunk, headers_end)[0]
        if end - offset > self._limit:
            self._failure = PeerProtocolError(f"message too large: {end - offset} bytes (max: {self._limit} bytes)")
            raise self._failure
        if received < end:
            return None, end
        return (
            RequestFrame(
                path=_read_path(chunk[path_start:path_end]),
                headers=_read_headers(chunk[headers_start:headers_end]),
                payload=chunk[payload_start:end] if end - payload_start < LARGE else memoryview(chunk)[payload_start:end],
            ),
            end,
        )


def _read_path(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _read_headers(data: bytes) -> dict[str, str]:
    """Headers are a help for logs and traces: whatever is not an object of strings counts as none (`spec/10 §1.2`)."""
    try:
        return _decode_headers(data) if data else {}
    except DECODE_ERRORS:
        return {}


# -- acknowledgements -------------------------------------------------------------------------------------------------------


def encode_acknowledgement(text: bytes = ACCEPTED) -> bytes:
    """One acknowledgement on the wire."""
    return _LENGTH_32.pack(len(text)) + text


def unknown_endpoint(path: str) -> bytes:
    """Acknowledgement text: no handler is registered for `path`."""
    return f"Unknown endpoint: {path}".encode()


def overloaded(why: str) -> bytes:
    """Acknowledgement text: there is no capacity for the request."""
    return f"Server overloaded: {why}".encode()


def unavailable(why: str) -> bytes:
    """Acknowledgement text: the handler takes nothing new."""
    return f"Server unavailable: {why}".encode()


def too_large(error: PeerProtocolError) -> bytes:
    """Acknowledgement text for what `RequestFrameParser` raised; the connection closes behind it."""
    return f"Read error: {error.message}".encode()


def acknowledgement_error(text: bytes, *, instance: int = 0) -> StatorError | None:
    """What an acknowledgement means to the client: None when it says accepted.

    The reference's client takes unknown texts for success and waits for ever; here they are errors that let the request go
    elsewhere (`spec/10 §11`, rule 1).
    """
    if not text:
        return None
    reason = text.decode(errors="replace")
    if reason.startswith("Server overloaded:"):
        return Overloaded(reason, instance=instance, phase="accept")
    if reason.startswith(("Server unavailable:", "Unknown endpoint:")):
        return Unavailable(reason, instance=instance, phase="accept")
    return ConnectFailed(f"request was not accepted: {reason}", instance=instance, phase="accept")


class AcknowledgementParser:
    """The client's side of a request connection: bytes in, acknowledgement texts out."""

    __slots__ = ("_limit", "_partial")

    def __init__(self, *, limit: int = MAX_ACKNOWLEDGEMENT_SIZE) -> None:
        self._limit = limit
        self._partial = Partial()

    def receive_data(self, data: bytes) -> Iterator[bytes]:
        """Acknowledgements completed by `data`, lazily; `PeerProtocolError` when one is beyond the limit."""
        chunk = self._partial.join(data)
        if chunk is None:
            return
        offset, received, need = 0, len(chunk), _LENGTH_32.size
        while received - offset >= _LENGTH_32.size:
            (size,) = _LENGTH_32.unpack_from(chunk, offset)
            if size > self._limit:
                raise PeerProtocolError(f"acknowledgement of {size} bytes is larger than the limit of {self._limit} bytes")
            start = offset + _LENGTH_32.size
            if received - start < size:
                need = _LENGTH_32.size + size
                break
            yield chunk[start : start + size]
            offset = start + size
        self._partial.keep(chunk, offset, need)
