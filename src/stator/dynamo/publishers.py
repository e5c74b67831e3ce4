"""The reference's publishers, for workers that tell routers what they hold and how full they are (`spec/40 §2.1, §4.2`)."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from stator.dynamo.endpoint import Endpoint
from stator.dynamo.errors import CallFailed, InvalidType, InvalidValue
from stator.kv.engine_socket import follow_engine_socket
from stator.kv.events import BlockMedia
from stator.kv.hashing import local_hashes
from stator.kv.publisher import KvPublisher, open_kv_publisher
from stator.kv.sources import ZmqSource
from stator.worker.load_publisher import WorkerMetricsPublisher as LoadPublisher

__all__ = ["KvEventPublisher", "WorkerMetricsPublisher", "compute_block_hash_for_seq"]

logger = logging.getLogger(__name__)

_EARLY = 10_000
"""changes kept before the publisher is open"""


def compute_block_hash_for_seq(
    tokens: Sequence[int],
    kv_block_size: int,
    block_mm_infos: Sequence[dict[str, Any] | None] | None = None,
    lora_name: str | None = None,
    is_eagle: bool | None = None,
) -> list[int]:
    """The local hash of each full block. Raises `UsageError` for a block size below 1 and for what is no token id."""
    media = None if block_mm_infos is None else [_media_hashes(info) for info in block_mm_infos]
    return local_hashes(tokens, block_size=kv_block_size, lora_name=lora_name, mm_hashes=media, eagle=bool(is_eagle))


class WorkerMetricsPublisher:
    """Says how loaded this worker is: `await create_endpoint(endpoint)`, then `publish` from any thread."""

    def __init__(self) -> None:
        self._load: LoadPublisher | None = None

    async def create_endpoint(self, endpoint: Endpoint) -> None:
        """Open the channel of the endpoint's namespace; it is closed with the runtime. Calling it again changes nothing."""
        if self._load is not None:
            return
        runtime = await endpoint.membership.runtime()
        self._load = load = LoadPublisher(runtime.events, namespace=endpoint.id.namespace, worker_id=runtime.instance_id)
        await load.__aenter__()
        endpoint.membership.on_leave(load.aclose)

    def publish(
        self, dp_rank: int | None = None, active_decode_blocks: int | None = None, kv_used_blocks: int | None = None
    ) -> None:
        """The load of a rank (default 0) now; what is None stays as it was. Raises `CallFailed` when nothing is said at all, `TypeError`
        and `OverflowError` for what is no count. Before `create_endpoint` nothing is sent.
        """
        if active_decode_blocks is None and kv_used_blocks is None:
            raise CallFailed("worker metrics publish requires at least one load metric")
        rank, decode, used = (
            None if value is None else _count(name, value)
            for name, value in (
                ("dp_rank", dp_rank),
                ("active_decode_blocks", active_decode_blocks),
                ("kv_used_blocks", kv_used_blocks),
            )
        )
        if self._load is not None:
            self._load.publish(rank or 0, decode, used)


class KvEventPublisher:
    """Says what is in this worker's KV cache, from any thread, or follows the engine's own socket.

    It opens once the runtime is connected; what is published before that waits. The reference's local indexer does not exist here.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        worker_id: int | None = None,
        kv_block_size: int = 0,
        dp_rank: int = 0,
        enable_local_indexer: bool = False,
        zmq_endpoint: str | None = None,
        zmq_topic: str | None = None,
        batching_timeout_ms: int | None = None,
        image_token_id: int | None = None,
    ) -> None:
        """`enable_local_indexer` and `image_token_id` are ignored. Raises `ValueError` for a block size below 1."""
        if kv_block_size < 1:
            raise InvalidValue("kv_block_size cannot be 0")
        self._size = kv_block_size
        self._early: deque[Callable[[KvPublisher], None]] = deque(maxlen=_EARLY)
        self._publisher: KvPublisher | None = None
        self._closed = False
        self._membership = endpoint.membership
        source = None if zmq_endpoint is None else ZmqSource(endpoint=zmq_endpoint, topic=zmq_topic or "", dp_rank=dp_rank)
        batching = batching_timeout_ms / 1000 if batching_timeout_ms else None
        self._membership.spawn(self._run(endpoint, worker_id, dp_rank, source, batching), name="KV events")

    async def _run(
        self, endpoint: Endpoint, worker_id: int | None, dp_rank: int, source: ZmqSource | None, batching: float | None
    ) -> None:
        runtime = await self._membership.runtime()
        publisher = await open_kv_publisher(
            runtime.events,
            namespace=endpoint.id.namespace,
            component=endpoint.id.component,
            worker_id=runtime.instance_id if worker_id is None else worker_id,
            dp_rank=dp_rank,
            block_size=self._size,
            batching=batching,
        )
        self._membership.on_leave(publisher.aclose)
        self._publisher = publisher
        while self._early:
            self._early.popleft()(publisher)
        if self._closed:
            await publisher.aclose()
        elif source is not None:
            await follow_engine_socket(source, publisher)

    def publish_stored(
        self,
        token_ids: Sequence[int],
        num_block_tokens: Sequence[int],
        block_hashes: Sequence[int],
        parent_hash: int | None = None,
        block_mm_infos: Sequence[dict[str, Any] | None] | None = None,
        lora_name: str | None = None,
        is_eagle: bool | None = None,
    ) -> None:
        """Full blocks came in. `num_block_tokens` says how long each is; one that is not full ends the chain before it."""
        full = len(block_hashes)
        for place, count in enumerate(num_block_tokens):
            if count != self._size:
                full = min(full, place)
                break
        hashes = list(block_hashes[:full])
        tokens = list(token_ids[: len(token_ids) if full == len(block_hashes) else full * self._size])
        media = None if block_mm_infos is None else [_media(info) for info in block_mm_infos[:full]]
        self._do(
            lambda publisher: publisher.stored(
                token_ids=tokens, block_hashes=hashes, parent_hash=parent_hash, lora_name=lora_name, media=media
            )
        )

    def publish_removed(self, block_hashes: Sequence[int]) -> None:
        """Blocks left."""
        hashes = list(block_hashes)
        self._do(lambda publisher: publisher.removed(hashes))

    def shutdown(self) -> None:
        """Publish no more. Idempotent."""
        if not self._closed:
            self._closed = True
            if self._publisher is not None:
                self._membership.spawn(self._publisher.aclose(), name="end of KV events")

    def _do(self, work: Callable[[KvPublisher], None]) -> None:
        if self._closed:
            return
        if self._publisher is None:
            self._early.append(work)
        else:
            work(self._publisher)


def _count(name: str, value: object) -> int:
    if not isinstance(value, int):
        raise InvalidType(f"argument {name!r}: {type(value).__name__!r} object cannot be interpreted as an integer")
    if value < 0:
        raise OverflowError("can't convert negative int to unsigned")
    return value


def _objects(info: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if info is None else list(info.get("mm_objects") or ())


def _media_hashes(info: dict[str, Any] | None) -> list[int]:
    return [each["mm_hash"] for each in _objects(info)]


def _media(info: dict[str, Any] | None) -> BlockMedia | None:
    return None if info is None else msgspec.convert(info, BlockMedia)
