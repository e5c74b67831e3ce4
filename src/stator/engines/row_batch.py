"""Key-value caches of several sequences in one set of tensors, so that one forward pass serves them all."""

# pyright: basic, reportMissingImports=false
# torch and transformers belong to an extra (absent where types are checked) and are largely untyped.

from typing import Any

import torch
from torch.nn.functional import pad

from stator.engines.sequence import Sequence

__all__ = ["RowBatch"]


class RowBatch:
    """Row i of every tensor is `rows[i]`; shorter rows are padded on the left and masked.

    `cache` is a transformers `Cache`: `cache.layers[n].keys` and `.values` have the shape [rows, heads, width, head size].
    `stored[i]` counts the tokens of row i that are in the cache: all but its last one, which the next step feeds. `width`
    is the largest of them.
    """

    __slots__ = ("cache", "rows", "stored")

    def __init__(self, cache: Any, row: Sequence) -> None:
        self.cache = cache
        self.rows = [row]
        self.stored = [len(row.tokens)]

    @property
    def width(self) -> int:
        return max(self.stored)

    def accepts(self, length: int) -> bool:
        """Whether a row of `length` tokens may join without padding growing beyond what is really stored (plus a little)."""
        width = max(self.width, length)
        rows = len(self.rows) + 1
        return width * rows <= 2 * (sum(self.stored) + length) + 64 * rows

    def join(self, other: "RowBatch") -> None:
        """Take over the rows of `other`, which is empty afterwards. Costs one copy of both caches."""
        mine, width = self.width, max(self.width, other.width)
        for ours, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            if ours.keys is None:  # a layer that uses the cache of another one
                continue
            ours.keys = torch.cat([_widen(ours.keys, width - mine), _widen(theirs.keys, width - other.width)])
            ours.values = torch.cat([_widen(ours.values, width - mine), _widen(theirs.values, width - other.width)])
        self.rows += other.rows
        self.stored += other.stored
        other.rows, other.stored = [], []

    def keep(self, indices: list[int]) -> None:
        """Forget all rows but these (at least one), and the padding that nobody needs any more."""
        before = self.width
        self.rows = [self.rows[i] for i in indices]
        self.stored = [self.stored[i] for i in indices]
        surplus = before - self.width
        for layer in self.cache.layers:
            if layer.keys is None:
                continue
            chosen = torch.tensor(indices, device=layer.keys.device)
            layer.keys = layer.keys.index_select(0, chosen)[:, :, surplus:]
            layer.values = layer.values.index_select(0, chosen)[:, :, surplus:]

    def mask(self, device: Any) -> torch.Tensor:
        """1 for stored tokens and the one about to be fed, 0 for padding: int64 [rows, width + 1]."""
        places = torch.arange(self.width + 1, device=device)
        starts = torch.tensor([self.width - stored for stored in self.stored], device=device)
        return (places >= starts[:, None]).long()

    def advance(self) -> None:
        """Each row's last token went into the cache."""
        self.stored = [stored + 1 for stored in self.stored]


def _widen(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """`by` more places on the left of dimension 2."""
    return pad(tensor, (0, 0, by, 0)) if by else tensor
