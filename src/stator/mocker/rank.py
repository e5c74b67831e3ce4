"""One simulated rank in real time: passes take as long as the timing model says, and readers get their tokens when a pass is over."""

import asyncio
import logging
from collections.abc import Callable

from stator.clock import Clock
from stator.kv.sources import KvEventSink
from stator.mocker.answer import Answer
from stator.mocker.blocks import Stored
from stator.mocker.scheduler import Scheduler
from stator.mocker.sequence import Phase
from stator.worker.snapshot import ComponentSnapshot, SnapshotSink

__all__ = ["Rank"]

logger = logging.getLogger(__name__)

_SECOND = 1_000_000_000
_RESOLUTION = _SECOND // 1000
"""of the event loop's timers"""
_MOST_LAG = _SECOND // 10
"""how far passes may be behind and still be caught up with; beyond that, the time is lost as it would be to a real engine"""
_MOST_STEPS = 32
"""passes, or runs of equal ones, that are caught up with before readers get their turn"""


class Rank:
    """Drives a scheduler with one timer. Passes follow each other without a gap, however late the timer is: there is no drift.

    The event loop's timers must go by `clock`. Everything happens in the loop's thread.
    """

    def __init__(self, dp_rank: int, scheduler: Scheduler, clock: Clock, *, broken: Callable[[str], None]) -> None:
        """`broken` is told why there will be no more passes, should one fail."""
        self.dp_rank = dp_rank
        self._broken = broken
        self.scheduler = scheduler
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._arrived = False
        """since the pass was planned"""
        self._listening: list[Answer] = []
        """decoding, and the reader has everything: to be woken by the next tokens"""
        self._answers: set[Answer] = set()
        self._sink: SnapshotSink | None = None
        self._kv_sink: KvEventSink | None = None

    @property
    def load(self) -> int:
        """Requests that are here."""
        return self.scheduler.running + self.scheduler.waiting

    def attach(self, sink: SnapshotSink) -> None:
        """Publish a snapshot now and after every pass."""
        self._sink = sink
        self._publish()

    def attach_kv(self, sink: KvEventSink) -> None:
        """Tell from now on what comes into the cache and what leaves it."""
        self._kv_sink = sink

    def submit(self, answer: Answer) -> None:
        """Queue a request. Requests of one turn of the loop share the first pass of a rank that was idle."""
        now, plan = self._now(), self.scheduler.plan
        if self._timer is not None and plan is not None and self.scheduler.begun + plan.duration <= now:
            self._timer.cancel()  # it is late: what is over by now is over without the newcomer
            self._advance()
        self._answers.add(answer)
        self.scheduler.submit(answer, now)
        self._arrived = True
        if self._timer is None:
            self._timer = self._loop.call_soon(self._advance)

    def withdraw(self, answer: Answer) -> None:
        """Nobody reads this answer any more: slot and blocks are free at once. Harmless at its end."""
        self._answers.discard(answer)
        self.scheduler.withdraw(answer, self._now())

    def more(self, answer: Answer) -> asyncio.Future[None]:
        """Done once there may be more to read than now, or something else has changed. Cancelling it loses nothing."""
        answer.waiter = waiter = self._loop.create_future()
        if answer.phase is Phase.DECODING:
            self._listening.append(answer)
        return waiter

    def close(self, make_error: Callable[[], Exception]) -> None:
        """No more passes; every reader gets an error. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._sink = self._kv_sink = None
        for answer in self._answers:
            answer.error = make_error()
            answer.wake()

    def _now(self) -> int:
        return int(self._clock.monotonic() * _SECOND)

    def _advance(self) -> None:
        """A timer is over, or a request has come to an idle rank."""
        self._timer = None
        try:
            self._step(self._now())
        except Exception as error:
            logger.exception("a pass of rank %d failed", self.dp_rank)
            self._broken(f"a pass of rank {self.dp_rank} failed: {type(error).__name__}: {error}")

    def _step(self, now: int) -> None:
        """End the passes that are over, plan the next one, and come back at its end."""
        scheduler = self.scheduler
        plan = scheduler.plan
        begun = now if plan is None else scheduler.begun
        if plan is not None and begun + plan.duration > now:  # uvloop's timers may be half a millisecond early
            self._come_back(max(begun + plan.duration - now, _RESOLUTION))
            return
        for _ in range(_MOST_STEPS):  # token path: once per pass, or per run of passes
            if plan is not None:
                if begun + plan.duration > now:
                    break
                begun = self._finish(now)
            plan = scheduler.start(begun)
            self._arrived = False
            for answer in scheduler.take_rejected():
                self._reject(answer)
            if plan is None:
                break
        self._tell_changes()
        self._publish()
        if plan is not None:
            self._come_back(max(begun + plan.duration - now, 0))

    def _come_back(self, delay: int) -> None:
        self._timer = self._loop.call_later(delay / _SECOND, self._advance)

    def _finish(self, now: int) -> int:
        """The passes over at `now` end; when the next one begins."""
        scheduler, plan = self.scheduler, self.scheduler.plan
        assert plan is not None, "passes that end have a plan"
        over = now - scheduler.begun
        # Equal passes are taken at once, unless somebody waits for the next one, or they are to be forgotten.
        many = plan.duration and plan.repeat > 1 and not self._arrived and over < _MOST_LAG
        progress = scheduler.finish(min(plan.repeat, over // plan.duration) if many else 1)
        listening, self._listening = self._listening, []
        for answer in progress.fresh:
            assert isinstance(answer, Answer)
            answer.wake()
        for answer in listening:
            answer.wake()
        return progress.end if now - progress.end < _MOST_LAG else now

    def _reject(self, answer: object) -> None:
        assert isinstance(answer, Answer)
        answer.wake()

    def _publish(self) -> None:
        if self._sink is not None:
            pool = self.scheduler.pool
            self._sink.publish(
                self.dp_rank,
                ComponentSnapshot(
                    kv_used_blocks=pool.used,
                    kv_total_blocks=pool.capacity,
                    gpu_cache_usage=pool.used / pool.capacity,
                    kv_cache_hit_rate=self.scheduler.hit_rate,
                ),
            )

    def _tell_changes(self) -> None:
        """The cache's changes, in order."""
        changes, sink = self.scheduler.pool.take_changes(), self._kv_sink
        if sink is None:
            return
        for change in changes:
            if isinstance(change, Stored):
                answer = change.owner
                assert isinstance(answer, Answer)
                sink.stored(
                    token_ids=answer.block_tokens(change.first, len(change.hashes)),
                    block_hashes=change.hashes,
                    parent_hash=change.parent_hash,
                    lora_name=answer.lora_name,
                )
            else:
                sink.removed(change.hashes)
