"""The data model of requests and items."""

import enum
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from stator.errors import EngineError, PeerProtocolError
from stator.protocol.envelope import Codec
from stator.protocol.values import decode_value, encode_json, encode_value, from_json

CODECS: list[Codec] = ["json", "msgpack"]


class Point(msgspec.Struct):
    x: int


class Colour(enum.Enum):
    RED = "red"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("value", "read"),
    [
        (None, None),
        ({"a": [1, -0.0, 1e30, True, "ü👍\u2028\x00"]}, {"a": [1, -0.0, 1e30, True, "ü👍\u2028\x00"]}),
        ({"longer than it needs": [2**64 - 1, -(2**63)]}, {"longer than it needs": [2**64 - 1, -(2**63)]}),
        ([float("nan"), float("inf"), -float("inf")], [None, None, None]),
        (b"bytes", "Ynl0ZXM="),
        ({1: "a", "b": (1, 2)}, {"1": "a", "b": [1, 2]}),
        (Point(3), {"x": 3}),
        (Colour.RED, "red"),
    ],
)
def test_one_data_model_in_both_codecs(value: Any, read: Any, codec: Codec) -> None:
    assert decode_value(encode_value(value, codec), codec) == read


@pytest.mark.parametrize(
    "value",
    [object(), {"a": [2**64]}, [-(2**63) - 1], 2**64, [10**5000], {(1, 2): 3}, "\ud800", {"padding" * 5: 1 + 2j}],
)
def test_values_outside_of_the_data_model(value: Any) -> None:
    for codec in CODECS:
        with pytest.raises(EngineError, match=f"{type(value).__name__} value cannot be sent"):
            encode_value(value, codec)


@pytest.mark.parametrize(
    "wrap", [lambda big: {"a": big}, lambda big: [[{"b": [big]}]], lambda big: [big] * 100, lambda big: (big,)]
)
@pytest.mark.parametrize("filling", ["x" * 2_000_000, list(range(500_000))])
def test_integers_are_found_in_large_values_too(wrap: Callable[[Any], Any], filling: Any) -> None:
    fine = [wrap(2**64 - 1), filling]
    assert decode_value(encode_json(fine), "json")[1] == filling
    with pytest.raises(EngineError):
        encode_json([wrap(2**64), filling])
    deep: Any = 2**64
    for _ in range(100):
        deep = {"d": deep}
    with pytest.raises(EngineError):
        encode_json([deep, filling])


def test_a_value_that_contains_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(EngineError):
        encode_json(loop)


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        ("json", b""),
        ("json", b"{"),
        ("json", b'"\xff"'),
        ("json", b"[" * 5000 + b"]" * 5000),
        ("json", b"9" * 5000),
        ("json", b"1e400"),
        ("json", b"1 2"),
        ("msgpack", b""),
        ("msgpack", b"\xa5abc"),
        ("msgpack", b"\xa1\xff"),
        ("msgpack", b"\x91" * 5000),
        ("msgpack", b"\xd4\x05\x00"),
        ("msgpack", b"\xc1"),
        ("msgpack", b"\xdd\xff\xff\xff\xff"),
    ],
)
def test_bytes_that_are_not_the_codec(codec: Codec, data: bytes) -> None:
    with pytest.raises(PeerProtocolError, match=f"is not {codec}"):
        decode_value(data, codec)


def test_from_json() -> None:
    assert from_json(b'{"a":1}', "json") == b'{"a":1}'
    assert from_json(b'{"a":1}', "msgpack") == b"\x81\xa1a\x01"
