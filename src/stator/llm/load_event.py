"""What a worker, or a router about it, says of its load: topic `kv_metrics` of the namespace (`spec/40 §2.1`)."""

import msgspec

from stator.errors import PeerProtocolError

__all__ = ["LOAD_TOPIC", "ActiveLoad", "decode_load", "encode_load"]

LOAD_TOPIC = "kv_metrics"


class ActiveLoad(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One rank of one worker. None leaves unsaid: the last known value stands. Blocks are KV blocks."""

    worker_id: int
    dp_rank: int = 0
    active_decode_blocks: int | None = None
    """blocks of sequences a router has booked there"""
    active_prefill_tokens: int | None = None
    """prompt tokens booked and not yet computed"""
    kv_used_blocks: int | None = None
    """blocks in use, as the engine counts them"""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ActiveLoad)


def encode_load(load: ActiveLoad) -> bytes:
    """The reference's msgpack map: five keys in order, None written as nil."""
    return _encoder.encode(load)


def decode_load(payload: bytes) -> ActiveLoad:
    """Read a payload; unknown keys are ignored. Raises `PeerProtocolError` saying what does not fit."""
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        raise PeerProtocolError(f"load event cannot be read: {error}") from error
