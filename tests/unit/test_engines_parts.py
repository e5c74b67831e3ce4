"""Small parts of the engines."""

import socket
from typing import Any

import pytest

from stator.engines import load_engine
from stator.engines.arguments import missing_extra, read_arguments
from stator.engines.block_ledger import BlockLedger
from stator.engines.hit_rate import HitRate
from stator.engines.loopback_ports import free_ports
from stator.engines.sequence import Sampling, Sequence
from stator.engines.sglang import SglangEngine
from stator.engines.vllm import VllmEngine
from stator.errors import ConfigError


def sequence() -> Sequence:
    return Sequence([1], sampling=Sampling(), max_tokens=1)


def test_blocks_are_held_as_tokens_need_them() -> None:
    ledger = BlockLedger(total=5, block_size=4)
    one, two = sequence(), sequence()
    assert [ledger.needed(tokens) for tokens in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    assert ledger.grow(one, 4) and ledger.used == 1
    assert ledger.grow(one, 4) and ledger.used == 1
    assert ledger.grow(one, 5) and ledger.used == 2
    assert ledger.grow(one, 1) and ledger.used == 2, "what is held stays"
    assert ledger.grow(two, 12) and ledger.used == 5
    assert not ledger.grow(one, 9) and ledger.used == 5
    assert not ledger.grow(sequence(), 1)
    ledger.free(two)
    assert ledger.used == 2
    assert ledger.grow(one, 9) and ledger.used == 3
    ledger.free(two)
    ledger.free(one)
    assert ledger.used == 0


def test_a_hit_rate_is_of_what_was_looked_up() -> None:
    rate = HitRate()
    assert rate.value is None
    rate.add(0, 0)
    assert rate.value is None
    rate.add(100, 0)
    assert rate.value == 0.0
    rate.add(100, 50)
    assert rate.value == 0.25
    rate.reset()
    assert rate.value is None


def test_what_is_long_ago_fades() -> None:
    rate = HitRate()
    rate.add(1_000_000, 0)
    for _ in range(10):
        rate.add(1_000_000, 1_000_000)
    assert rate.value == pytest.approx(1.0, abs=0.001)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("", {}),
        (" , ", {}),
        ("a=1, b=0.5,c=true,d=null,e=text", {"a": 1, "b": 0.5, "c": True, "d": None, "e": "text"}),
        ('a="1",b=True,c=False,d=None', {"a": "1", "b": True, "c": False, "d": None}),
        ("--max-model-len=8", {"max_model_len": 8}),
        ("url=http://host?a=b", {"url": "http://host?a=b"}),
        (' {"a": {"b": [1, 2]}, "c-d": 1}', {"a": {"b": [1, 2]}, "c-d": 1}),
    ],
)
def test_arguments_of_other_libraries(text: str, arguments: dict[str, Any]) -> None:
    assert read_arguments(text, setting="x.arguments") == arguments


@pytest.mark.parametrize("text", ["a", "=1", "a b=1", "a=1,b", "{", '{"a":}', "{1: 2}"])
def test_what_are_no_arguments_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^x\.arguments "):
        read_arguments(text, setting="x.arguments")


def test_a_missing_extra_says_what_to_install() -> None:
    error = missing_extra("vllm", ModuleNotFoundError("No module named 'vllm'", name="vllm"))
    assert error.message == 'the vllm engine needs vllm: pip install "stator[vllm]"'


@pytest.mark.parametrize("count", [1, 2, 16])
def test_free_ports_are_free(count: int) -> None:
    base = free_ports(count)
    assert 1024 <= base <= 65_536 - count
    sockets = [socket.socket() for _ in range(count)]
    try:
        for place, one in enumerate(sockets):
            one.bind(("127.0.0.1", base + place))
    finally:
        for one in sockets:
            one.close()


def test_more_ports_than_there_are() -> None:
    with pytest.raises(ConfigError, match="no 70000 free ports"):
        free_ports(70_000)


def test_the_adapters_are_found_without_their_libraries() -> None:
    assert load_engine("vllm") is VllmEngine
    assert load_engine("sglang") is SglangEngine
