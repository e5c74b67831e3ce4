"""Which blocks a sequence holds: named ones at its beginning, loose ones after them."""

from stator.mocker.blocks import Block, BlockPool
from stator.mocker.sequence import Sequence

__all__ = ["Holdings"]


class Holdings:
    """Takes blocks from a pool for sequences, and gives them back. Without prefix caching all blocks stay loose."""

    def __init__(self, pool: BlockPool, *, block_size: int, prefix_caching: bool) -> None:
        self._pool = pool
        self._block_size = block_size
        self._prefix_caching = prefix_caching

    def share(self, sequence: Sequence, blocks: list[Block]) -> None:
        """A sequence without blocks begins with these, found in the pool."""
        for block in blocks:
            self._pool.hold(block)
        sequence.blocks.extend(blocks)

    def extend(self, sequence: Sequence, length: int) -> bool:
        """Take the blocks for the first `length` tokens, which are computed in this pass, and name the full ones.

        Blocks that are there already are shared. False: there are not enough; none is taken then but those, and reusable blocks are gone.
        """
        pool, size, blocks = self._pool, self._block_size, sequence.blocks
        needed = -(-length // size)
        if not self._prefix_caching:
            return self._take(sequence, needed - sequence.loose)
        full = length // size
        if sequence.loose and full > len(blocks):
            self._name_last(sequence)
        first = len(blocks)
        if not sequence.loose:
            while first < full and (block := pool.find(sequence.hash_at(first))) is not None:
                pool.hold(block)
                blocks.append(block)
                first += 1
        if not self._take(sequence, needed - first - sequence.loose):
            return False
        if first < full:
            for index in range(first, full):
                blocks.append(pool.name(sequence.hash_at(index), blocks[-1] if blocks else None))
            sequence.loose -= full - first
            pool.stored(blocks, first, sequence)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Take a block for a token after full ones, the last of which gets its name. False: there is none left."""
        if sequence.loose and self._prefix_caching:
            self._name_last(sequence)
        return self._take(sequence, 1)

    def release(self, sequence: Sequence) -> None:
        """Give everything back."""
        self._pool.drop(sequence.loose)
        sequence.loose = 0
        if sequence.blocks:
            self._pool.release(sequence.blocks)
            sequence.blocks = []

    def _take(self, sequence: Sequence, count: int) -> bool:
        """`count` loose blocks, or none if there are fewer."""
        if count > 0:
            if not self._pool.reserve(count):
                return False
            self._pool.take(count)
            sequence.loose += count
        return True

    def _name_last(self, sequence: Sequence) -> None:
        """The loose block after the named ones is full. If another sequence has made the same one, that is shared."""
        pool, blocks = self._pool, sequence.blocks
        name = sequence.hash_at(len(blocks))
        sequence.loose -= 1
        block = pool.find(name)
        if block is not None:
            pool.drop(1)
            pool.hold(block)
            blocks.append(block)
        else:
            blocks.append(pool.name(name, blocks[-1] if blocks else None))
            pool.stored(blocks, len(blocks) - 1, sequence)
