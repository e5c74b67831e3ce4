"""Values on the wire: requests and items have one data model on every plane (`design`: *Items*).

The model is JSON as msgspec writes it: NaN and infinities become null, bytes become base64 text, sets become lists, integers
fit in 64 bits (signed or unsigned), keys become text. MessagePack carries the same model, never more.
"""

from typing import Any, cast

import msgspec

from stator.errors import EngineError, PeerProtocolError
from stator.protocol.envelope import Codec

__all__ = ["DECODE_ERRORS", "decode_value", "encode_json", "encode_value", "from_json"]

DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises for bytes that are not what was asked for (bad UTF-8 and numbers of 4300 digits are ValueErrors)."""

_SHORTEST_BIG_INTEGER = 20
"""Characters of the shortest integer that does not fit in 64 bits: 2**64 has 20 digits, -(2**63) - 1 has 20 characters."""

_LARGE = 2**20
_FEW = 64
_DEEP = 8

_json_encode = msgspec.json.Encoder().encode
_json_decode = msgspec.json.Decoder().decode
_msgpack_encode = msgspec.msgpack.Encoder().encode


def _refuse_extension(code: int, data: memoryview) -> Any:
    raise ValueError(f"MessagePack extension {code} of {len(data)} bytes is outside of the data model")


_msgpack_decode = msgspec.msgpack.Decoder(ext_hook=_refuse_extension).decode


def encode_json(value: Any) -> bytes:
    """Encode to JSON. Raises `EngineError` when the value is outside of the data model.

    Token path. msgspec writes integers of any size; its MessagePack encoder refuses those beyond 64 bits, which is the
    cheapest way to notice them (60 ns for an item of 35 bytes; a search for long numbers takes three times as long).
    """
    try:
        data = _json_encode(value)
        if len(data) >= _LARGE:
            _check_integers(value)
        elif len(data) >= _SHORTEST_BIG_INTEGER:
            _msgpack_encode(value)
    except Exception as error:  # a value may be any object, and its encoding may run its code
        raise EngineError(f"{type(value).__name__} value cannot be sent, it has no JSON form: {error}") from error
    return data


def _check_integers(value: Any, depth: int = 0) -> None:
    """The same check for megabytes: texts in small containers, as requests with images are, need not be encoded once more."""
    if isinstance(value, str):
        return
    if depth < _DEEP and isinstance(value, dict | list) and len(cast("list[Any]", value)) <= _FEW:
        for inner in cast("dict[Any, Any]", value).values() if isinstance(value, dict) else cast("list[Any]", value):
            _check_integers(inner, depth + 1)
    else:
        _msgpack_encode(value)


def from_json(data: bytes, codec: Codec) -> bytes:
    """The same value in `codec`. `data` is JSON that `encode_json` made."""
    return data if codec == "json" else _msgpack_encode(_json_decode(data))


def encode_value(value: Any, codec: Codec) -> bytes:
    """Encode to `codec`; what the data model loses in JSON it loses in MessagePack too. Raises `EngineError`."""
    return from_json(encode_json(value), codec)


def decode_value(data: bytes | memoryview, codec: Codec) -> Any:
    """Decode to plain values; `PeerProtocolError` when the bytes are not of that codec."""
    try:
        return _json_decode(data) if codec == "json" else _msgpack_decode(data)
    except DECODE_ERRORS as error:
        raise PeerProtocolError(f"value of {len(data)} bytes is not {codec}: {error}") from error
