"""KV blocks and prompt tokens as load: when a rank of a worker is over its limits (`spec/40 §3.2`)."""

import math
from collections.abc import Iterator

import msgspec

from stator.llm.card import ModelCard
from stator.llm.load_event import ActiveLoad
from stator.llm.thresholds import Thresholds

__all__ = ["KvCapacity", "KvLoadRule", "kv_capacity"]

_BATCH_UNKNOWN = 10_000_000
"""tokens in one step of a worker whose card does not say it"""


class KvCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker's card says it has; None: it does not say."""

    total_kv_blocks: int | None = None
    max_num_batched_tokens: int | None = None
    """tokens computed in one step"""


def kv_capacity(card: ModelCard) -> KvCapacity:
    """The capacity of the worker that published `card`."""
    runtime = card.runtime_config
    return KvCapacity(total_kv_blocks=runtime.total_kv_blocks, max_num_batched_tokens=runtime.max_num_batched_tokens)


class KvLoadRule:
    """`LoadRule` of the reference: any of three limits, each compared strictly.

    The reference sets a latch when one of the two counts of blocks exceeds the limit and clears it when the last known value of each is
    within. As an unsaid field leaves its last value standing, that is the same as to compare the last known values, which this does;
    so a threshold that changes acts at once, and `was_over` does not matter.
    """

    def merge(self, known: ActiveLoad, news: ActiveLoad) -> ActiveLoad:
        """`news`, and what it leaves unsaid as it was."""
        decode, prefill, used = news.active_decode_blocks, news.active_prefill_tokens, news.kv_used_blocks
        return ActiveLoad(
            worker_id=news.worker_id,
            dp_rank=news.dp_rank,
            active_decode_blocks=known.active_decode_blocks if decode is None else decode,
            active_prefill_tokens=known.active_prefill_tokens if prefill is None else prefill,
            kv_used_blocks=known.kv_used_blocks if used is None else used,
        )

    def is_over(self, load: ActiveLoad, capacity: KvCapacity, threshold: Thresholds, was_over: bool) -> bool:
        return any(value > limit for _, value, limit in _signals(load, capacity, threshold))

    def excess(self, load: ActiveLoad, capacity: KvCapacity, threshold: Thresholds) -> float:
        """The largest multiple of a limit; 0 where nothing is known."""
        return max((_multiple(value, limit) for _, value, limit in _signals(load, capacity, threshold)), default=0.0)

    def reason(self, load: ActiveLoad, capacity: KvCapacity, threshold: Thresholds) -> str:
        """The limit that is exceeded most, and the value; "" where nothing is known."""
        signals = list(_signals(load, capacity, threshold))
        if not signals:
            return ""
        name, value, limit = max(signals, key=lambda signal: _multiple(signal[1], signal[2]))
        return f"{name} {value} is over {limit:.10g}{_origin(name, limit, capacity, threshold)}"


def _signals(load: ActiveLoad, capacity: KvCapacity, threshold: Thresholds) -> Iterator[tuple[str, int, float]]:
    """Each signal that is known and has a limit: its name, value, limit."""
    part, total = threshold.active_decode_blocks_threshold, capacity.total_kv_blocks
    if part is not None and total is not None:
        if load.kv_used_blocks is not None:
            yield "kv_used_blocks", load.kv_used_blocks, part * total
        if load.active_decode_blocks is not None:
            yield "active_decode_blocks", load.active_decode_blocks, part * total
    prefill = load.active_prefill_tokens
    if prefill is not None:
        if threshold.active_prefill_tokens_threshold is not None:
            yield "active_prefill_tokens", prefill, threshold.active_prefill_tokens_threshold
        if threshold.active_prefill_tokens_threshold_frac is not None:
            yield "active_prefill_tokens", prefill, _tokens_of_steps(threshold.active_prefill_tokens_threshold_frac, capacity)


def _tokens_of_steps(steps: float, capacity: KvCapacity) -> int:
    batch = capacity.max_num_batched_tokens
    return max(0, int(steps * (_BATCH_UNKNOWN if batch is None else batch)))


def _origin(name: str, limit: float, capacity: KvCapacity, threshold: Thresholds) -> str:
    """Where a limit comes from, in brackets; "" if it was said as it is."""
    if name != "active_prefill_tokens":
        return f" ({threshold.active_decode_blocks_threshold:g} of {capacity.total_kv_blocks} blocks)"
    steps = threshold.active_prefill_tokens_threshold_frac
    if steps is None or limit != _tokens_of_steps(steps, capacity):
        return ""
    return f" ({steps:g} × max_num_batched_tokens)"


def _multiple(value: int, limit: float) -> float:
    """`value` in units of `limit`."""
    if limit > 0:
        return value / limit
    return math.inf if value > 0 else 0.0
