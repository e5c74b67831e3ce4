"""The worker monitor: hears how loaded workers are and takes those over their limit out of routing (`spec/40 §3`).

    topic kv_metrics of each namespace with models ─ ActiveLoad ─▶ LoadTable (KvLoadRule) ─ busy workers ─▶ Availability per model

It watches nothing itself: the directory says who serves what with which capacity. Without models it listens to nobody; without reports
nobody is busy. While events do not come through, the last ones stand: for ever those of workers that speak when something changes, for
`load.stale_after` those of workers that repeat themselves, as Stator's do every second. A router may speak for a worker; its word is as
good as the worker's own.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from stator.clock import Clock
from stator.errors import PeerProtocolError, StatorError, UsageError
from stator.events import Channel, EventPlane
from stator.llm.card import WorkerType
from stator.llm.deployment import DeployedWorker
from stator.llm.kv_load import KvCapacity, KvLoadRule
from stator.llm.load_event import LOAD_TOPIC, ActiveLoad, decode_load
from stator.llm.thresholds import LoadConfig, Thresholds
from stator.protocol.ids import EndpointId
from stator.routing import Group, LoadTable
from stator.tasks import Backoff, Scope

__all__ = ["MonitorStatistics", "RankReport", "Watched", "WorkerMonitor"]

logger = logging.getLogger(__name__)

_MODELS_REMEMBERED = 1000
"""models whose thresholds somebody set"""

Place = tuple[EndpointId, str]
"""an endpoint and the name of a model it serves"""


class Watched(Protocol):
    """Who is told which of his workers are busy: a `Deployment`."""

    @property
    def workers(self) -> Mapping[int, DeployedWorker]: ...

    def set_busy(self, busy: Mapping[int, str]) -> None: ...


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one rank of one listed worker that has reported."""

    namespace: str
    worker_id: int
    dp_rank: int
    worker_type: str
    """`decode`, `prefill` or `encode`; aggregated workers decode"""
    models: tuple[str, ...]
    active_decode_blocks: int | None
    active_prefill_tokens: int | None
    kv_used_blocks: int | None
    age: float
    """seconds since the last report"""
    busy: tuple[str, ...]
    """the models for which this rank is over a threshold; a worker is busy when all of its ranks are"""


class MonitorStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Since the monitor was made."""

    heard: int
    """load events that could be read, whoever they were about"""
    malformed: int
    """events that could not"""
    dropped: int
    """reports of ranks beyond `load.max_ranks`"""
    resubscribed: int
    """how often a subscription had to be made again"""
    workers: int
    """listed workers that have reported"""
    busy: int
    """listed workers that are busy, for one model at least"""


class WorkerMonitor:
    """`ModelDirectory.monitor`; made and fed by the directory. All methods are for the event loop's thread and never block."""

    def __init__(self, config: LoadConfig, clock: Clock, *, backoff: Backoff | None = None) -> None:
        self._config = config
        self._now = clock.monotonic
        self._backoff = backoff or Backoff()
        self._table: LoadTable[Place, ActiveLoad, KvCapacity, Thresholds] = LoadTable(
            KvLoadRule(), stale_after=config.stale_after, max_ranks=config.max_ranks, max_strangers=config.max_strangers
        )
        self._watched: Mapping[Place, Watched] = {}
        self._chosen: OrderedDict[str, Thresholds] = OrderedDict()
        self._events: EventPlane | None = None
        self._scope: Scope | None = None
        self._listeners: dict[str, asyncio.Task[None]] = {}
        self._heard = self._malformed = self._resubscribed = 0

    @asynccontextmanager
    async def listening(self, events: EventPlane) -> AsyncGenerator[None, None]:
        """Hear what workers say inside the block."""
        async with Scope("worker monitor") as scope:
            self._events, self._scope = events, scope
            self._listen_to(self._namespaces())
            scope.spawn(self._forget_stale(), name="stale load reports")
            try:
                yield
            finally:
                self._events = self._scope = None
                self._listeners.clear()

    # -- thresholds, per model

    def thresholds(self, model: str) -> Thresholds | None:
        """Those in force for `model`; None for a model nobody serves now."""
        return self._thresholds_of(model) if model in self._models() else None

    def set_thresholds(
        self,
        model: str,
        *,
        active_decode_blocks_threshold: float | UnsetType | None = UNSET,
        active_prefill_tokens_threshold: int | UnsetType | None = UNSET,
        active_prefill_tokens_threshold_frac: float | UnsetType | None = UNSET,
    ) -> Thresholds:
        """Set what is given (None: that one does not count any more), leave the rest; the thresholds now in force.

        It acts at once, on the reports that are known. What was set is kept while the process lives, also while nobody serves the model.
        Raises `UsageError`, and changes nothing, for a model nobody serves now and for a value out of range.
        """
        if model not in self._models():
            raise UsageError(f"Model {model!r} not found. Thresholds can only be set for discovered models.")
        changes = {
            "active_decode_blocks_threshold": active_decode_blocks_threshold,
            "active_prefill_tokens_threshold": active_prefill_tokens_threshold,
            "active_prefill_tokens_threshold_frac": active_prefill_tokens_threshold_frac,
        }
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not UNSET}
        thresholds = msgspec.structs.replace(self._thresholds_of(model), **given)
        if given:
            self._chosen[model] = thresholds
            self._chosen.move_to_end(model)
            if len(self._chosen) > _MODELS_REMEMBERED:
                self._chosen.popitem(last=False)
            logger.info("thresholds of model %s are now %s", model, thresholds)
            for place in self._watched:
                if place[1] == model:
                    self._tell(self._table.set_threshold(place, thresholds))
        return thresholds

    def all_thresholds(self) -> dict[str, Thresholds]:
        """Those in force, by name of the models served now, sorted."""
        return {model: self._thresholds_of(model) for model in sorted(self._models())}

    # -- for the metrics page and for people

    def snapshot(self) -> Sequence[RankReport]:
        """What is known of each rank, sorted by worker and rank."""
        places: dict[int, list[Place]] = {}
        for place, watched in self._watched.items():
            for worker in watched.workers:
                places.setdefault(worker, []).append(place)
        now = self._now()
        reports: list[RankReport] = []
        for row in self._table.rows():
            first = places[row.worker][0]
            reports.append(
                RankReport(
                    namespace=first[0].namespace,
                    worker_id=row.worker,
                    dp_rank=row.rank,
                    worker_type=_kind(self._watched[first].workers[row.worker].kind),
                    models=tuple(sorted({model for _, model in places[row.worker]})),
                    active_decode_blocks=row.load.active_decode_blocks,
                    active_prefill_tokens=row.load.active_prefill_tokens,
                    kv_used_blocks=row.load.kv_used_blocks,
                    age=max(0.0, now - row.heard),
                    busy=tuple(sorted({model for _, model in row.over})),
                )
            )
        return sorted(reports, key=lambda report: (report.worker_id, report.dp_rank))

    def busy_workers(self) -> dict[str, int]:
        """How many workers are busy for each model served now."""
        busy: dict[str, set[int]] = {model: set() for model in sorted(self._models())}
        for place in self._watched:
            busy[place[1]].update(self._table.busy(place))
        return {model: len(workers) for model, workers in busy.items()}

    def statistics(self) -> MonitorStatistics:
        """Counters."""
        busy = {worker for place in self._watched for worker in self._table.busy(place)}
        return MonitorStatistics(
            heard=self._heard,
            malformed=self._malformed,
            dropped=self._table.dropped,
            resubscribed=self._resubscribed,
            workers=len(self._table),
            busy=len(busy),
        )

    # -- news

    def follow(self, watched: Mapping[Place, Watched]) -> None:
        """These are all who serve models now, with their workers. Called by the directory."""
        self._watched = dict(watched)
        groups = {
            place: Group(
                workers={worker: facts.capacity for worker, facts in each.workers.items()},
                threshold=self._thresholds_of(place[1]),
            )
            for place, each in watched.items()
        }
        repeating = {worker for each in watched.values() for worker, facts in each.workers.items() if facts.repeats}
        self._table.follow(groups, repeating, self._now())
        self._tell(watched)  # somebody may be new, and told for the first time
        self._listen_to(self._namespaces())

    def hear(self, payload: bytes) -> None:
        """A load event arrived. What cannot be read is counted."""
        try:
            load = decode_load(payload)
        except PeerProtocolError as error:
            self._malformed += 1
            level = logging.WARNING if self._malformed == 1 else logging.DEBUG
            logger.log(level, "%s", error)
            return
        self._heard += 1
        changed = self._table.hear(load.worker_id, load.dp_rank, load, self._now())
        if changed:
            self._tell(changed)

    def forget_stale(self) -> None:
        """Time has passed."""
        self._tell(self._table.forget_stale(self._now()))

    # -- inside

    def _tell(self, places: Collection[Place]) -> None:
        for place in places:
            if (watched := self._watched.get(place)) is not None:
                busy = self._table.busy(place)
                logger.debug("busy for model %s at %s: %d workers", place[1], place[0], len(busy))
                watched.set_busy(busy)

    def _models(self) -> set[str]:
        return {model for _, model in self._watched}

    def _thresholds_of(self, model: str) -> Thresholds:
        return self._chosen.get(model) or self._config.thresholds

    def _namespaces(self) -> set[str]:
        return {endpoint.namespace for endpoint, _ in self._watched}

    def _listen_to(self, namespaces: set[str]) -> None:
        """Listen to these namespaces and no others."""
        events, scope = self._events, self._scope
        if events is None or scope is None:
            return
        for gone in self._listeners.keys() - namespaces:
            self._listeners.pop(gone).cancel()
        for new in namespaces - self._listeners.keys():
            self._listeners[new] = scope.spawn(self._listen(events, new), name=f"load events of {new}")

    async def _listen(self, events: EventPlane, namespace: str) -> None:
        """Hear all load events of a namespace; when the subscription ends, make another one."""
        channel = Channel(namespace=namespace, topic=LOAD_TOPIC)
        random, attempt = Random(namespace), 0
        while True:
            reason: object = "the subscription ended"
            try:
                async with await events.subscribe(channel) as subscription:
                    async for event in subscription:
                        attempt = 0
                        self.hear(event.payload)
            except (StatorError, OSError) as error:
                reason = error
            level = logging.DEBUG if attempt else logging.WARNING
            logger.log(level, "load events of namespace %s are not heard (%s); trying again", namespace, reason)
            await asyncio.sleep(self._backoff.delay(attempt, random))
            attempt += 1
            self._resubscribed += 1

    async def _forget_stale(self) -> None:
        pause = min(1.0, self._config.stale_after / 5)
        while True:
            before = self._now()
            await asyncio.sleep(pause)
            if self._now() - before < 2 * pause:  # else this process stood still: what was said meanwhile has to be read first
                self.forget_stale()


def _kind(kind: WorkerType | None) -> str:
    """One that does everything is one that decodes, to routing."""
    alone = (WorkerType.PREFILL, WorkerType.ENCODE)
    return kind.value if kind is not None and kind in alone else WorkerType.DECODE.value
