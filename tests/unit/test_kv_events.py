"""KV events: a peer's bytes, read and written again."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stator.errors import PeerProtocolError
from stator.kv.events import (
    BlockMedia,
    EventData,
    KvEvent,
    MediaObject,
    RemovedBlocks,
    RouterEvent,
    StoredBlock,
    StoredBlocks,
    decode_router_event,
    encode_router_event,
    unsigned,
)
from stator.kv.hashing import local_hashes

WORKER = 14947445496688376943
RECORDED: list[str] = json.loads((Path(__file__).parent / "recorded_kv_events.json").read_text(encoding="utf-8"))


def stored(*blocks: StoredBlock, event_id: int, parent: int | None) -> RouterEvent:
    data = EventData(stored=StoredBlocks(parent_hash=parent, blocks=list(blocks)))
    return RouterEvent(worker_id=WORKER, event=KvEvent(event_id=event_id, data=data))


def expected() -> list[RouterEvent]:
    """What was recorded, built from the tokens and hashes that its sender was given."""
    first = local_hashes(range(1, 13), block_size=4)
    with_media = local_hashes([9, 10, 11, 13], block_size=4, lora_name="lora1", mm_hashes=[[99]])[0]
    media = BlockMedia(mm_objects=[MediaObject(mm_hash=99, offsets=[(0, 2)])])
    parent = unsigned(-222)
    return [
        stored(
            StoredBlock(block_hash=111, tokens_hash=first[0]),
            StoredBlock(block_hash=parent, tokens_hash=first[1]),
            event_id=1,
            parent=None,
        ),
        stored(StoredBlock(block_hash=333, tokens_hash=first[2]), event_id=2, parent=parent),
        stored(StoredBlock(block_hash=334, tokens_hash=with_media, mm_extra_info=media), event_id=3, parent=parent),
        RouterEvent(worker_id=WORKER, event=KvEvent(event_id=4, data=EventData(removed=RemovedBlocks(block_hashes=[333])))),
    ]


def test_a_peers_bytes() -> None:
    payloads = [bytes.fromhex(one) for one in RECORDED]
    assert [decode_router_event(payload) for payload in payloads] == expected()
    assert [encode_router_event(event) for event in expected()] == payloads


def test_a_cleared_cache_is_a_plain_text() -> None:
    event = RouterEvent(worker_id=1, storage_tier="disk", event=KvEvent(event_id=2, data="cleared", dp_rank=3))
    payload = encode_router_event(event)
    assert msgspec.msgpack.decode(payload) == {
        "worker_id": 1,
        "storage_tier": "disk",
        "event": {"event_id": 2, "data": "cleared", "dp_rank": 3},
    }
    assert decode_router_event(payload) == event


def test_what_has_a_default_may_be_absent() -> None:
    block = {"block_hash": 2**64 - 1, "tokens_hash": 0}
    body = {"event": {"data": {"stored": {"parent_hash": None, "blocks": [block]}}, "event_id": 1}, "worker_id": 5, "new": 1}
    event = decode_router_event(msgspec.msgpack.encode(body))
    assert event.storage_tier == "device"
    assert event.event.dp_rank == 0
    assert isinstance(event.event.data, EventData)
    assert event.event.data.stored == StoredBlocks(blocks=[StoredBlock(block_hash=2**64 - 1, tokens_hash=0)])


@pytest.mark.parametrize(
    "change",
    [
        {"worker_id": None},
        {"worker_id": -1},
        {"storage_tier": "tape"},
        {"event": {"event_id": 1}},
        {"event": {"event_id": 1, "data": "gone"}},
        {"event": {"event_id": 1, "data": {}}},
        {"event": {"event_id": 1, "data": {"removed": {"block_hashes": [1]}, "stored": {"blocks": []}}}},
        {"event": {"event_id": 1, "data": {"removed": {"block_hashes": [-1]}}}},
        {"event": {"event_id": 1, "data": {"removed": {"block_hashes": [b"12345678"]}}}},
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any]) -> None:
    body = {"worker_id": 1, "event": {"event_id": 1, "data": "cleared"}} | change
    with pytest.raises(PeerProtocolError, match="KV event cannot be read"):
        decode_router_event(msgspec.msgpack.encode(body))


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x81", b"[]", b"\x90", bytes.fromhex(RECORDED[0])[:-1]])
def test_what_is_no_message_is_refused(payload: bytes) -> None:
    with pytest.raises(PeerProtocolError):
        decode_router_event(payload)


def test_json_has_the_same_shape() -> None:
    for event in expected():
        assert msgspec.json.decode(msgspec.json.encode(event), type=RouterEvent) == event


def test_hashes_travel_unsigned() -> None:
    assert unsigned(-222) == 18446744073709551394
    assert (unsigned(2**64 - 1), unsigned(0), unsigned(-(2**63))) == (2**64 - 1, 0, 2**63)
    for wrong in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="64 bits"):
            unsigned(wrong)
