"""Measured times instead of formulas."""

import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from stator.errors import ConfigError
from stator.mocker.options import MockerOptions
from stator.mocker.profile import load_profile

GRID: dict[str, Any] = {
    "prefill_isl": [100.0, 1000.0, 5000.0],
    "prefill_ttft_ms": [1.0, 100.0, 2500.0],
    "decode_active_kv_tokens": [100.0, 10_000.0],
    "decode_context_length": [100.0, 1000.0, 10_000.0],
    "decode_itl": [[2.0, 11.0, 20.0], [12.0, 21.0, 30.0]],
}


def saved(directory: Path, **changes: Any) -> Path:
    """A profile with changes; None leaves a part out."""
    path = directory / "profile.npz"
    parts = {**GRID, **changes}
    numpy.savez(path, **{name: numpy.array(value) for name, value in parts.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("tokens", "milliseconds"), [(100, 1.0), (550, 50.5), (1000, 100.0), (2000, 700.0), (6000, 3100.0), (200, 12.0)]
)
def test_prefill_goes_straight_between_the_points_and_beyond(tmp_path: Path, tokens: int, milliseconds: float) -> None:
    timing = load_profile(saved(tmp_path), block_size=10)
    assert timing.prefill(tokens) == pytest.approx(milliseconds * 1e6, abs=1)


def test_prefill_is_never_negative(tmp_path: Path) -> None:
    assert load_profile(saved(tmp_path), block_size=10).prefill(1) == 0


@pytest.mark.parametrize(
    ("blocks", "context", "milliseconds"),
    [(10, 100, 2.0), (1000, 10_000, 30.0), (505, 100, 7.0), (505, 550, 11.5), (1990, 100, 22.0), (10, 19_000, 29.0)],
)
def test_decoding_goes_straight_in_both_directions(tmp_path: Path, blocks: int, context: int, milliseconds: float) -> None:
    timing = load_profile(saved(tmp_path), block_size=10)
    assert timing.decode(blocks, context) == pytest.approx(milliseconds * 1e6, abs=1)
    assert not timing.steady, "the context grows with each token"


def test_decoding_takes_a_millisecond_at_least(tmp_path: Path) -> None:
    itl = [[0.1] * 3] * 2
    assert load_profile(saved(tmp_path, decode_itl=itl), block_size=10).decode(10, 100) == 1_000_000
    assert load_profile(saved(tmp_path, decode_itl=itl), block_size=10, speedup=2, decode_speedup=5).decode(10, 100) == 100_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill_isl": None}, "has no prefill_isl"),
        ({"decode_itl": [1.0, 2.0]}, "2 dimensions"),
        ({"decode_itl": [[1.0, 2.0]]}, "2 × 3 values"),
        ({"prefill_ttft_ms": [1.0]}, "1 values for 3"),
        ({"prefill_isl": [5.0]}, "at least two values"),
        ({"prefill_isl": [5.0, 5.0, 6.0]}, "that rise"),
        ({"prefill_ttft_ms": [1.0, float("nan"), 2.0]}, "no times"),
        ({"prefill_ttft_ms": ["a", "b", "c"]}, "numbers"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_profile(saved(tmp_path, **changes), block_size=10)


def test_files_that_are_no_profile_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    other.write_bytes(b"not at all")
    for path in (other, tmp_path, tmp_path / "missing.npz"):
        with pytest.raises(ConfigError, match=f"{path.name} cannot be read"):
            load_profile(path, block_size=10)


def test_missing_numpy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ConfigError, match="pip install numpy"):
        load_profile(saved(tmp_path), block_size=10)


def test_the_options_read_it(tmp_path: Path) -> None:
    options = MockerOptions(planner_profile_data=saved(tmp_path), block_size=10, speedup_ratio=2.0)
    assert options.timing().prefill(1000) == 50_000_000
