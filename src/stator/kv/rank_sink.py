"""What an engine says of one rank's cache, made into changes in the engine's own thread."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

from stator.kv.batching import Change
from stator.kv.events import TIERS, BlockMedia, RemovedBlocks, StoredBlock, StoredBlocks, Tier, unsigned
from stator.kv.hashing import local_hashes

__all__ = ["ChangeQueue", "RankSink"]


class ChangeQueue(Protocol):
    """Where changes go. Any thread may call."""

    def offer(self, change: Change) -> None:
        """Queue a change, or drop it."""
        ...

    def reject(self, error: Exception) -> None:
        """Count what no change could be made of."""
        ...

    def suspect(self, needed: int, given: int) -> None:
        """Count a stored event that has fewer tokens than its blocks need."""
        ...


class RankSink:
    """Implements `KvEventSink` for one rank."""

    __slots__ = ("_block_size", "_dp_rank", "_queue")

    def __init__(self, queue: ChangeQueue, *, dp_rank: int, block_size: int) -> None:
        self._queue = queue
        self._dp_rank = dp_rank
        self._block_size = block_size

    def stored(
        self,
        *,
        token_ids: Sequence[int],
        block_hashes: Sequence[int],
        parent_hash: int | None = None,
        lora_name: str | None = None,
        tier: str = "device",
        media: Sequence[BlockMedia | None] | None = None,
    ) -> None:
        """See `KvEventSink`."""
        try:
            needed = len(block_hashes) * self._block_size
            if len(token_ids) < needed:
                self._queue.suspect(needed, len(token_ids))
            blocks = _blocks(token_ids[:needed], block_hashes, self._block_size, lora_name, media)
            parent = None if parent_hash is None else unsigned(parent_hash)
            self._offer(tier, StoredBlocks(parent_hash=parent, blocks=blocks))
        except Exception as error:  # the engine's thread must not fail for what it reports
            self._queue.reject(error)

    def removed(self, block_hashes: Sequence[int], *, tier: str = "device") -> None:
        """See `KvEventSink`."""
        try:
            if len(block_hashes):
                self._offer(tier, RemovedBlocks(block_hashes=[unsigned(one) for one in block_hashes]))
        except Exception as error:
            self._queue.reject(error)

    def cleared(self) -> None:
        """See `KvEventSink`."""
        self._offer("device", None)

    def _offer(self, tier: str, data: StoredBlocks | RemovedBlocks | None) -> None:
        if tier not in TIERS:
            raise ValueError(f"a storage tier is one of {', '.join(sorted(TIERS))}, got {tier!r}")
        self._queue.offer(Change(dp_rank=self._dp_rank, tier=cast(Tier, tier), data=data))


def _blocks(
    token_ids: Sequence[int],
    block_hashes: Sequence[int],
    block_size: int,
    lora_name: str | None,
    media: Sequence[BlockMedia | None] | None,
) -> list[StoredBlock]:
    """As many as have their tokens."""
    if not media:
        tokens = local_hashes(token_ids, block_size=block_size, lora_name=lora_name)
        return [
            StoredBlock(block_hash=unsigned(name), tokens_hash=one) for name, one in zip(block_hashes, tokens, strict=False)
        ]
    hashes = [[each.mm_hash for each in one.mm_objects] if one else None for one in media]
    tokens = local_hashes(token_ids, block_size=block_size, lora_name=lora_name, mm_hashes=hashes)
    padded: list[Any] = [*media, *[None] * len(tokens)]
    return [
        StoredBlock(block_hash=unsigned(name), tokens_hash=one, mm_extra_info=info)
        for name, one, info in zip(block_hashes, tokens, padded, strict=False)
    ]
