"""How long simulated passes take: the reference's numbers (`spec/50 §23.1`)."""

import pytest

from stator.mocker.timing import FormulaTiming, scaled

DEFAULT = FormulaTiming(capacity=16384)


@pytest.mark.parametrize(
    ("tokens", "nanoseconds"),
    [(1024, 32_490_712), (8192, 169_136_918), (6000, 122_758_020), (1, 16_516_604)],
)
def test_prefill_grows_with_the_square(tokens: int, nanoseconds: int) -> None:
    assert DEFAULT.prefill(tokens) == nanoseconds


@pytest.mark.parametrize(("blocks", "nanoseconds"), [(16, 5_792_720), (17, 5_796_013), (0, 5_740_000), (16384, 34_010_000)])
def test_decoding_grows_with_the_blocks_in_use(blocks: int, nanoseconds: int) -> None:
    assert DEFAULT.decode(blocks, 0) == nanoseconds


def test_decoding_takes_no_longer_than_with_all_blocks_in_use() -> None:
    assert FormulaTiming(capacity=10).decode(11, 0) == FormulaTiming(capacity=10).decode(10, 0)


def test_both_parts_are_divided_by_the_speedup_and_decoding_by_its_own_too() -> None:
    fast = FormulaTiming(capacity=16384, speedup=7.0, decode_speedup=3.0)
    assert fast.prefill(1024) == 4_641_530
    assert fast.decode(16, 0) == 275_844
    assert FormulaTiming(capacity=16384, speedup=7.0).decode(17, 0) == 828_002


def test_times_are_rounded_before_and_after_the_division() -> None:
    assert scaled(12.6263636363, 17.5) == 721_507, "12 626 364 ns / 17.5, and not 12 626 363.6 ns / 17.5"
    assert scaled(1.0000006, 1.0) == 1_000_001


def test_a_pass_takes_as_long_as_the_one_before_with_the_same_blocks() -> None:
    assert DEFAULT.steady
    assert DEFAULT.decode(20, 100) == DEFAULT.decode(20, 5000)
