"""Batches of KV events as engines pack them, told to a sink."""

from typing import Any

import msgspec
import pytest

from stator.kv.engine_events import EngineEvents, EngineStatistics
from stator.testing.list_sink import ListSink

pack = msgspec.msgpack.encode


class Stage:
    def __init__(self, *, dp_rank: int = 0) -> None:
        self.sink = ListSink(dp_rank=dp_rank)
        self.statistics = EngineStatistics()
        self.events = EngineEvents(self.sink, dp_rank=dp_rank, statistics=self.statistics)

    def tell(self, *events: Any, rank: Any = None, time: Any = 1.5) -> list[Any]:
        """One batch; what came of it."""
        before = len(self.sink.told)
        self.events.tell(pack([time, list(events), rank]))
        return self.sink.told[before:]


STORED = {
    "type": "BlockStored",
    "block_hashes": [111, -222],
    "parent_block_hash": -5,
    "token_ids": [1, 2, 3, 4, 5, 6, 7, 8],
    "block_size": 4,
    "lora_id": None,
}
TOLD = (0, "stored", [111, -222], -5, [1, 2, 3, 4, 5, 6, 7, 8], None, "device")


@pytest.mark.parametrize(
    "event",
    [
        ["BlockStored", [111, -222], -5, [1, 2, 3, 4, 5, 6, 7, 8], 4, None],
        ["BlockStored", [111, -222], -5, [1, 2, 3, 4, 5, 6, 7, 8], 4, None, "GPU"],
        ["BlockStored", [111, -222], -5, [1, 2, 3, 4, 5, 6, 7, 8], 4, 3, "GPU", None, None, 0],
        STORED,
        STORED | {"medium": "GPU", "lora_name": None, "extra_keys": [None, None], "group_idx": 0},
        STORED | {"kv_cache_spec_kind": "full_attention", "group_idx": 1, "session_id": "s"},
    ],
)
def test_stored_blocks_in_every_form(event: Any) -> None:
    stage = Stage()
    assert stage.tell(event) == [TOLD]
    assert (stage.statistics.batches, stage.statistics.stored, stage.statistics.malformed) == (1, 1, 0)


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (["BlockRemoved", [111, -222]], (0, "removed", [111, -222], "device")),
        (["BlockRemoved", [2**64 - 1], "CPU"], (0, "removed", [2**64 - 1], "host_pinned")),
        ({"type": "BlockRemoved", "block_hashes": [7], "medium": "STORAGE"}, (0, "removed", [7], "disk")),
        ({"type": "BlockRemoved", "block_hashes": [7], "group_idx": 0}, (0, "removed", [7], "device")),
        (["AllBlocksCleared"], (0, "cleared")),
        ({"type": "AllBlocksCleared"}, (0, "cleared")),
    ],
)
def test_other_events_in_every_form(event: Any, told: Any) -> None:
    assert Stage().tell(event) == [told]


@pytest.mark.parametrize(
    ("media", "tier"),
    [
        ("GPU DEVICE", "device"),
        ("CPU CPU_PINNED CPU_TIER1", "host_pinned"),
        ("CPU_TIER2 DISK NVME STORAGE", "disk"),
        ("EXTERNAL NETWORK REMOTE SHARED", "external"),
    ],
)
def test_media_are_tiers(media: str, tier: str) -> None:
    for medium in media.split():
        assert Stage().tell(["BlockRemoved", [1], medium]) == [(0, "removed", [1], tier)]
        [told] = Stage().tell(STORED | {"medium": medium, "lora_name": "lora"})
        assert told[-2:] == ("lora", tier)


def test_a_batch_keeps_its_order() -> None:
    told = Stage().tell(["BlockRemoved", [1]], STORED, ["AllBlocksCleared"], ["BlockRemoved", [2]])
    assert [one[1] for one in told] == ["removed", "stored", "cleared", "removed"]


def test_a_batch_speaks_for_the_rank_it_names() -> None:
    stage = Stage(dp_rank=2)
    assert stage.tell(["AllBlocksCleared"]) == [(2, "cleared")]
    assert stage.tell(["AllBlocksCleared"], rank=2) == [(2, "cleared")]
    assert stage.tell(["AllBlocksCleared"], rank=0) == [(0, "cleared")]
    assert stage.tell(["BlockRemoved", [1]], rank=5) == [(5, "removed", [1], "device")]
    before = len(stage.sink.told)
    stage.events.cleared()
    assert stage.sink.told[before:] == [(2, "cleared"), (0, "cleared"), (5, "cleared")]


def test_a_batch_may_leave_its_rank_out() -> None:
    stage = Stage()
    stage.events.tell(pack([1.0, [["AllBlocksCleared"]]]))
    assert stage.sink.told == [(0, "cleared")]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        pack([]),
        pack([1.0]),
        pack([1.0, 5, None]),
        pack(["now", [], None]),
        pack([1.0, [["AllBlocksCleared"]], -1]),
        pack([1.0, [["AllBlocksCleared"]], 1024]),
        pack({"events": []}),
        pack([1.0, [["AllBlocksCleared"]], None])[:-1],
    ],
)
def test_a_batch_that_cannot_be_read_is_counted(payload: bytes, caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    stage.events.tell(payload)
    stage.events.tell(payload)
    assert stage.sink.told == []
    assert (stage.statistics.malformed, stage.statistics.batches) == (2, 0)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "event",
    [
        5,
        None,
        [],
        {},
        ["BlockMoved", 1],
        {"type": "BlockMoved"},
        ["BlockStored", [1]],
        ["BlockRemoved", [b"\x01" * 32]],
        STORED | {"block_hashes": [b"\x01" * 32]},
        STORED | {"token_ids": ["a"]},
        STORED | {"token_ids": None},
    ],
)
def test_an_event_that_cannot_be_read_leaves_the_others(event: Any) -> None:
    stage = Stage()
    assert stage.tell(["BlockRemoved", [1]], event, ["AllBlocksCleared"]) == [
        (0, "removed", [1], "device"),
        (0, "cleared"),
    ]
    assert stage.statistics.malformed == 1


def test_caches_that_hold_no_prefixes_are_left_out() -> None:
    """Of hybrid models; removals name the group alone."""
    stage = Stage()
    window = {"group_idx": 1, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 8}
    whole = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}
    removal = {"type": "BlockRemoved", "block_hashes": [1]}
    assert stage.tell(STORED | window, STORED | {"kv_cache_spec_kind": "mamba"}, STORED | whole) == [TOLD]
    assert stage.tell(removal | {"group_idx": 1}, removal | {"group_idx": 0}) == [(0, "removed", [1], "device")]
    assert stage.statistics.filtered == 3


@pytest.mark.parametrize("change", [{"medium": "TAPE"}, {"block_size": 16}])
def test_blocks_that_cannot_be_told_are_left_out(change: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()
    assert stage.tell(STORED | change, STORED | change) == []
    assert stage.tell(["BlockRemoved", [1], "TAPE"]) == []
    assert stage.statistics.filtered == 3
    assert len(caplog.records) == 1
