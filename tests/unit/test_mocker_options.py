"""Settings of the simulated engine."""

import pytest

from stator.errors import ConfigError
from stator.mocker.options import MockerOptions
from stator.settings import load


def test_the_defaults_are_the_reference_s() -> None:
    options = MockerOptions()
    assert (options.num_gpu_blocks, options.block_size) == (16384, 64)
    assert (options.max_num_seqs, options.max_num_batched_tokens) == (256, 8192)
    assert options.enable_prefix_caching and options.enable_chunked_prefill
    assert (options.preemption_mode, options.watermark, options.data_parallel_size) == ("lifo", 0.0, 1)
    assert (options.speedup_ratio, options.decode_speedup_ratio, options.startup_time) == (1.0, 1.0, 0.0)


def test_they_are_read_as_settings_are() -> None:
    found = load(MockerOptions, {"speedup_ratio": "2.5", "preemption_mode": "fifo", "enable_prefix_caching": "no"})
    assert (found.speedup_ratio, found.preemption_mode, found.enable_prefix_caching) == (2.5, "fifo", False)


@pytest.mark.parametrize("name", ["speedup_ratio", "decode_speedup_ratio"])
def test_no_delay_at_all_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} = 0: .*cannot be simulated.*large value"):
        MockerOptions(**{name: 0.0})  # pyright: ignore[reportArgumentType]


def test_a_pass_must_have_room_for_all_that_decode() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens = 100 is less than max_num_seqs = 256"):
        MockerOptions(max_num_batched_tokens=100)
    MockerOptions(max_num_batched_tokens=100, max_num_seqs=100)


def test_the_context_is_what_the_blocks_hold() -> None:
    options = MockerOptions(num_gpu_blocks=100, block_size=16)
    assert options.context == options.longest == 1600
    assert MockerOptions(num_gpu_blocks=100, block_size=16, context_length=1000).context == 1000
    with pytest.raises(ConfigError, match="100 blocks of 16 hold 1600 tokens"):
        MockerOptions(num_gpu_blocks=100, block_size=16, context_length=1601)
    with pytest.raises(ConfigError, match="1 blocks of 1 hold 1 token"):
        MockerOptions(num_gpu_blocks=1, block_size=1)


def test_without_chunks_a_pass_is_the_limit() -> None:
    assert MockerOptions(enable_chunked_prefill=False).context == 8192
    with pytest.raises(ConfigError, match="without chunked prefill a pass of 8192 is the limit"):
        MockerOptions(enable_chunked_prefill=False, context_length=8193)


@pytest.mark.parametrize("wrong", [{"watermark": 1.0}, {"block_size": 0}, {"preemption_mode": "random"}, {"fail_after": 0.0}])
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MockerOptions(**wrong)  # pyright: ignore[reportArgumentType]
