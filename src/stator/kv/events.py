"""What a worker says of its cache: topic `kv-events` of its component (`spec/40 §4.1`).

The structs have the shape of the wire, keys in its order, None written as nil: they may stand in larger messages, msgpack or JSON.
"""

from operator import index
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, UnsetType

from stator.errors import PeerProtocolError

__all__ = [
    "KV_EVENTS_TOPIC",
    "TIERS",
    "BlockMedia",
    "EventData",
    "KvEvent",
    "MediaObject",
    "RemovedBlocks",
    "RouterEvent",
    "StoredBlock",
    "StoredBlocks",
    "Tier",
    "decode_router_event",
    "encode_router_event",
    "unsigned",
]

KV_EVENTS_TOPIC = "kv-events"

Tier = Literal["device", "host_pinned", "disk", "external"]
TIERS: frozenset[str] = frozenset(("device", "host_pinned", "disk", "external"))

_Unsigned = Annotated[int, msgspec.Meta(ge=0)]
_MASK = 2**64 - 1


def unsigned(value: int) -> int:
    """A 64-bit number as it travels: engines hash to signed ones, the wire has the same bits unsigned.

    Raises ValueError for a number that does not fit 64 bits, TypeError for what is no whole number.
    """
    value = index(value)
    if not -(2**63) <= value <= _MASK:
        raise ValueError(f"a block hash has 64 bits, got {value}")
    return value & _MASK


class MediaObject(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An image or the like in a block; `offsets` are the ranges [start, end) of the block's tokens it stands for."""

    mm_hash: _Unsigned
    offsets: list[tuple[_Unsigned, _Unsigned]] = []


class BlockMedia(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is not text in a block."""

    mm_objects: list[MediaObject]


class StoredBlock(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One block: the engine's own name for it, and the local hash of its tokens (`hashing`)."""

    block_hash: _Unsigned
    tokens_hash: _Unsigned
    mm_extra_info: BlockMedia | None = None


class StoredBlocks(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A chain of blocks came in. `parent_hash` names the block before the first one; None: the start of a sequence."""

    parent_hash: _Unsigned | None = None
    start_position: _Unsigned | None = None
    """number of the first block in its sequence"""
    blocks: list[StoredBlock]


class RemovedBlocks(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Blocks left."""

    block_hashes: list[_Unsigned]


class EventData(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One of the two that have fields."""

    stored: StoredBlocks | UnsetType = UNSET
    removed: RemovedBlocks | UnsetType = UNSET

    def __post_init__(self) -> None:
        if (self.stored is UNSET) == (self.removed is UNSET):
            raise ValueError("an event is either stored or removed")


class KvEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One change. `event_id` counts from 1 per worker and rank, all tiers together."""

    event_id: _Unsigned
    data: EventData | Literal["cleared"]
    dp_rank: _Unsigned = 0


class RouterEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One change of one worker's cache. `cleared` concerns all tiers, and all ranks of the worker."""

    worker_id: _Unsigned
    storage_tier: Tier = "device"
    event: KvEvent


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(RouterEvent)


def encode_router_event(event: RouterEvent) -> bytes:
    """The payload of an event-plane message, as the reference writes it."""
    return _encoder.encode(event)


def decode_router_event(payload: bytes) -> RouterEvent:
    """Read a payload; unknown keys are ignored, and those that have a default may be absent.

    Raises `PeerProtocolError` saying what does not fit.
    """
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise PeerProtocolError(f"KV event cannot be read: {error}") from error
