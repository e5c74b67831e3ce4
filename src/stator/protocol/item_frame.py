"""The wrapper around each item of a response stream, in both codecs (`spec/10 §3.3`).

`{"data": ITEM, "complete_final": false}` with ITEM = `{"data": value}` plus annotations; the final frame is
`{"complete_final": true}`.
"""

from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Any, Generic, TypeVar

import msgspec

from stator.protocol.annotated import Annotated
from stator.protocol.envelope import Codec
from stator.protocol.partial import LARGE, Data
from stator.protocol.two_part import encode_frame
from stator.protocol.values import encode_json, from_json
from stator.protocol.wire_errors import WireError

__all__ = ["FINAL", "ItemFrame", "WireItem", "encode_error_item", "encode_item", "item_decoder", "write_item"]

T = TypeVar("T")

FINAL: dict[Codec, bytes] = {
    "json": encode_frame(data=b'{"complete_final":true}'),
    "msgpack": encode_frame(data=b"\x81\xaecomplete_final\xc3"),
}
"""The final frame, ready to be sent."""

_OPEN = b'{"data":{"data":'
_CLOSE = b'},"complete_final":false}'
_WRAPPING = len(_OPEN) + len(_CLOSE)
_pack_opening = Struct(f">QQQ{len(_OPEN)}s").pack
"""TwoPart prefix and the opening of the wrapper in one call."""


def encode_item(value: Any, codec: Codec) -> bytes:
    """The whole frame of one item, TwoPart prefix included. Raises `EngineError` for a value outside of the data model."""
    out: list[bytes] = []
    write_item(out, value, codec)
    return b"".join(out)


def write_item(out: list[bytes], value: Any, codec: Codec) -> bool:
    """Append the frame of one item to `out`, in one piece unless it is large: True then. Raises like `encode_item`.

    Token path: one encode, one pack, one join.
    """
    body = encode_json(value)
    if codec == "json" and type(value) is not Annotated:
        opening = _pack_opening(0, len(body) + _WRAPPING, 0, _OPEN)
        if len(body) >= LARGE:
            out += (opening, body, _CLOSE)
            return True
        out.append(b"".join((opening, body, _CLOSE)))
        return False
    frame = _wrap(body if type(value) is Annotated else b'{"data":' + body + b"}", codec)
    out.append(frame)
    return len(frame) >= LARGE


def encode_error_item(error: WireError, codec: Codec) -> bytes:
    """The whole frame of an error item; the final frame and the sentinel follow it."""
    return _wrap(b'{"event":"error","error":' + encode_json(error) + b"}", codec)


def _wrap(item: bytes, codec: Codec) -> bytes:
    return encode_frame(data=from_json(b'{"data":' + item + b',"complete_final":false}', codec))


class WireItem(msgspec.Struct, Generic[T], frozen=True, kw_only=True, gc=False):
    """An Annotated object as it may arrive: anything may be missing or null, unknown fields are ignored."""

    data: T | None = None
    id: str | None = None
    event: str | None = None
    comment: list[str] | None = None
    error: Any = None

    @property
    def value(self) -> Any:
        """What the reader gets: the value itself, or `Annotated` where there is more than that."""
        if self.event is None and self.id is None and self.comment is None:
            return self.data
        unset = msgspec.UNSET
        return Annotated(
            data=unset if self.data is None else self.data,
            id=unset if self.id is None else self.id,
            event=unset if self.event is None else self.event,
            comment=unset if self.comment is None else self.comment,
        )


class ItemFrame(msgspec.Struct, Generic[T], frozen=True, kw_only=True, gc=False):
    """The wrapper; `data` is missing or null where there is no item."""

    complete_final: bool
    data: WireItem[T] | None = None


@lru_cache(maxsize=256)
def item_decoder(codec: Codec, item_type: Any = Any) -> Callable[[Data], ItemFrame[Any] | tuple[WireItem[Any] | None, bool]]:
    """Decoder of item frames whose values are `item_type`. The wrapper may also be the pair (ITEM, complete_final)."""
    wrapper = ItemFrame[item_type] | tuple[WireItem[item_type] | None, bool]
    decoder = msgspec.json.Decoder(wrapper) if codec == "json" else msgspec.msgpack.Decoder(wrapper)
    return decoder.decode
