"""KV blocks and prompt tokens held against the reference's three limits (`spec/40 §3.2`)."""

import math
from typing import Any

import msgspec
import pytest

from stator.errors import ConfigError, UsageError
from stator.llm.card import ModelCard, RuntimeConfig
from stator.llm.kv_load import KvCapacity, KvLoadRule, kv_capacity
from stator.llm.load_event import ActiveLoad, decode_load, encode_load
from stator.llm.thresholds import NO_THRESHOLDS, LoadConfig, Thresholds
from stator.routing import Group, LoadTable
from stator.settings import load

RULE = KvLoadRule()
THOUSAND = KvCapacity(total_kv_blocks=1000, max_num_batched_tokens=100)


def event(**said: int) -> ActiveLoad:
    return ActiveLoad(worker_id=1, **said)


def over(thresholds: Thresholds, capacity: KvCapacity = THOUSAND, /, **said: int) -> bool:
    return RULE.is_over(event(**said), capacity, thresholds, False)


HALF = Thresholds(active_decode_blocks_threshold=0.5)


@pytest.mark.parametrize("signal", ["kv_used_blocks", "active_decode_blocks"])
def test_blocks_are_compared_strictly(signal: str) -> None:
    def busy(thresholds: Thresholds, value: int, capacity: KvCapacity = THOUSAND) -> bool:
        return over(thresholds, capacity, **{signal: value})

    assert not busy(HALF, 500)
    assert busy(HALF, 501)
    assert not busy(Thresholds(active_decode_blocks_threshold=1.0), 1000), "all blocks in use are not too many"
    assert not busy(HALF, 10**9, KvCapacity()), "nobody knows how many there are"
    assert not busy(NO_THRESHOLDS, 10**9)


def test_prompt_tokens_are_held_against_two_limits() -> None:
    tokens = Thresholds(active_prefill_tokens_threshold=10)
    assert not over(tokens, active_prefill_tokens=10) and over(tokens, active_prefill_tokens=11)
    steps = Thresholds(active_prefill_tokens_threshold_frac=1.25)
    odd = KvCapacity(max_num_batched_tokens=102)
    assert not over(steps, odd, active_prefill_tokens=127) and over(steps, odd, active_prefill_tokens=128), (
        "127.5 is cut to 127"
    )
    unknown = KvCapacity(total_kv_blocks=1000)
    assert not over(steps, unknown, active_prefill_tokens=12_500_000) and over(steps, unknown, active_prefill_tokens=12_500_001)
    below = Thresholds(active_prefill_tokens_threshold_frac=-3.0)
    assert not over(below, active_prefill_tokens=0) and over(below, active_prefill_tokens=1)


def test_the_latch_of_the_reference_follows_from_the_last_known_values() -> None:
    table: LoadTable[str, ActiveLoad, KvCapacity, Thresholds] = LoadTable(RULE)
    table.follow({"m": Group(workers={1: THOUSAND}, threshold=HALF)}, frozenset(), 0.0)
    steps = [
        ({"active_decode_blocks": 900}, True),
        ({"kv_used_blocks": 10}, True),
        ({"active_prefill_tokens": 10**9}, True),
        ({"active_decode_blocks": 10}, False),
        ({"kv_used_blocks": 501}, True),
        ({}, True),
        ({"kv_used_blocks": 500}, False),
    ]
    for said, busy in steps:
        table.hear(1, 0, event(**said), 0.0)
        assert (1 in table.busy("m")) is busy, said


def test_unsaid_fields_keep_their_last_value() -> None:
    known = ActiveLoad(worker_id=1, dp_rank=2, active_decode_blocks=3, active_prefill_tokens=4, kv_used_blocks=5)
    assert RULE.merge(known, ActiveLoad(worker_id=1, dp_rank=2, kv_used_blocks=0)) == ActiveLoad(
        worker_id=1, dp_rank=2, active_decode_blocks=3, active_prefill_tokens=4, kv_used_blocks=0
    )
    assert RULE.merge(known, ActiveLoad(worker_id=1, dp_rank=2)) == known


def test_the_reason_is_the_limit_exceeded_most() -> None:
    all_three = Thresholds(
        active_decode_blocks_threshold=0.5, active_prefill_tokens_threshold=50, active_prefill_tokens_threshold_frac=2.0
    )
    said = event(kv_used_blocks=501, active_decode_blocks=10, active_prefill_tokens=20)
    assert RULE.reason(said, THOUSAND, all_three) == "kv_used_blocks 501 is over 500 (0.5 of 1000 blocks)"
    assert RULE.excess(said, THOUSAND, all_three) == pytest.approx(1.002)
    said = event(kv_used_blocks=501, active_prefill_tokens=600)
    assert RULE.reason(said, THOUSAND, all_three) == "active_prefill_tokens 600 is over 50"
    steps = msgspec.structs.replace(all_three, active_prefill_tokens_threshold=None)
    assert RULE.reason(said, THOUSAND, steps) == "active_prefill_tokens 600 is over 200 (2 × max_num_batched_tokens)"
    none = msgspec.structs.replace(all_three, active_decode_blocks_threshold=0.0)
    assert RULE.excess(said, THOUSAND, none) == math.inf
    assert RULE.reason(event(), THOUSAND, all_three) == "" and RULE.excess(event(), THOUSAND, all_three) == 0.0


def test_capacity_comes_from_the_card() -> None:
    card = ModelCard(display_name="m", runtime_config=RuntimeConfig(total_kv_blocks=7, max_num_batched_tokens=9))
    assert kv_capacity(card) == KvCapacity(total_kv_blocks=7, max_num_batched_tokens=9)
    assert kv_capacity(ModelCard(display_name="m")) == KvCapacity()


def test_the_events_of_the_reference_are_read() -> None:
    captured = bytes.fromhex(
        "85a9776f726b65725f6964cfcf6ffe7bf99f7c6fa764705f72616e6b00b46163746976655f6465636f64655f626c6f636b7307"
        "b56163746976655f70726566696c6c5f746f6b656e73c0ae6b765f757365645f626c6f636b73c0"
    )
    read = decode_load(captured)
    assert read == ActiveLoad(worker_id=14947445496688376943, active_decode_blocks=7)
    assert encode_load(read) == captured


# -- thresholds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"active_decode_blocks_threshold": 1.5}, "active_decode_blocks_threshold must be between 0.0 and 1.0, got 1.5"),
        ({"active_decode_blocks_threshold": -0.1}, "active_decode_blocks_threshold must be between"),
        ({"active_decode_blocks_threshold": math.nan}, "active_decode_blocks_threshold must be between"),
        ({"active_prefill_tokens_threshold": -1}, "active_prefill_tokens_threshold must not be negative, got -1"),
        ({"active_prefill_tokens_threshold_frac": math.inf}, "active_prefill_tokens_threshold_frac must be a finite number"),
    ],
)
def test_thresholds_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Thresholds(**given)
    with pytest.raises(UsageError, match=message):
        msgspec.structs.replace(NO_THRESHOLDS, **given)


STANDARD = Thresholds(
    active_decode_blocks_threshold=1.0, active_prefill_tokens_threshold=10_000_000, active_prefill_tokens_threshold_frac=64.0
)


@pytest.mark.parametrize(
    ("env", "changes"),
    [
        ({}, {}),
        ({"DYN_ADMISSION_CONTROL": "token-capacity"}, {}),
        ({"DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD": "0.85"}, {"active_decode_blocks_threshold": 0.85}),
        ({"DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD": "4096"}, {"active_prefill_tokens_threshold": 4096}),
        ({"DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC": "-1.5"}, {"active_prefill_tokens_threshold_frac": -1.5}),
        ({"DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD": "None"}, {"active_prefill_tokens_threshold": None}),
        ({"STATOR_LOAD_ACTIVE_DECODE_BLOCKS_THRESHOLD": "none"}, {"active_decode_blocks_threshold": None}),
        (
            {"STATOR_LOAD_ACTIVE_DECODE_BLOCKS_THRESHOLD": "0.5", "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD": "0.7"},
            {"active_decode_blocks_threshold": 0.5},
        ),
    ],
)
def test_thresholds_come_from_the_settings(env: dict[str, str], changes: dict[str, Any]) -> None:
    assert load(LoadConfig, env=env).thresholds == msgspec.structs.replace(STANDARD, **changes)


def test_none_takes_nobody_out() -> None:
    assert load(LoadConfig, env={"DYN_ADMISSION_CONTROL": "none"}).thresholds == NO_THRESHOLDS
    assert load(LoadConfig, {"admission_control": "none"}, env={}).thresholds == NO_THRESHOLDS


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"DYN_ADMISSION_CONTROL": "none", "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD": "0.5"},
            "active_decode_blocks_threshold = 0.5 and admission_control = none contradict each other",
        ),
        ({"DYN_ADMISSION_CONTROL": "some"}, "DYN_ADMISSION_CONTROL='some'"),
        ({"DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD": "1.5"}, "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD='1.5': .* from 0 to 1"),
        ({"DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD": "many"}, "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD='many': expected a number"),
        ({"STATOR_LOAD_STALE_AFTER": "0"}, "STATOR_LOAD_STALE_AFTER"),
    ],
)
def test_settings_that_make_no_sense_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(LoadConfig, env=env)
