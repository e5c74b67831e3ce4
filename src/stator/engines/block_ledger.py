"""Who holds how many KV blocks. Numbers only: the memory itself belongs to the model."""

from stator.engines.sequence import Sequence

__all__ = ["BlockLedger"]


class BlockLedger:
    """`total` blocks of `block_size` tokens. Written by one thread; `used` may be read by any.

    A sequence holds the blocks that its tokens fill or begin to fill.
    """

    def __init__(self, *, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self.used = 0
        self._held: dict[Sequence, int] = {}

    def needed(self, tokens: int) -> int:
        """Blocks for that many tokens."""
        return -(-tokens // self.block_size)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Let a sequence hold blocks for `tokens` tokens, if there are as many; otherwise nothing changes."""
        more = self.needed(tokens) - self._held.get(sequence, 0)
        if more > self.total - self.used:
            return False
        if more > 0:
            self._held[sequence] = self._held.get(sequence, 0) + more
            self.used += more
        return True

    def free(self, sequence: Sequence) -> None:
        """Take back all that a sequence holds; harmless if that is nothing."""
        self.used -= self._held.pop(sequence, 0)
