"""Measured times of a forward pass, from the NPZ file of a profiler (`spec/50 §23.1`)."""

import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stator.errors import ConfigError
from stator.mocker.timing import scaled

if TYPE_CHECKING:
    import numpy

__all__ = ["ProfileTiming", "load_profile"]

_NEEDED = ("prefill_isl", "prefill_ttft_ms", "decode_active_kv_tokens", "decode_context_length", "decode_itl")


class ProfileTiming:
    """Interpolates between what was measured, and goes on in a straight line beyond it. Decoding takes at least 1 ms.

    `prefill_ttft[i]` belongs to `prefill_tokens[i]`, `decode_itl[k][c]` to `kv_tokens[k]` and `context[c]`; times in milliseconds.
    """

    steady = False

    def __init__(
        self,
        *,
        prefill_tokens: Sequence[float],
        prefill_ttft: Sequence[float],
        kv_tokens: Sequence[float],
        context: Sequence[float],
        decode_itl: Sequence[Sequence[float]],
        block_size: int,
        speedup: float = 1.0,
        decode_speedup: float = 1.0,
    ) -> None:
        """Raises `ConfigError` when the lengths do not fit, or a grid does not rise or has less than two points."""
        _check_grid("prefill_isl", prefill_tokens)
        _check_grid("decode_active_kv_tokens", kv_tokens)
        _check_grid("decode_context_length", context)
        if len(prefill_ttft) != len(prefill_tokens):
            raise _unfit(f"prefill_ttft_ms has {len(prefill_ttft)} values for {len(prefill_tokens)} of prefill_isl")
        if len(decode_itl) != len(kv_tokens) or any(len(row) != len(context) for row in decode_itl):
            raise _unfit(f"decode_itl must have {len(kv_tokens)} × {len(context)} values")
        self._prefill_tokens = prefill_tokens
        self._prefill_ttft = prefill_ttft
        self._kv_tokens = kv_tokens
        self._context = context
        self._itl = decode_itl
        self._block_size = block_size
        self._speedup = speedup
        self._decode_speedup = speedup * decode_speedup

    def prefill(self, tokens: int) -> int:
        at, share = _place(self._prefill_tokens, tokens)
        return scaled(max(0.0, _between(self._prefill_ttft, at, share)), self._speedup)

    def decode(self, used_blocks: int, context: int) -> int:
        row, down = _place(self._kv_tokens, used_blocks * self._block_size)
        column, across = _place(self._context, context)
        first = _between(self._itl[row], column, across)
        second = _between(self._itl[row + 1], column, across)
        return scaled(max(1.0, first + (second - first) * down), self._decode_speedup)


def load_profile(path: Path, *, block_size: int, speedup: float = 1.0, decode_speedup: float = 1.0) -> ProfileTiming:
    """Read an NPZ file. Blocks. Raises `ConfigError` when numpy is missing or the file is not one of a profiler."""
    try:
        import numpy
    except ModuleNotFoundError as error:
        raise ConfigError("planner_profile_data needs numpy to be read: pip install numpy") from error
    try:
        with zipfile.ZipFile(path):  # says early what is no NPZ file
            pass
        with numpy.load(path, allow_pickle=False) as found:
            values: dict[str, Any] = {name: _array(found, name, path).tolist() for name in _NEEDED}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"planner_profile_data {path} cannot be read: {error}") from error
    return ProfileTiming(
        prefill_tokens=values["prefill_isl"],
        prefill_ttft=values["prefill_ttft_ms"],
        kv_tokens=values["decode_active_kv_tokens"],
        context=values["decode_context_length"],
        decode_itl=values["decode_itl"],
        block_size=block_size,
        speedup=speedup,
        decode_speedup=decode_speedup,
    )


def _array(found: Any, name: str, path: Path) -> "numpy.ndarray[Any, Any]":
    if name not in found.files:
        raise ConfigError(f"planner_profile_data {path} has no {name}: expected an NPZ file with {', '.join(_NEEDED)}")
    array = found[name]
    dimensions = 2 if name == "decode_itl" else 1
    if array.ndim != dimensions or array.dtype.kind not in "iuf":
        raise ConfigError(f"planner_profile_data {path}: {name} must be an array of numbers with {dimensions} dimensions")
    values = array.astype(float)
    if not ((values > -1e12) & (values < 1e12)).all():  # neither NaN nor infinity
        raise ConfigError(f"planner_profile_data {path}: {name} has values that are no times or lengths")
    return values


def _check_grid(name: str, grid: Sequence[float]) -> None:
    if len(grid) < 2 or not all(low < high for low, high in pairwise(grid)):
        raise _unfit(f"{name} must have at least two values that rise")


def _unfit(what: str) -> ConfigError:
    return ConfigError(f"planner_profile_data: {what}")


def _place(grid: Sequence[float], value: float) -> tuple[int, float]:
    """The piece of `grid` that `value` is in, or the nearest one, and how far along."""
    at = min(max(bisect_right(grid, value) - 1, 0), len(grid) - 2)
    return at, (value - grid[at]) / (grid[at + 1] - grid[at])


def _between(values: Sequence[float], at: int, share: float) -> float:
    return values[at] + (values[at + 1] - values[at]) * share
