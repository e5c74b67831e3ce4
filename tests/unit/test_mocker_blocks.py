"""Blocks in use, reusable blocks, and which of them go first."""

from stator.mocker.blocks import Block, BlockPool, Removed, Stored


def chain(pool: BlockPool, *names: int, after: list[Block] | None = None) -> list[Block]:
    """A sequence that holds new blocks of these names, after `after`."""
    blocks = list(after or [])
    for block in blocks:
        pool.hold(block)
    for name in names:
        assert pool.reserve(1)
        pool.take(1)
        blocks.append(pool.name(name, blocks[-1] if blocks else None))
    return blocks


def kept(pool: BlockPool, *names: int) -> set[int]:
    return {name for name in names if pool.find(name) is not None}


def test_blocks_are_empty_in_use_or_reusable() -> None:
    pool = BlockPool(4)
    blocks = chain(pool, 1, 2)
    pool.take(1)
    assert (pool.used, pool.reusable, pool.free) == (3, 0, 1)
    pool.release(blocks)
    pool.drop(1)
    assert (pool.used, pool.reusable, pool.free) == (0, 2, 4)
    assert kept(pool, 1, 2, 3) == {1, 2}


def test_a_block_that_two_hold_counts_once() -> None:
    pool = BlockPool(4)
    first = chain(pool, 1, 2)
    second = chain(pool, 3, after=pool.chain([1]))
    assert pool.used == 3
    pool.release(first)
    assert (pool.used, pool.reusable) == (2, 1)
    pool.release(second)
    assert (pool.used, pool.reusable) == (0, 3)


def test_a_chain_ends_where_a_block_is_missing() -> None:
    pool = BlockPool(4)
    chain(pool, 1, 2)
    assert [block.hash for block in pool.chain([1, 2, 7])] == [1, 2]
    assert pool.chain([7, 1]) == []


def test_nothing_is_evicted_while_blocks_are_empty() -> None:
    pool = BlockPool(3)
    pool.release(chain(pool, 1, 2))
    assert pool.reserve(1)
    assert pool.reusable == 2


def test_the_end_of_a_chain_goes_first() -> None:
    pool = BlockPool(3)
    pool.release(chain(pool, 1, 2, 3))
    for left in ({1, 2}, {1}, set[int]()):
        pool.take(1 if pool.reserve(1) else 0)
        assert kept(pool, 1, 2, 3) == left


def test_of_two_ends_the_one_released_first_goes_first() -> None:
    pool = BlockPool(4)
    old, new = chain(pool, 1, 2), chain(pool, 3, 4)
    pool.release(new)
    pool.release(old)
    pool.reserve(1)
    assert kept(pool, 1, 2, 3, 4) == {1, 2, 3}
    pool.take(1)
    pool.reserve(1)
    assert kept(pool, 1, 2, 3, 4) == {1, 2}, "the rest of the older chain was released before the other one"


def test_using_a_block_again_makes_it_young() -> None:
    pool = BlockPool(2)
    for name in (1, 2):
        pool.release(chain(pool, name))
    pool.release(chain(pool, after=pool.chain([1])))
    pool.reserve(1)
    assert kept(pool, 1, 2) == {1}


def test_a_branch_keeps_its_root() -> None:
    pool = BlockPool(3)
    root = chain(pool, 1)
    pool.release(chain(pool, 2, after=root))
    pool.release(chain(pool, 3, after=root))
    pool.release(root)
    pool.reserve(2)
    assert kept(pool, 1, 2, 3) == {1}


def test_blocks_in_use_are_not_evicted() -> None:
    pool = BlockPool(3)
    held = chain(pool, 1)
    pool.release(chain(pool, 2, after=held))
    assert pool.reserve(2)
    assert not pool.reserve(3)
    assert kept(pool, 1, 2) == {1}


def test_a_reservation_that_fails_has_evicted_what_there_was() -> None:
    pool = BlockPool(3)
    pool.take(1)
    pool.release(chain(pool, 1, 2))
    assert not pool.reserve(3)
    assert (pool.reusable, pool.used) == (0, 1)


def test_changes_are_told_in_order() -> None:
    pool = BlockPool(2, record=True)
    blocks = chain(pool, 1, 2)
    pool.stored(blocks, 0, "a")
    pool.release(blocks)
    pool.reserve(1)
    pool.take(1)
    again = [*pool.chain([1]), pool.name(3, blocks[0])]
    pool.stored(again, 1, "b")
    assert pool.take_changes() == [Stored([1, 2], None, "a", 0), Removed([2]), Stored([3], 1, "b", 1)]
    assert pool.take_changes() == []


def test_nothing_is_recorded_that_nobody_takes() -> None:
    pool = BlockPool(2)
    blocks = chain(pool, 1)
    pool.stored(blocks, 0, None)
    assert pool.take_changes() == []


def test_using_one_prompt_a_hundred_thousand_times_costs_no_memory() -> None:
    pool = BlockPool(4)
    pool.release(chain(pool, 1, 2))
    for _ in range(100_000):
        pool.release(chain(pool, after=pool.chain([1, 2])))
    assert len(pool._leaves) < 200  # pyright: ignore[reportPrivateUsage]  # the list that could grow
    assert pool.reserve(4)
