"""Item frames in both codecs."""

from typing import Any

import msgspec
import pytest

from stator.errors import EngineError
from stator.protocol.annotated import Annotated
from stator.protocol.envelope import Codec
from stator.protocol.item_frame import FINAL, ItemFrame, encode_error_item, encode_item, item_decoder
from stator.protocol.two_part import TwoPartParser
from stator.protocol.wire_errors import to_wire
from stator.testing.recorded import recorded

CODECS: list[Codec] = ["json", "msgpack"]


def payload_of(frame: bytes) -> bytes:
    ((header, payload),) = TwoPartParser(limit=10_000).receive_data(frame)
    assert header == b""
    return payload


def read(frame: bytes, codec: Codec, item_type: Any = Any) -> ItemFrame[Any]:
    found = item_decoder(codec, item_type)(payload_of(frame))
    assert not isinstance(found, tuple)
    return found


@pytest.mark.parametrize(("codec", "name"), [("json", "30-"), ("msgpack", "31-")])
def test_recorded_items_are_written_to_the_byte(codec: Codec, name: str) -> None:
    items = [encode_item({"token_ids": [n], "text": "tok"}, codec) for n in range(2)]
    assert b"".join(items) + FINAL[codec] in recorded(name)


@pytest.mark.parametrize(("name", "text"), [("32-", "ValueError: boom before first"), ("33-", "ValueError: boom mid")])
def test_recorded_errors_are_written_to_the_byte(name: str, text: str) -> None:
    frame = encode_error_item(to_wire(EngineError(text, kind="InvalidArgument")), "json")
    assert frame + FINAL["json"] in recorded(name)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [None, 0, "ü", [1], {"data": 1, "event": "error"}, {"complete_final": True}])
def test_a_value_is_wrapped_and_unwrapped(value: Any, codec: Codec) -> None:
    frame = read(encode_item(value, codec), codec)
    assert frame.data is not None
    assert frame.data.value == value
    assert not frame.complete_final


@pytest.mark.parametrize("codec", CODECS)
def test_annotations_travel(codec: Codec) -> None:
    item = Annotated(data={"a": 1}, id="7", event="metrics", comment=["one", "two"])
    frame = read(encode_item(item, codec), codec)
    assert frame.data is not None
    assert frame.data.value == item
    assert encode_item(item, "json").endswith(
        b'{"data":{"data":{"a":1},"id":"7","event":"metrics","comment":["one","two"]},"complete_final":false}'
    )
    alone = read(encode_item(Annotated(event="ping"), codec), codec)
    assert alone.data is not None
    assert alone.data.value == Annotated(event="ping")
    assert encode_item(Annotated(data=5), codec) == encode_item(5, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_the_pair_form_is_read(codec: Codec) -> None:
    encode = msgspec.json.encode if codec == "json" else msgspec.msgpack.encode
    found = item_decoder(codec)(encode([{"data": 1, "new": 2}, True]))
    assert isinstance(found, tuple)
    item, final = found
    assert item is not None
    assert (item.data, final) == (1, True)


def test_a_type_for_the_items() -> None:
    class Token(msgspec.Struct):
        text: str

    frame = read(encode_item({"text": "a", "new": 1}, "json"), "json", Token)
    assert frame.data is not None
    assert frame.data.value == Token("a")
    with pytest.raises(msgspec.ValidationError):
        item_decoder("json", Token)(payload_of(encode_item({"text": 1}, "json")))


def test_a_value_without_json_form() -> None:
    for codec in CODECS:
        with pytest.raises(EngineError):
            encode_item(object(), codec)
        with pytest.raises(EngineError):
            encode_item(Annotated(data=object()), codec)
