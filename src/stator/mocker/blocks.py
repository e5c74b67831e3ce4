"""The KV cache of one simulated rank: blocks in use, blocks that may be used again, and which of them go first.

A *named* block is full and known by its hash, so that another sequence with the same beginning can use it. A *loose* block has no
name: it is not full yet, or prefix caching is off. The contents exist nowhere; this is bookkeeping.
"""

from heapq import heapify, heappop, heappush

import msgspec

__all__ = ["Block", "BlockChange", "BlockPool", "Removed", "Stored"]


class Block:
    """A named block. `users` sequences hold it; `children` named blocks continue it."""

    __slots__ = ("children", "hash", "parent", "released", "users")

    def __init__(self, hash: int, parent: "Block | None") -> None:
        self.hash = hash
        self.parent = parent
        self.users = 1
        self.children = 0
        self.released = 0
        """when the last user left, on the pool's own count"""


class Stored(msgspec.Struct, frozen=True):
    """Blocks got their names: a chain in order, the blocks `first`, `first + 1` … of `owner` (a `Sequence`)."""

    hashes: list[int]
    parent_hash: int | None
    owner: object
    first: int


class Removed(msgspec.Struct, frozen=True):
    """Blocks were evicted, in this order."""

    hashes: list[int]


BlockChange = Stored | Removed


class BlockPool:
    """`capacity` blocks, each empty, in use, or reusable: named and held by nobody.

    Reusable blocks are evicted when no empty one is left: of those that nothing continues, the one whose last user left first
    (`spec/50 §23.3`). So a chain goes from its end.
    """

    def __init__(self, capacity: int, *, record: bool = False) -> None:
        """With `record` the changes of the cache's content are kept until `take_changes`; otherwise there are none."""
        self.capacity = capacity
        self.used = 0
        """blocks held by at least one sequence; one that several hold counts once"""
        self._named: dict[int, Block] = {}
        self._reusable = 0
        self._leaves: list[tuple[int, int, Block]] = []
        """a heap of (released, hash, block), with entries of blocks that are in use again"""
        self._releases = 0
        self._record = record
        self._changes: list[BlockChange] = []

    @property
    def free(self) -> int:
        """Blocks that can be had: empty or reusable."""
        return self.capacity - self.used

    @property
    def reusable(self) -> int:
        """Named blocks that nobody holds."""
        return self._reusable

    def find(self, hash: int) -> Block | None:
        """The block of that name, in use or reusable."""
        return self._named.get(hash)

    def chain(self, hashes: list[int]) -> list[Block]:
        """The longest beginning of `hashes` whose blocks are all here."""
        found: list[Block] = []
        named = self._named
        for hash in hashes:
            block = named.get(hash)
            if block is None:
                break
            found.append(block)
        return found

    def reserve(self, count: int) -> bool:
        """See that `count` blocks are empty, by eviction. False: there are not that many, and all that were reusable are gone."""
        missing = count - (self.capacity - self.used - self._reusable)
        if missing > 0 and self._reusable:
            missing -= self._evict(missing)
        return missing <= 0

    def take(self, count: int) -> None:
        """Use `count` empty blocks, loose. They must have been reserved."""
        self.used += count

    def drop(self, count: int) -> None:
        """`count` loose blocks are empty again."""
        self.used -= count

    def name(self, hash: int, parent: Block | None) -> Block:
        """One loose block in use has this name from now on. There must be no other of that name."""
        block = self._named[hash] = Block(hash, parent)
        if parent is not None:
            parent.children += 1
        return block

    def hold(self, block: Block) -> None:
        """One more user."""
        if not block.users:
            self._reusable -= 1
            self.used += 1
        block.users += 1

    def release(self, blocks: list[Block]) -> None:
        """One user of a whole chain left. Its end is reusable before its beginning."""
        for block in reversed(blocks):
            block.users -= 1
            if not block.users:
                self.used -= 1
                self._reusable += 1
                self._releases += 1
                block.released = self._releases
                if not block.children:
                    self._add_leaf(block)

    def stored(self, blocks: list[Block], first: int, owner: object) -> None:
        """Record that `blocks[first:]` were named."""
        if self._record:
            parent = blocks[first - 1].hash if first else None
            self._changes.append(Stored([block.hash for block in blocks[first:]], parent, owner, first))

    def take_changes(self) -> list[BlockChange]:
        """What was recorded since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def _evict(self, count: int) -> int:
        """Evict up to `count` blocks; how many it were."""
        gone: list[int] = []
        while len(gone) < count and self._leaves:
            released, _, block = heappop(self._leaves)
            if block.users or block.released != released:
                continue  # was used again since
            del self._named[block.hash]
            self._reusable -= 1
            gone.append(block.hash)
            parent = block.parent
            if parent is not None:
                parent.children -= 1
                if not parent.children and not parent.users:
                    self._add_leaf(parent)
        if self._record and gone:
            self._changes.append(Removed(gone))
        return len(gone)

    def _add_leaf(self, block: Block) -> None:
        leaves = self._leaves
        heappush(leaves, (block.released, block.hash, block))
        if len(leaves) > 2 * self._reusable + 64:  # mostly entries that no longer hold
            leaves[:] = [entry for entry in leaves if not entry[2].users and entry[2].released == entry[0]]
            heapify(leaves)
