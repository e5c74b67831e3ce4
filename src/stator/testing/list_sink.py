"""Where KV events end in tests."""

from collections.abc import Sequence
from typing import Any

__all__ = ["ListSink"]


class ListSink:
    """A KV event sink that writes down what it is told, the rank first; `for_rank` writes into the same list."""

    def __init__(self, told: list[Any] | None = None, *, dp_rank: int = 0, block_size: int = 4) -> None:
        self.told: list[Any] = [] if told is None else told
        self.dp_rank = dp_rank
        self._block_size = block_size

    @property
    def block_size(self) -> int:
        return self._block_size

    def for_rank(self, dp_rank: int) -> "ListSink":
        return ListSink(self.told, dp_rank=dp_rank, block_size=self._block_size)

    def stored(
        self,
        *,
        token_ids: Sequence[int],
        block_hashes: Sequence[int],
        parent_hash: int | None = None,
        lora_name: str | None = None,
        tier: str = "device",
    ) -> None:
        self.told.append((self.dp_rank, "stored", list(block_hashes), parent_hash, list(token_ids), lora_name, tier))

    def removed(self, block_hashes: Sequence[int], *, tier: str = "device") -> None:
        self.told.append((self.dp_rank, "removed", list(block_hashes), tier))

    def cleared(self) -> None:
        self.told.append((self.dp_rank, "cleared"))
