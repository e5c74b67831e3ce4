"""Which models can be served now: the one watcher of model cards joined with live instances (`spec/50 §15`).

A model is there while at least one live instance has published a card of its name. The instances of one endpoint must agree on the
card (same checksum): those that came later with another one are reported and get no requests until the others are gone, and so do
instances without a card. A model served by several endpoints spreads its requests over them by the number of their instances; where
endpoints differ in the card, each request is prepared for the endpoint it goes to.

What the cards say of capacity goes to where requests are given away: how many each worker runs at once, and to the monitor, which takes
overloaded workers out.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager

import msgspec

from stator import settings
from stator.clock import Clock
from stator.errors import StatorError
from stator.llm.card import ModelCard, ModelType, card_from_json, mdcsum
from stator.llm.deployment import DeployedEngine, DeployedWorker, Deployment, turns
from stator.llm.load_metrics import load_metrics
from stator.llm.monitor import WorkerMonitor
from stator.llm.preprocess import Preprocessor
from stator.llm.served import ServedModel
from stator.llm.thresholds import LoadConfig
from stator.protocol.ids import EndpointId
from stator.protocol.records import EndpointRecord, ModelRecord, Query, RecordKey
from stator.runtime.runtime import Runtime
from stator.runtime.view import InstanceView
from stator.tasks import Scope

__all__ = ["ModelDirectory"]

logger = logging.getLogger(__name__)

_REFUSALS = 10_000
"""reasons remembered, so that each is reported once"""
_REMINDER = 1.0
"""seconds between two hints that there may be room: time alone makes some, when a refusal is long enough ago"""

Place = tuple[EndpointId, str]
"""an endpoint and the name of a model it serves"""


class _Card(msgspec.Struct, frozen=True, kw_only=True):
    """A record that was read and may be served."""

    key: RecordKey
    record: ModelRecord
    card: ModelCard
    checksum: str

    @property
    def place(self) -> Place:
        return self.record.endpoint_id, self.card.display_name


class ModelDirectory:
    """`ModelSource` over discovery. Made by `ModelDirectory.follow`."""

    def __init__(self, runtime: Runtime, clock: Clock, policy: str | None, monitor: WorkerMonitor) -> None:
        self._runtime = runtime
        self._clock = clock
        self._policy = policy
        self.monitor = monitor
        """who is busy, and from what load on"""
        self._models: dict[str, list[ServedModel]] = {}
        """by name; one entry per checksum"""
        self._turn = 0
        self._deployments: dict[Place, Deployment] = {}
        self._preprocessors: dict[str, Preprocessor] = {}
        self._records: dict[RecordKey, ModelRecord] = {}
        self._read: dict[RecordKey, tuple[ModelRecord, _Card | None]] = {}
        self._alive: dict[tuple[EndpointId, int], EndpointRecord] = {}
        self._refused: set[tuple[RecordKey, str]] = set()
        self._unheard = {ModelRecord.bucket, EndpointRecord.bucket}
        """of what discovery has said nothing yet"""
        self._synced = asyncio.Event()
        self._news = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def follow(
        cls, runtime: Runtime, *, clock: Clock, policy: str | None = None, load: LoadConfig | None = None
    ) -> "AsyncGenerator[ModelDirectory, None]":
        """A directory that keeps up with discovery inside the block, and hears the load of the workers in it (`monitor`). On entry the
        models known so far are loaded (at most 10 s). `load`: default, the settings.

        Raises `UsageError` for an unknown policy, `ConfigError` for settings.
        """
        await asyncio.to_thread(runtime.policy, policy)
        config = load if load is not None else await asyncio.to_thread(settings.load, LoadConfig)
        monitor = WorkerMonitor(config, clock)
        directory = cls(runtime, clock, policy, monitor)
        with load_metrics(runtime.metrics, monitor):
            async with Scope("model directory") as scope, monitor.listening(runtime.events):
                scope.spawn(directory._follow_cards(), name="model cards")
                scope.spawn(directory._follow_instances(), name="instances")
                scope.spawn(directory._rebuild_on_news(), name="models")
                scope.spawn(directory._remind_of_room(), name="reminder of room")
                try:
                    async with asyncio.timeout(10.0):
                        await directory._synced.wait()
                except TimeoutError:
                    logger.warning("discovery has not answered yet; models will appear when it does")
                yield directory

    # -- ModelSource

    def get(self, name: str) -> ServedModel | None:
        """The model for one request: where its endpoints differ, each in turn, as often as it has instances; one with room if there is."""
        served = self._models.get(name)
        if served is None:
            return None
        if len(served) == 1:
            return served[0]
        self._turn += 1
        first = turns([len(each.instances()) for each in served], self._turn)
        return next((each for each in (*served[first:], *served[:first]) if each.engine.room() != 0), served[first])

    def models(self) -> list[ServedModel]:
        """One entry per name; its `instances` are those of all endpoints."""
        return [_together(self._models[name]) for name in sorted(self._models)]

    # -- following discovery

    async def _follow_cards(self) -> None:
        async with self._runtime.discovery.watch(Query(ModelRecord.bucket)) as watch:
            async for _ in watch:
                self._records = {key: record for key, record in watch.current.items() if isinstance(record, ModelRecord)}
                self._unheard.discard(ModelRecord.bucket)
                self._news.set()

    async def _follow_instances(self) -> None:
        async with self._runtime.discovery.watch(Query(EndpointRecord.bucket)) as watch:
            async for _ in watch:
                self._alive = {
                    (record.endpoint_id, record.instance_id): record
                    for record in watch.current.values()
                    if isinstance(record, EndpointRecord)
                }
                self._unheard.discard(EndpointRecord.bucket)
                self._news.set()

    async def _rebuild_on_news(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._unheard:  # cards without instances, or the other way round: all models would seem to be gone
                continue
            try:
                await self._rebuild()
            except StatorError as error:
                logger.error("the models could not be brought up to date: %s", error)
            self._synced.set()

    async def _remind_of_room(self) -> None:
        while True:
            await asyncio.sleep(_REMINDER)
            for view in {each.client.view for each in self._deployments.values()}:
                view.more_room()

    async def _rebuild(self) -> None:
        """Make `models` say what is true now. Loading a tokenizer happens in a thread; the old state stays valid meanwhile."""
        cards: dict[Place, list[_Card]] = {}
        for card in self._living():
            cards.setdefault(card.place, []).append(card)
        deployments: dict[Place, Deployment] = {}
        for place, candidates in cards.items():
            deployment = await self._deployment(place, candidates)
            if deployment is not None:
                deployments[place] = deployment
        before, self._deployments = self._deployments, deployments
        self._publish()
        for place, deployment in before.items():
            if deployments.get(place) is not deployment:
                deployment.retire()
        self._tell_capacities(before)

    def _living(self) -> Iterable[_Card]:
        """The readable cards of living instances, in the order of their keys."""
        read: dict[RecordKey, tuple[ModelRecord, _Card | None]] = {}
        for key, record in self._records.items():
            known = self._read.get(key)
            found = known if known is not None and known[0] is record else (record, self._card(key, record))
            read[key] = found
        self._read = read
        return [
            card
            for record, card in read.values()
            if card is not None and (record.endpoint_id, record.instance_id) in self._alive
        ]

    def _card(self, key: RecordKey, record: ModelRecord) -> _Card | None:
        try:
            card = card_from_json(record.card_json)
        except StatorError as error:
            return self._refuse(key, f"its card cannot be read: {error}")
        if not card.model_types & {ModelType.CHAT, ModelType.COMPLETIONS}:
            return self._refuse(key, f"its type {card.model_type!r} is neither chat nor completions")
        return _Card(key=key, record=record, card=card, checksum=mdcsum(card))

    async def _deployment(self, place: Place, cards: list[_Card]) -> Deployment | None:
        """The deployment at `place`: with the card it had while one instance still has it, else with that of most instances."""
        by_checksum: dict[str, list[_Card]] = {}
        for card in cards:
            by_checksum.setdefault(card.checksum, []).append(card)
        present = self._deployments.get(place)
        if present is None or present.checksum not in by_checksum:
            present = await self._open(max(by_checksum.values(), key=len))
        if present is None:
            return None
        agreeing = by_checksum.pop(present.checksum)
        others = [card for group in by_checksum.values() for card in group]
        present.set_workers({card.record.instance_id: self._worker(card) for card in agreeing})
        for card in others:
            self._refuse(card.key, "its card differs from the one its endpoint serves; drain the old workers first")
        return present

    async def _open(self, cards: list[_Card]) -> Deployment | None:
        """A deployment with the card of `cards`, which are equal; None if it cannot be served."""
        first = cards[0]
        if not await self._load(first.checksum, first):
            return None
        endpoint, model = first.place
        return await Deployment.open(self._runtime, model, endpoint, first.card, first.checksum, policy=self._policy)

    def _worker(self, card: _Card) -> DeployedWorker:
        record = self._alive.get((card.record.endpoint_id, card.record.instance_id))
        return DeployedWorker.of(card.card, repeats=record is not None and record.stator is not msgspec.UNSET)

    def _tell_capacities(self, before: Mapping[Place, Deployment]) -> None:
        """Pass on what the cards say: how many requests each worker runs at once, and what its load is held against.

        Where a worker's cards differ, the largest number counts. What was said of the deployments `before` ends.
        """
        slots: dict[InstanceView, dict[int, int]] = {each.client.view: {} for each in before.values()}
        for deployment in self._deployments.values():
            known = slots.setdefault(deployment.client.view, {})
            for instance, worker in deployment.workers.items():
                if worker.slots is not None:
                    known[instance] = max(worker.slots, known.get(instance, 0))
        for view, known in slots.items():
            view.set_slots(known)
        self.monitor.follow(self._deployments)

    async def _load(self, checksum: str, card: _Card) -> bool:
        if checksum not in self._preprocessors:
            try:
                preprocessor = await asyncio.to_thread(Preprocessor.from_card, card.card, clock=self._clock)
            except StatorError as error:
                self._refuse(card.key, error.message)
                return False
            except Exception as error:
                logger.debug("loading %s failed", card.card.display_name, exc_info=error)
                self._refuse(card.key, f"its files cannot be loaded: {error}")
                return False
            self._preprocessors[checksum] = preprocessor
        return True

    def _refuse(self, key: RecordKey, reason: str) -> None:
        if (key, reason) not in self._refused:
            if len(self._refused) > _REFUSALS:
                self._refused.clear()
            self._refused.add((key, reason))
            logger.error("model of instance %x on %s is not served: %s", key.id, ".".join(key.segments), reason)

    # -- what is served

    def _publish(self) -> None:
        groups: dict[str, dict[str, list[Deployment]]] = {}
        for (_, name), deployment in self._deployments.items():
            groups.setdefault(name, {}).setdefault(deployment.checksum, []).append(deployment)
        for name in self._models.keys() - groups.keys():
            logger.info("model %s is gone", name)
        for name in groups.keys() - self._models.keys():
            places = sorted(str(each.endpoint) for group in groups[name].values() for each in group)
            logger.info("model %s is served by %s", name, ", ".join(places))
        before, self._models = (
            self._models,
            {
                name: [self._served(name, checksum, group) for checksum, group in by_checksum.items()]
                for name, by_checksum in groups.items()
            },
        )
        kept = {id(served) for entries in self._models.values() for served in entries}
        for served in (served for entries in before.values() for served in entries if id(served) not in kept):
            assert isinstance(served.engine, DeployedEngine)
            served.engine.spread_over(())
        used = {deployment.checksum for deployment in self._deployments.values()}
        for checksum in self._preprocessors.keys() - used:
            del self._preprocessors[checksum]

    def _served(self, name: str, checksum: str, deployments: list[Deployment]) -> ServedModel:
        """The entry it had before, if there was one, with the deployments of now."""
        known = self._models.get(name, ())
        for served in known:
            if served.preprocessor is self._preprocessors[checksum] and isinstance(served.engine, DeployedEngine):
                served.engine.spread_over(deployments)
                return served
        engine = DeployedEngine(name)
        engine.spread_over(deployments)
        return ServedModel(
            name=name,
            card=deployments[0].card,
            preprocessor=self._preprocessors[checksum],
            engine=engine,
            created=min((served.created for served in known), default=self._clock.wall()),
            instances=engine.instances,
        )


def _together(served: list[ServedModel]) -> ServedModel:
    if len(served) == 1:
        return served[0]
    return msgspec.structs.replace(
        served[0], instances=lambda: sorted({instance for each in served for instance in each.instances()})
    )
