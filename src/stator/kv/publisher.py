"""From an engine's threads to the event plane: what came into the cache and what left it (`spec/40 §4.2`)."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec

from stator.errors import UsageError
from stator.events.interface import Channel, EventPlane, EventPublisher
from stator.kv.batching import Batch, Change
from stator.kv.events import (
    KV_EVENTS_TOPIC,
    BlockMedia,
    EventData,
    KvEvent,
    RemovedBlocks,
    RouterEvent,
    StoredBlocks,
    encode_router_event,
)
from stator.kv.rank_sink import RankSink

__all__ = ["KvPublisher", "KvPublisherStatistics", "open_kv_publisher"]

logger = logging.getLogger(__name__)

_CAPACITY = 262_144
"""blocks; about 50 MB"""
_TURN = 4096
"""blocks encoded before the event loop gets its turn: about 4 ms"""


class KvPublisherStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Events since the publisher was made."""

    published: int
    dropped: int
    """the queue was full, or the publisher closed"""
    rejected: int
    """no event could be made of what the engine said"""
    suspicious: int
    """stored with fewer tokens than its blocks need: blocks without tokens were left out"""
    queued: int


async def open_kv_publisher(
    events: EventPlane,
    *,
    namespace: str,
    component: str,
    worker_id: int,
    dp_rank: int = 0,
    block_size: int,
    batching: float | None = None,
    capacity: int = _CAPACITY,
) -> "KvPublisher":
    """The publisher of one rank, listed in discovery. `block_size` is in tokens, `capacity` in blocks that may wait for the loop.

    With `batching` (seconds) the first event after a silence leaves at once and what follows within that time is merged where it
    can be. Raises `UsageError` for sizes below 1 and a batching time that is not above 0, and what `EventPlane.publisher` raises.
    """
    for name, value in (("block_size", block_size), ("capacity", capacity)):
        if value < 1:
            raise UsageError(f"{name} of a KV publisher must be at least 1, got {value}")
    if batching is not None and not batching > 0:
        raise UsageError(f"batching of a KV publisher must be above 0 s, or None, got {batching}")
    publisher = await events.publisher(Channel(namespace=namespace, component=component, topic=KV_EVENTS_TOPIC))
    return KvPublisher(
        publisher, worker_id=worker_id, dp_rank=dp_rank, block_size=block_size, batching=batching, capacity=capacity
    )


class KvPublisher:
    """A `KvEventSink` whose methods any thread may call: they hash, append to a bounded queue and wake the loop, nothing else.

    Event ids count from 1 per rank without a hole, and follow the order of the calls. When the queue is full (the event loop hangs),
    stored blocks are dropped: readers then know of fewer blocks than there are. A removal must not be lost, or readers would believe in
    blocks that are gone: the queue makes room for one `cleared` instead, which also costs what readers know of the worker's other ranks.
    """

    def __init__(
        self,
        publisher: EventPublisher,
        *,
        worker_id: int,
        dp_rank: int,
        block_size: int,
        batching: float | None,
        capacity: int,
    ) -> None:
        self._publisher = publisher
        self._worker_id = worker_id
        self._block_size = block_size
        self._own = self.for_rank(dp_rank)
        self._batching = batching
        self._capacity = capacity
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # guards all up to `_closed`; held for a few instructions
        self._queue: deque[Change] = deque()
        self._queued_blocks = 0
        self._woken = False
        self._dropped = self._rejected = self._suspicious = 0
        self._closed = False
        self._last_id: dict[int, int] = {}
        self._published = 0
        self._batch = Batch()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    def for_rank(self, dp_rank: int) -> "RankSink":
        """The same publisher for another rank of the worker, which counts its events by itself."""
        return RankSink(self, dp_rank=dp_rank, block_size=self._block_size)

    def stored(
        self,
        *,
        token_ids: Sequence[int],
        block_hashes: Sequence[int],
        parent_hash: int | None = None,
        lora_name: str | None = None,
        tier: str = "device",
        media: Sequence[BlockMedia | None] | None = None,
    ) -> None:
        """See `KvEventSink`. `media[i]` is what block i has beside text."""
        self._own.stored(
            token_ids=token_ids,
            block_hashes=block_hashes,
            parent_hash=parent_hash,
            lora_name=lora_name,
            tier=tier,
            media=media,
        )

    def removed(self, block_hashes: Sequence[int], *, tier: str = "device") -> None:
        """See `KvEventSink`. Nothing is published for no blocks."""
        self._own.removed(block_hashes, tier=tier)

    def cleared(self) -> None:
        """See `KvEventSink`."""
        self._own.cleared()

    def statistics(self) -> KvPublisherStatistics:
        """From any thread."""
        return KvPublisherStatistics(
            published=self._published,
            dropped=self._dropped,
            rejected=self._rejected,
            suspicious=self._suspicious,
            queued=len(self._queue),
        )

    async def aclose(self) -> None:
        """Publish what waits, then leave discovery. Idempotent; what is reported later is dropped."""
        with self._lock:
            self._closed = True
        while self._queue:
            self._publish_some()
            await asyncio.sleep(0)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._publish_held()
        await self._publisher.aclose()

    # -- any thread

    def reject(self, error: Exception) -> None:
        """Count what cannot be published, and say so the first time."""
        with self._lock:
            self._rejected += 1
            first = self._rejected == 1
        if first:
            logger.warning("a KV event cannot be published and is left out: %s", error)

    def suspect(self, needed: int, given: int) -> None:
        """Count a stored event that has too few tokens, and say so the first time."""
        with self._lock:
            self._suspicious += 1
            first = self._suspicious == 1
        if first:
            logger.warning("blocks were stored with %d tokens where they need %d; those without are left out", given, needed)

    def offer(self, change: Change) -> None:
        """Queue a change, or drop it."""
        with self._lock:
            if self._closed:
                self._dropped += 1
                return
            if self._queued_blocks + max(change.blocks, 1) > self._capacity:
                self._dropped += 1
                if isinstance(change.data, StoredBlocks):
                    return
                self._dropped += len(self._queue)
                self._queue.clear()
                self._queued_blocks = 0
                change = Change(dp_rank=change.dp_rank, tier="device", data=None)
            self._queue.append(change)
            self._queued_blocks += max(change.blocks, 1)
            if self._woken:
                return
            self._woken = True
        try:
            self._loop.call_soon_threadsafe(self._publish_queued)
        except RuntimeError:  # the loop is closed: there is nobody to publish
            self._closed = True

    # -- the event loop's thread

    def _publish_queued(self) -> None:
        self._publish_some()
        with self._lock:
            self._woken = bool(self._queue)
        if self._woken:
            self._loop.call_soon(self._publish_queued)

    def _publish_some(self) -> None:
        done = 0
        while done < _TURN:
            with self._lock:
                if not self._queue:
                    return
                change = self._queue.popleft()
                self._queued_blocks -= max(change.blocks, 1)
            done += max(change.blocks, 1)
            if self._batching is None:
                self._publish(change)
            else:
                self._publish_in_time(change, self._batching)

    def _publish_in_time(self, change: Change, period: float) -> None:
        if self._timer is None:  # it was quiet
            self._publish(change)
            self._timer = self._loop.call_later(period, self._period_ended, period)
        elif change.data is None:
            self._publish_held()
            self._publish(change)
        elif (complete := self._batch.add(change)) is not None:
            self._publish(complete)

    def _period_ended(self, period: float) -> None:
        held = self._publish_held()
        self._timer = self._loop.call_later(period, self._period_ended, period) if held else None

    def _publish_held(self) -> bool:
        held = self._batch.take()
        if held is not None:
            self._publish(held)
        return held is not None

    def _publish(self, change: Change) -> None:
        event_id = self._last_id[change.dp_rank] = self._last_id.get(change.dp_rank, 0) + 1
        event = KvEvent(event_id=event_id, data=_event_data(change), dp_rank=change.dp_rank)
        self._publisher.publish(
            encode_router_event(RouterEvent(worker_id=self._worker_id, storage_tier=change.tier, event=event))
        )
        self._published += 1


def _event_data(change: Change) -> EventData | Literal["cleared"]:
    match change.data:
        case StoredBlocks() as data:
            return EventData(stored=data)
        case RemovedBlocks() as data:
            return EventData(removed=data)
        case None:
            return "cleared"
