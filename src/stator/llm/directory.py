"""Which models can be served now: the one watcher of model cards joined with live instances (`spec/50 §15`).

A model is there while at least one live instance has published a card of its name. Cards of one endpoint must agree (same
checksum); one that does not is reported and ignored. A model served by several endpoints spreads its requests over them by the number of
their instances.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager

from stator.clock import Clock
from stator.errors import StatorError, Unavailable
from stator.llm.card import ModelCard, ModelType, card_from_json, mdcsum
from stator.llm.output import EngineOutput
from stator.llm.preprocess import Preprocessor
from stator.llm.request import PreprocessedRequest
from stator.llm.served import ServedModel, TokenStream
from stator.protocol.ids import EndpointId
from stator.protocol.records import EndpointRecord, ModelRecord, Query, RecordKey
from stator.runtime.client import Client
from stator.runtime.runtime import Runtime
from stator.tasks import Scope

__all__ = ["ModelDirectory"]

logger = logging.getLogger(__name__)

MakeClient = Callable[[EndpointId], Client]


class _Deployment:
    """One endpoint that serves a model: its card, its checksum, and the instances that agree with it."""

    def __init__(self, endpoint: EndpointId, card: ModelCard, checksum: str, client: Client) -> None:
        self.endpoint = endpoint
        self.card = card
        self.checksum = checksum
        self.client = client
        self.instances: tuple[int, ...] = ()


class _Engine:
    """`TokenEngine` over the deployments of one model."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = 0
        self.deployments: list[_Deployment] = []

    def instances(self) -> list[int]:
        return sorted({instance for deployment in self.deployments for instance in deployment.instances})

    def generate(
        self, request: PreprocessedRequest, *, request_id: str, metadata: dict[str, str], headers: dict[str, str]
    ) -> TokenStream:
        client = self._client()
        return client.generate(request, id=request_id, metadata=metadata, headers=headers)

    def _client(self) -> Client:
        """Endpoints in turn, each as often as it has instances."""
        deployments = self.deployments
        if len(deployments) == 1:
            return deployments[0].client
        total = sum(len(deployment.instances) for deployment in deployments)
        if not total:
            raise Unavailable(f"no workers available for model {self._name!r}")
        self._turn = (self._turn + 1) % total
        turn = self._turn
        for deployment in deployments:
            turn -= len(deployment.instances)
            if turn < 0:
                return deployment.client
        return deployments[-1].client


class ModelDirectory:
    """`ModelSource` over discovery. Made by `ModelDirectory.follow`."""

    def __init__(self, runtime: Runtime, clock: Clock, policy: str | None) -> None:
        self._runtime = runtime
        self._clock = clock
        self._policy = policy
        self._models: dict[str, ServedModel] = {}
        self._engines: dict[str, _Engine] = {}
        self._deployments: dict[tuple[EndpointId, str], _Deployment] = {}
        self._preprocessors: dict[str, Preprocessor] = {}
        self._cards: dict[RecordKey, ModelRecord] = {}
        self._alive: set[tuple[EndpointId, int]] = set()
        self._refused: set[tuple[RecordKey, str]] = set()
        self._synced = asyncio.Event()
        self._news = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def follow(
        cls, runtime: Runtime, *, clock: Clock, policy: str | None = None
    ) -> "AsyncGenerator[ModelDirectory, None]":
        """A directory that keeps up with discovery inside the block. On entry the models known so far are loaded (at most 10 s)."""
        directory = cls(runtime, clock, policy)
        async with Scope("model directory") as scope:
            scope.spawn(directory._follow_cards(), name="model cards")
            scope.spawn(directory._follow_instances(), name="instances")
            scope.spawn(directory._rebuild_on_news(), name="models")
            try:
                async with asyncio.timeout(10.0):
                    await directory._synced.wait()
            except TimeoutError:
                logger.warning("discovery has not answered yet; models will appear when it does")
            yield directory

    # -- ModelSource

    def get(self, name: str) -> ServedModel | None:
        return self._models.get(name)

    def models(self) -> list[ServedModel]:
        return [self._models[name] for name in sorted(self._models)]

    # -- following discovery

    async def _follow_cards(self) -> None:
        async with self._runtime.discovery.watch(Query(ModelRecord.bucket)) as watch:
            async for _ in watch:
                self._cards = {key: record for key, record in watch.current.items() if isinstance(record, ModelRecord)}
                self._news.set()

    async def _follow_instances(self) -> None:
        async with self._runtime.discovery.watch(Query(EndpointRecord.bucket)) as watch:
            async for _ in watch:
                self._alive = {
                    (record.endpoint_id, record.instance_id)
                    for record in watch.current.values()
                    if isinstance(record, EndpointRecord)
                }
                self._news.set()

    async def _rebuild_on_news(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            await self._rebuild()
            self._synced.set()

    async def _rebuild(self) -> None:
        """Make `models` say what is true now. Loading a tokenizer happens in a thread; the old state stays valid meanwhile."""
        found: dict[tuple[EndpointId, str], list[int]] = {}
        for key, record in self._cards.items():
            endpoint = record.endpoint_id
            if (endpoint, record.instance_id) not in self._alive:
                continue
            deployment = await self._deployment(key, record)
            if deployment is not None:
                found.setdefault((endpoint, deployment.card.display_name), []).append(record.instance_id)
        for place in self._deployments.keys() - found.keys():
            del self._deployments[place]
        for place, instances in found.items():
            self._deployments[place].instances = tuple(instances)
        self._publish()

    async def _deployment(self, key: RecordKey, record: ModelRecord) -> _Deployment | None:
        """Where this card belongs; None if it cannot be served."""
        try:
            card = card_from_json(record.card_json)
        except StatorError as error:
            return self._refuse(key, f"its card cannot be read: {error}")
        if not card.model_types & {ModelType.CHAT, ModelType.COMPLETIONS}:
            return self._refuse(key, f"its type {card.model_type!r} is neither chat nor completions")
        checksum = mdcsum(card)
        place = (record.endpoint_id, card.display_name)
        deployment = self._deployments.get(place)
        if deployment is not None:
            if deployment.checksum == checksum:
                return deployment
            return self._refuse(key, "its card differs from the one its endpoint serves; drain the old workers first")
        if checksum not in self._preprocessors:
            try:
                preprocessor = await asyncio.to_thread(Preprocessor.from_card, card, clock=self._clock)
            except StatorError as error:
                return self._refuse(key, error.message)
            except Exception as error:
                logger.debug("loading %s failed", card.display_name, exc_info=error)
                return self._refuse(key, f"its files cannot be loaded: {error}")
            self._preprocessors[checksum] = preprocessor
        client = await self._runtime.endpoint(str(record.endpoint_id)).client(self._policy, item_type=EngineOutput)
        deployment = self._deployments[place] = _Deployment(record.endpoint_id, card, checksum, client)
        return deployment

    def _refuse(self, key: RecordKey, reason: str) -> None:
        if (key, reason) not in self._refused:
            if len(self._refused) > 10_000:
                self._refused.clear()
            self._refused.add((key, reason))
            logger.error("model of instance %x on %s is not served: %s", key.id, ".".join(key.segments), reason)

    def _publish(self) -> None:
        by_name: dict[str, list[_Deployment]] = {}
        for deployment in self._deployments.values():
            by_name.setdefault(deployment.card.display_name, []).append(deployment)
        for name in self._models.keys() - by_name.keys():
            logger.info("model %s is gone", name)
            del self._models[name], self._engines[name]
        for name, deployments in by_name.items():
            engine = self._engines.get(name)
            if engine is None:
                engine = self._engines[name] = _Engine(name)
            engine.deployments = deployments
            first = deployments[0]
            known = self._models.get(name)
            if known is None or known.card is not first.card:
                logger.info("model %s is served by %s", name, first.endpoint)
                self._models[name] = ServedModel(
                    name=name,
                    card=first.card,
                    preprocessor=self._preprocessors[first.checksum],
                    engine=engine,
                    created=known.created if known is not None else self._clock.wall(),
                    instances=_instances_of(engine),
                )
        used = {deployment.checksum for deployment in self._deployments.values()}
        for checksum in self._preprocessors.keys() - used:
            del self._preprocessors[checksum]


def _instances_of(engine: _Engine) -> Callable[[], Sequence[int]]:
    return engine.instances
