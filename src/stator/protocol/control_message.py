"""The header of a request: what is asked for and where the answer is to be sent (`spec/10 §2.2`).

Always JSON, whatever the codec of the values. Unknown fields are ignored.
"""

from functools import lru_cache
from typing import Literal

import msgspec

from stator.errors import PeerProtocolError, UsageError
from stator.protocol.envelope import Codec
from stator.protocol.values import DECODE_ERRORS

__all__ = [
    "MAX_CONTROL_MESSAGE_SIZE",
    "TCP_TRANSPORT",
    "CallHomeAddress",
    "ConnectionInfo",
    "ControlMessage",
    "StreamType",
    "decode_control_message",
    "encode_control_message",
    "parse_address",
    "read_call_home",
    "read_inputs_home",
]

MAX_CONTROL_MESSAGE_SIZE = 131_072
"""Most bytes a client sends; ids count twice, metadata once (`spec/10 §1.5`)."""

TCP_TRANSPORT = "tcp_server"

StreamType = Literal["response", "request"]


class CallHomeAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the worker connects to and what it says first. `context` repeats the request's id."""

    address: str
    """`ip:port`; the reference writes IPv6 without brackets"""
    subject: str
    context: str
    stream_type: StreamType = "response"


class ConnectionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A `CallHomeAddress` as the message carries it: JSON text inside of JSON."""

    transport: str
    info: str

    @classmethod
    def of(cls, address: CallHomeAddress) -> "ConnectionInfo":
        return cls(transport=TCP_TRANSPORT, info=_encode(address).decode())


class ControlMessage(msgspec.Struct, frozen=True, kw_only=True):
    """Field order is the reference's. `payload_codec` is absent in releases up to 1.2.1 and means JSON then."""

    id: str
    request_type: str = "single_in"
    response_type: str = "many_out"
    payload_codec: str = "json"
    connection_info: ConnectionInfo
    metadata: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    frontend_send_ts_ns: int | msgspec.UnsetType | None = msgspec.UNSET
    request_stream_connection_info: ConnectionInfo | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def codec(self) -> Codec:
        """Codec of the request and its answers; `PeerProtocolError` for one that is not known."""
        if self.payload_codec == "json" or self.payload_codec == "msgpack":
            return self.payload_codec
        raise PeerProtocolError(f"payload codec {self.payload_codec!r} is not known, only json and msgpack are")

    @property
    def streams_in(self) -> bool:
        """Whether the request's values follow on a connection of their own (`spec/10 §5`)."""
        return self.request_type == "many_in"


class _Destination(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a control message that is needed to report that the rest cannot be read."""

    connection_info: ConnectionInfo


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ControlMessage).decode
_decode_destination = msgspec.json.Decoder(_Destination).decode
_decode_address = msgspec.json.Decoder(CallHomeAddress).decode


def encode_control_message(message: ControlMessage) -> bytes:
    """Compact JSON; `UsageError` beyond `MAX_CONTROL_MESSAGE_SIZE`."""
    data = _encode(message)
    if len(data) > MAX_CONTROL_MESSAGE_SIZE:
        raise UsageError(
            f"request control message too large: {len(data)} bytes exceeds limit {MAX_CONTROL_MESSAGE_SIZE};"
            " shorten the request id or the metadata"
        )
    return data


def decode_control_message(data: bytes) -> ControlMessage:
    """Read a control message; `PeerProtocolError` says what does not fit."""
    try:
        return _decode(data)
    except DECODE_ERRORS as error:
        raise PeerProtocolError(f"control message cannot be read: {error}") from error


def read_call_home(data: bytes) -> CallHomeAddress:
    """Only where to answer, from a control message whose other fields may be unreadable (`spec/10 §11`, rule 3)."""
    try:
        return _read_address(_decode_destination(data).connection_info)
    except DECODE_ERRORS as error:
        raise PeerProtocolError(f"control message does not say where to answer: {error}") from error


def read_inputs_home(message: ControlMessage) -> CallHomeAddress:
    """Where the inputs of a bidirectional request are to be called for (`spec/10 §5`)."""
    info = message.request_stream_connection_info
    if info is msgspec.UNSET or info is None:
        raise PeerProtocolError("a bidirectional request does not say where its inputs are")
    try:
        address = _read_address(info)
    except DECODE_ERRORS as error:
        raise PeerProtocolError(f"a bidirectional request does not say where its inputs are: {error}") from error
    if address.context != message.id or address.stream_type != "request":
        raise PeerProtocolError("the connection info of the inputs belongs to another request")
    return address


def _read_address(info: ConnectionInfo) -> CallHomeAddress:
    if info.transport != TCP_TRANSPORT:
        raise PeerProtocolError(f"response transport {info.transport!r} is not known, only {TCP_TRANSPORT} is")
    return _decode_address(info.info.encode())


@lru_cache(maxsize=4096)
def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`, split at the last colon, brackets around an IPv6 host removed (`spec/10 §2.2`)."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 65_536:
        raise PeerProtocolError(f"{address!r} is not an address of the form host:port")
    return host, int(port)
