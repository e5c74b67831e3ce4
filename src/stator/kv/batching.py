"""Several changes of a cache in one event, where a reader cannot tell the difference (`spec/40 §4.2`)."""

import msgspec

from stator.kv.events import RemovedBlocks, StoredBlocks, Tier

__all__ = ["Batch", "Change"]

_MOST_BLOCKS = 4096
"""in one event, so that a message stays below about 400 kB"""


class Change(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an engine reported, without a number yet. `data` None: the cache is empty. Its lists belong to whoever has the change."""

    dp_rank: int
    tier: Tier
    data: StoredBlocks | RemovedBlocks | None

    @property
    def blocks(self) -> int:
        """How many blocks it names."""
        if self.data is None:
            return 0
        return len(self.data.blocks) if isinstance(self.data, StoredBlocks) else len(self.data.block_hashes)


class Batch:
    """Holds back one change and merges what follows: stores that continue its chain, or removals beside removals.

    Only of the same rank and tier, and only in the order they came.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: Change | None = None

    def add(self, change: Change) -> Change | None:
        """Merge or hold `change`. Returns what was held before, if it could not be merged and is complete now."""
        held = self._held
        if held is not None and _merge(held, change):
            return None
        self._held = change
        return held

    def take(self) -> Change | None:
        """What is held; nothing is afterwards."""
        held, self._held = self._held, None
        return held


def _merge(held: Change, change: Change) -> bool:
    """Whether `change` went into `held`."""
    if held.dp_rank != change.dp_rank or held.tier != change.tier or held.blocks + change.blocks > _MOST_BLOCKS:
        return False
    match held.data, change.data:
        case StoredBlocks(blocks=before), StoredBlocks(blocks=after, parent_hash=parent) if before:
            if before[-1].block_hash != parent:
                return False
            before.extend(after)
        case RemovedBlocks(block_hashes=before), RemovedBlocks(block_hashes=after):
            before.extend(after)
        case _:
            return False
    return True
