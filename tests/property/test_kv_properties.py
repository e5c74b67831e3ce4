"""KV events: encoding loses nothing, and merging changes nothing that a reader could tell."""

from hypothesis import given
from hypothesis import strategies as st

from stator.kv.batching import Batch, Change
from stator.kv.events import (
    BlockMedia,
    EventData,
    KvEvent,
    MediaObject,
    RemovedBlocks,
    RouterEvent,
    StoredBlock,
    StoredBlocks,
    Tier,
    decode_router_event,
    encode_router_event,
)
from stator.kv.hashing import local_hashes, sequence_hashes

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
tiers = st.sampled_from(("device", "host_pinned", "disk", "external"))
media = st.builds(
    BlockMedia, mm_objects=st.lists(st.builds(MediaObject, mm_hash=u64, offsets=st.lists(st.tuples(u32, u32), max_size=2)))
)
blocks = st.builds(StoredBlock, block_hash=u64, tokens_hash=u64, mm_extra_info=st.none() | media)
stored = st.builds(
    StoredBlocks, parent_hash=st.none() | u64, start_position=st.none() | u32, blocks=st.lists(blocks, max_size=3)
)
removed = st.builds(RemovedBlocks, block_hashes=st.lists(u64, max_size=3))
data = st.just("cleared") | st.builds(EventData, stored=stored) | st.builds(EventData, removed=removed)
events = st.builds(
    RouterEvent, worker_id=u64, storage_tier=tiers, event=st.builds(KvEvent, event_id=u64, data=data, dp_rank=u32)
)


@given(events)
def test_events_survive_the_wire(event: RouterEvent) -> None:
    assert decode_router_event(encode_router_event(event)) == event


class Reader:
    """What a reader of the events knows: the parent of each block, per rank and tier."""

    def __init__(self) -> None:
        self.parents: dict[tuple[int, str, int], int | None] = {}
        self.blocks = 0

    def take(self, change: Change) -> None:
        where = (change.dp_rank, change.tier)
        match change.data:
            case None:
                self.parents.clear()
            case RemovedBlocks(block_hashes=names):
                for name in names:
                    self.parents.pop((*where, name), None)
            case StoredBlocks(blocks=chain, parent_hash=parent):
                self.blocks += len(chain)
                for block in chain:
                    self.parents[*where, block.block_hash] = parent
                    parent = block.block_hash


names = st.integers(1, 5)


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Of few blocks, so that they often continue each other."""
    kind = draw(st.sampled_from(("stored", "stored", "removed", "cleared")))
    content: StoredBlocks | RemovedBlocks | None = None
    if kind == "stored":
        chain = [StoredBlock(block_hash=name, tokens_hash=name) for name in draw(st.lists(names, max_size=3))]
        content = StoredBlocks(parent_hash=draw(st.none() | names), blocks=chain)
    elif kind == "removed":
        content = RemovedBlocks(block_hashes=draw(st.lists(names, min_size=1, max_size=3)))
    tier: Tier = draw(st.sampled_from(("device", "disk")))
    return Change(dp_rank=draw(st.integers(0, 1)), tier=tier, data=content)


@given(st.lists(changes(), max_size=30))
def test_merging_changes_nothing_for_a_reader(reported: list[Change]) -> None:
    plain, merged, batch = Reader(), Reader(), Batch()
    for change in reported:
        plain.take(change)
    for change in reported:
        if (complete := batch.add(change)) is not None:
            merged.take(complete)
    if (last := batch.take()) is not None:
        merged.take(last)
    assert merged.parents == plain.parents
    assert merged.blocks == plain.blocks
    assert batch.take() is None


@given(st.lists(u32, max_size=60), st.integers(1, 9), st.integers(0, 10))
def test_a_prefix_has_the_hashes_of_the_whole(tokens: list[int], block_size: int, cut: int) -> None:
    whole = local_hashes(tokens, block_size=block_size)
    part = local_hashes(tokens[: cut * block_size], block_size=block_size)
    assert whole[: len(part)] == part
    assert sequence_hashes(whole)[: len(part)] == sequence_hashes(part)
