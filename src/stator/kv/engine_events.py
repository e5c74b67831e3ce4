"""KV events as vLLM and SGLang publish them: reading a batch, and telling it on (`spec/40 §4.3`)."""

import logging
from typing import Protocol

import msgspec

from stator.kv.events import Tier
from stator.kv.sources import KvEventSink

__all__ = ["EngineEvents", "EngineStatistics", "RankedSink"]

logger = logging.getLogger(__name__)

_MOST_RANKS = 1024
_TIERS: dict[str | None, Tier] = {
    None: "device",
    "GPU": "device",
    "DEVICE": "device",
    "CPU": "host_pinned",
    "CPU_PINNED": "host_pinned",
    "CPU_TIER1": "host_pinned",
    "CPU_TIER2": "disk",
    "DISK": "disk",
    "NVME": "disk",
    "STORAGE": "disk",
    "EXTERNAL": "external",
    "NETWORK": "external",
    "REMOTE": "external",
    "SHARED": "external",
}
_WHOLE_PREFIX = frozenset((None, "full_attention", "mla_attention", "sink_full_attention"))
"""kinds of cache whose blocks stand for all tokens before them; other groups of a hybrid model hold windows or states"""


class RankedSink(KvEventSink, Protocol):
    """A publisher that can speak for other ranks as well."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        ...

    def for_rank(self, dp_rank: int) -> KvEventSink: ...


class EngineStatistics(msgspec.Struct):
    """Since the start, written by `EngineEvents` and `follow_engine_socket`."""

    batches: int = 0
    stored: int = 0
    removed: int = 0
    cleared: int = 0
    malformed: int = 0
    """messages, batches and events that could not be read"""
    filtered: int = 0
    """events of caches that say nothing about prefixes, of unknown storage, or of blocks of another size"""
    gaps: int = 0
    """batches that the engine sent and we did not get"""
    restarts: int = 0
    """the engine's sequence went back: it began anew, with an empty cache"""


class _Stored(msgspec.Struct, gc=False):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None


class _StoredList(_Stored, array_like=True, tag="BlockStored", gc=False):
    pass


class _StoredMap(_Stored, tag="BlockStored", tag_field="type", gc=False):
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _Removed(msgspec.Struct, gc=False):
    block_hashes: list[int]
    medium: str | None = None


class _RemovedList(_Removed, array_like=True, tag="BlockRemoved", gc=False):
    pass


class _RemovedMap(_Removed, tag="BlockRemoved", tag_field="type", gc=False):
    group_idx: int | None = None


class _ClearedList(msgspec.Struct, array_like=True, tag="AllBlocksCleared", gc=False):
    pass


class _ClearedMap(msgspec.Struct, tag="AllBlocksCleared", tag_field="type", gc=False):
    pass


class _Batch(msgspec.Struct, array_like=True, gc=False):
    timestamp: float
    events: list[msgspec.Raw]
    dp_rank: int | None = None


_batch = msgspec.msgpack.Decoder(_Batch)
_lists = msgspec.msgpack.Decoder(_StoredList | _RemovedList | _ClearedList)
_maps = msgspec.msgpack.Decoder(_StoredMap | _RemovedMap | _ClearedMap)


class EngineEvents:
    """Reads the batches of one engine and tells a sink. What cannot be read is counted, logged the first time and left out.

    A batch that names a rank speaks for that rank, whatever the sink's own is. Hashes must be whole numbers.
    """

    def __init__(self, sink: RankedSink, *, dp_rank: int, statistics: EngineStatistics) -> None:
        self._sink = sink
        self._dp_rank = dp_rank
        self._statistics = statistics
        self._other_ranks: dict[int, KvEventSink] = {}
        self._filtered_groups: set[int] = set()

    def tell(self, payload: bytes) -> None:
        """One batch: `[timestamp, [event …], rank or nil]`, events as arrays or as maps. Never raises."""
        try:
            batch = _batch.decode(payload)
            sink = self._sink_of(batch.dp_rank)
        except (msgspec.MsgspecError, ValueError) as error:
            return self.malformed(f"a batch of KV events cannot be read: {error}")
        self._statistics.batches += 1
        for raw in batch.events:
            try:
                event = (_lists if _is_list(raw) else _maps).decode(raw)
            except msgspec.MsgspecError as error:
                self.malformed(f"a KV event of the engine cannot be read: {error}")
            else:
                self._tell_one(event, sink)
        return None

    def cleared(self) -> None:
        """The engine began anew."""
        self._sink.cleared()
        for sink in self._other_ranks.values():
            sink.cleared()

    def malformed(self, complaint: str) -> None:
        """Count it, and log the first one."""
        self._statistics.malformed += 1
        if self._statistics.malformed == 1:
            logger.warning("%s; it is left out, as will be others like it", complaint)

    def _sink_of(self, dp_rank: int | None) -> KvEventSink:
        if dp_rank is None or dp_rank == self._dp_rank:
            return self._sink
        if not 0 <= dp_rank < _MOST_RANKS:
            raise ValueError(f"rank {dp_rank} is not from 0 to {_MOST_RANKS - 1}")
        if dp_rank not in self._other_ranks:
            self._other_ranks[dp_rank] = self._sink.for_rank(dp_rank)
        return self._other_ranks[dp_rank]

    def _tell_one(self, event: object, sink: KvEventSink) -> None:
        match event:
            case _Stored():
                if self._wants(event):
                    self._statistics.stored += 1
                    sink.stored(
                        token_ids=event.token_ids,
                        block_hashes=event.block_hashes,
                        parent_hash=event.parent_block_hash,
                        lora_name=event.lora_name,
                        tier=_TIERS[event.medium],
                    )
            case _Removed():
                if event.medium not in _TIERS or (isinstance(event, _RemovedMap) and event.group_idx in self._filtered_groups):
                    self._filter(f"blocks in {event.medium}")
                else:
                    self._statistics.removed += 1
                    sink.removed(event.block_hashes, tier=_TIERS[event.medium])
            case _:
                self._statistics.cleared += 1
                sink.cleared()

    def _wants(self, event: _Stored) -> bool:
        """Whether a stored event says something about prefixes, in our blocks."""
        if isinstance(event, _StoredMap) and event.kv_cache_spec_kind not in _WHOLE_PREFIX:
            if event.group_idx is not None and len(self._filtered_groups) < _MOST_RANKS:
                self._filtered_groups.add(event.group_idx)
            return self._filter(f"a cache of kind {event.kv_cache_spec_kind}")
        if event.medium not in _TIERS:
            return self._filter(f"blocks in {event.medium}")
        if event.block_size != self._sink.block_size:
            return self._filter(f"blocks of {event.block_size} tokens where the model card says {self._sink.block_size}")
        return True

    def _filter(self, what: str) -> bool:
        self._statistics.filtered += 1
        if self._statistics.filtered == 1:
            logger.warning("KV events about %s are left out", what)
        return False


def _is_list(raw: msgspec.Raw) -> bool:
    """Whether a msgpack value begins as an array."""
    first = memoryview(raw)[0]
    return first & 0xF0 == 0x90 or first in (0xDC, 0xDD)
