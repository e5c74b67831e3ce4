"""When a worker counts as busy: the reference's three thresholds, and where they come from (`spec/40 §3.1`)."""

import math
from typing import Annotated, ClassVar, Literal

import msgspec

from stator.config import Config, Setting
from stator.errors import ConfigError, UsageError

__all__ = ["NO_THRESHOLDS", "LoadConfig", "Thresholds"]


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """A rank of a worker that is over any of them is busy; None: that one does not count. The names are those of `/busy_threshold`.

    Raises `UsageError` naming the field that is out of range.
    """

    active_decode_blocks_threshold: float | None = None
    """0 … 1, of the worker's KV blocks"""
    active_prefill_tokens_threshold: int | None = None
    """prompt tokens that were booked and are not computed yet, ≥ 0"""
    active_prefill_tokens_threshold_frac: float | None = None
    """the same as multiple of the tokens that the worker computes in one step; below 0 it acts like 0"""

    def __post_init__(self) -> None:
        decode, tokens = self.active_decode_blocks_threshold, self.active_prefill_tokens_threshold
        frac = self.active_prefill_tokens_threshold_frac
        if decode is not None and not 0.0 <= decode <= 1.0:
            raise UsageError(f"active_decode_blocks_threshold must be between 0.0 and 1.0, got {decode}")
        if tokens is not None and tokens < 0:
            raise UsageError(f"active_prefill_tokens_threshold must not be negative, got {tokens}")
        if frac is not None and not math.isfinite(frac):
            raise UsageError(f"active_prefill_tokens_threshold_frac must be a finite number, got {frac}")


NO_THRESHOLDS = Thresholds()
"""nobody is ever busy"""


def _whole(text: str) -> object:
    return _number(text, int)


def _fraction(text: str) -> object:
    return _number(text, float)


def _number(text: str, kind: type[int] | type[float]) -> object:
    """What the reference takes for a threshold: a number, or the word None. Raises `ValueError` for anything else."""
    word = text.strip()
    if word.lower() == "none":
        return None
    try:
        return kind(word)
    except ValueError:
        raise ValueError("expected a number, or None") from None


class LoadConfig(Config, frozen=True, kw_only=True):
    """When a frontend takes workers out of routing because of what they report.

    The defaults are those that the reference has once it looks at load at all. They are on from the start because a worker that
    is merely full is below them: blocks in use cannot exceed all blocks, and 64 steps of prompts still to be computed are a queue
    no first token comes out of in time. `admission_control = none` takes nobody out; a threshold that says otherwise is an error then.
    """

    section: ClassVar[str] = "load"

    admission_control: Annotated[
        Literal["token-capacity", "none"],
        Setting(
            doc="whether load reports take workers out of routing; none: never",
            dyn="DYN_ADMISSION_CONTROL",
            dyn_read=str.strip,
            on_bad_dyn="error",
        ),
    ] = "token-capacity"
    active_decode_blocks_threshold: Annotated[
        float | None,
        Setting(
            doc="a worker is busy with more than this part of its KV blocks in use, or booked by a router; none: however many",
            dyn="DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
            dyn_read=_fraction,
            on_bad_dyn="error",
            ge=0,
            le=1,
        ),
    ] = 1.0
    active_prefill_tokens_threshold: Annotated[
        int | None,
        Setting(
            doc="a worker is busy with more prompt tokens than this to be computed; none: however many",
            unit="tokens",
            dyn="DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
            dyn_read=_whole,
            on_bad_dyn="error",
            ge=0,
        ),
    ] = 10_000_000
    active_prefill_tokens_threshold_frac: Annotated[
        float | None,
        Setting(
            doc="the same as multiple of the tokens that the worker computes in one step; none: however many",
            dyn="DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",
            dyn_read=_fraction,
            on_bad_dyn="error",
        ),
    ] = 64.0
    stale_after: Annotated[
        float,
        Setting(
            doc="how long a Stator worker's report counts, which comes every second; others report changes only, theirs stay",
            unit="s",
            gt=0,
        ),
    ] = 5.0
    max_ranks: Annotated[int, Setting(doc="data-parallel ranks of one worker whose reports are kept", ge=1)] = 1024
    max_strangers: Annotated[
        int,
        Setting(
            doc="workers whose reports are kept before they are listed, as those of other namespaces on a broker are", ge=0
        ),
    ] = 1024

    def check(self) -> None:
        if self.admission_control != "none":
            return
        for name in Thresholds.__struct_fields__:
            value = getattr(self, name)
            if value is not None and value != _DEFAULTS[name]:
                raise ConfigError(f"{name} = {value} and admission_control = none contradict each other; remove one")

    @property
    def thresholds(self) -> Thresholds:
        """Those in force until somebody sets others."""
        if self.admission_control == "none":
            return NO_THRESHOLDS
        return Thresholds(**{name: getattr(self, name) for name in Thresholds.__struct_fields__})


_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(LoadConfig)}
