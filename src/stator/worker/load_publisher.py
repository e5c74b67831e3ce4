"""What a worker says of its load on the event plane, so that routers and frontends know who is busy (`spec/40 §2`)."""

import asyncio
import logging
from collections.abc import Callable
from random import Random
from types import TracebackType
from typing import Self

from stator.events.interface import Channel, EventPlane, EventPublisher
from stator.llm.load_event import LOAD_TOPIC, ActiveLoad, encode_load
from stator.tasks import Backoff, Scope

__all__ = ["WorkerMetricsPublisher"]

logger = logging.getLogger(__name__)

REPEAT = 1.0
"""seconds after which a value is sent again: who has just come must learn it, and who hears nothing for 5 s gives up on it"""
PACE = 0.004
"""seconds between two sendings; what is published meanwhile becomes one message per rank"""


class _Rank:
    """What was sent last of one rank, and how that went."""

    __slots__ = ("failing", "sent", "sent_at")

    def __init__(self) -> None:
        self.sent: ActiveLoad | None = None
        self.sent_at = float("-inf")
        self.failing = False


class WorkerMetricsPublisher:
    """Sends each rank's latest load to the namespace: at once when it has changed, else every second.

        async with WorkerMetricsPublisher(events, namespace="dynamo", worker_id=runtime.instance_id) as publisher:
            publisher.publish(0, kv_used_blocks=17)

    `publish` may be called from any thread, costs a few stores, and never raises, not even when all this is over. Trouble with the
    event plane is logged once and heals by itself.
    """

    def __init__(self, events: EventPlane, *, namespace: str, worker_id: int, random: Random | None = None) -> None:
        self._events = events
        self._channel = Channel(namespace=namespace, topic=LOAD_TOPIC)
        self._worker_id = worker_id
        self._random = random or Random()
        self._loop = asyncio.get_running_loop()
        self._scope = Scope(f"load of {worker_id:x}")
        self._publisher: EventPublisher | None = None
        # Written by any thread, each store atomic; the loop's thread reads copies.
        self._decode: dict[int, int] = {}
        self._used: dict[int, int] = {}
        self._woken = False
        """whether the loop has been told, and has not looked yet"""
        self._ranks: dict[int, _Rank] = {}
        self._next_sending = float("-inf")
        self._timers: set[asyncio.TimerHandle] = set()
        self._closed = False

    # -- any thread

    def publish(self, dp_rank: int = 0, active_decode_blocks: int | None = None, kv_used_blocks: int | None = None) -> None:
        """The load of a rank now; what is None stays as it was said before. After the end: nothing."""
        if active_decode_blocks is not None:
            self._decode[dp_rank] = active_decode_blocks
        if kv_used_blocks is not None:
            self._used[dp_rank] = kv_used_blocks
        if not self._woken:  # set before the loop is told: it looks afterwards and sees what was stored
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._wake)
            except RuntimeError:  # the loop is closed, and nobody will look again
                pass

    # -- the loop's thread

    async def __aenter__(self) -> Self:
        self._scope.spawn(self._open(), name="load channel")
        self._later(REPEAT, self._repeat)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Send no more. Idempotent."""
        self._closed = True
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        await self._scope.aclose()
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            await publisher.aclose()

    async def _open(self) -> None:
        """Until there is a channel: the worker serves without it meanwhile."""
        backoff, attempt = Backoff(), 0
        while True:
            try:
                self._publisher = await self._events.publisher(self._channel)
                break
            except Exception as error:  # discovery is away, no address is free, a plug-in's plane has other reasons
                level = logging.DEBUG if attempt else logging.WARNING
                logger.log(level, "the load of this worker cannot be published yet: %s", error)
            await asyncio.sleep(backoff.delay(attempt, self._random))
            attempt += 1
        if attempt:
            logger.info("the load of this worker is published")
        self._send()

    def _wake(self) -> None:
        wait = self._next_sending - self._loop.time()
        if wait > 0:
            self._later(wait, self._send)
        else:
            self._send()

    def _repeat(self) -> None:
        self._later(REPEAT, self._repeat)
        self._send(again=True)

    def _send(self, *, again: bool = False) -> None:
        """What has changed; `again`: also what was not sent for a while."""
        self._woken = False
        publisher, now = self._publisher, self._loop.time()
        if publisher is None or self._closed:
            return
        decode, used = self._decode.copy(), self._used.copy()
        for dp_rank in decode.keys() | used.keys():
            rank = self._ranks.get(dp_rank)
            if rank is None:
                rank = self._ranks[dp_rank] = _Rank()
            load = ActiveLoad(
                worker_id=self._worker_id,
                dp_rank=dp_rank,
                active_decode_blocks=decode.get(dp_rank),
                kv_used_blocks=used.get(dp_rank),
            )
            if load != rank.sent or (again and now - rank.sent_at > REPEAT / 2):
                self._send_one(publisher, rank, load, now)

    def _send_one(self, publisher: EventPublisher, rank: _Rank, load: ActiveLoad, now: float) -> None:
        rank.sent, rank.sent_at = load, now
        self._next_sending = now + PACE
        try:
            publisher.publish(encode_load(load))
        except Exception as error:  # a plug-in's plane, or a number that is none
            level = logging.DEBUG if rank.failing else logging.WARNING
            logger.log(level, "publishing the load of rank %s failed, further failures are not shown: %r", load.dp_rank, error)
            rank.failing = True
        else:
            if rank.failing:
                rank.failing = False
                logger.info("publishing the load of rank %s works again", load.dp_rank)

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        if self._closed:
            return

        def run() -> None:
            self._timers.discard(timer)
            work()

        timer = self._loop.call_later(seconds, run)
        self._timers.add(timer)
