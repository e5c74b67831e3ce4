"""The endpoints that serve one model, and how requests spread over them."""

import logging
from collections.abc import Callable, Mapping, Sequence

import msgspec

from stator.errors import Unavailable
from stator.llm.card import ModelCard, WorkerType
from stator.llm.kv_load import KvCapacity, kv_capacity
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.llm.served import TokenStream
from stator.protocol.ids import EndpointId
from stator.runtime.client import Client
from stator.runtime.runtime import Runtime

__all__ = ["DeployedEngine", "DeployedWorker", "Deployment", "turns"]

logger = logging.getLogger(__name__)

_OTHER_CARD = "it serves another card, or none"
_GONE = "the card that requests were prepared for is no longer served"


class DeployedWorker(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one worker that serves a model."""

    capacity: KvCapacity = KvCapacity()
    slots: int | None = None
    """requests it runs at once: `max_num_seqs`, which is per rank, times its ranks; None: its card does not say"""
    kind: WorkerType | None = None
    repeats: bool = False
    """whether it repeats its load reports: Stator's do"""

    @classmethod
    def of(cls, card: ModelCard, *, repeats: bool) -> "DeployedWorker":
        """What its card says."""
        slots, ranks = card.runtime_config.max_num_seqs, max(1, card.runtime_config.data_parallel_size)
        if slots is not None:
            slots *= ranks
        return cls(capacity=kv_capacity(card), slots=slots, kind=card.worker_type, repeats=repeats)


class Deployment:
    """One endpoint that serves a model: the card its workers agree on, and these workers. No others get its requests."""

    def __init__(self, model: str, endpoint: EndpointId, card: ModelCard, checksum: str, client: Client) -> None:
        self.model = model
        self.endpoint = endpoint
        self.card = card
        self.checksum = checksum
        self.client = client
        self.workers: Mapping[int, DeployedWorker] = {}
        self._availability = client.set_apart()
        self._availability.restrict_to(frozenset(), _OTHER_CARD)

    @classmethod
    async def open(
        cls, runtime: Runtime, model: str, endpoint: EndpointId, card: ModelCard, checksum: str, *, policy: str | None
    ) -> "Deployment":
        """Join the endpoint's callers; at most 5 s until its instances are known."""
        client = await runtime.endpoint(str(endpoint)).client(policy, item_type=EngineOutput)
        return cls(model, endpoint, card, checksum, client)

    @property
    def instances(self) -> list[int]:
        """The ids of its workers, sorted."""
        return sorted(self.workers)

    def set_workers(self, workers: Mapping[int, DeployedWorker]) -> None:
        """These are all that agree on the card now."""
        self.workers = workers
        self._availability.restrict_to(frozenset(workers), _OTHER_CARD)
        self.client.view.more_room()

    def set_busy(self, busy: Mapping[int, str]) -> None:
        """These are over their limits: id → which limit and value (`Availability.set_busy`)."""
        if self._availability.set_busy(busy):
            self.client.view.more_room()

    def retire(self) -> None:
        """Nobody serves its card any more: requests prepared for it, which may still be on their way here, would be misread."""
        self.workers = {}
        self._availability.restrict_to(frozenset(), _GONE)


class DeployedEngine:
    """`TokenEngine` over the deployments of one model that have the same card: each as often as it has instances."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = 0
        self._deployments: Sequence[Deployment] = ()
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._watches: list[Callable[[], None]] = []

    def spread_over(self, deployments: Sequence[Deployment]) -> None:
        """These are all its deployments now."""
        self._deployments = deployments
        self._watch()
        self._more_room()

    def instances(self) -> list[int]:
        """The ids of all workers, sorted."""
        return sorted({instance for deployment in self._deployments for instance in deployment.workers})

    def generate(
        self, request: PreprocessedRequest, *, request_id: str, metadata: dict[str, str], headers: dict[str, str]
    ) -> TokenStream:
        return self._next().client.generate(request, id=request_id, metadata=metadata, headers=headers)

    def _next(self) -> Deployment:
        """Whose turn it is; another one that has room, when that one has none."""
        deployments = self._deployments
        if len(deployments) == 1:
            return deployments[0]
        if not deployments:
            raise Unavailable(f"no workers available for model {self._name!r}")
        self._turn += 1
        first = turns([len(deployment.workers) for deployment in deployments], self._turn)
        for deployment in (*deployments[first:], *deployments[:first]):
            if deployment.client.room() != 0:
                return deployment
        return deployments[first]

    # -- room

    def room(self) -> int | None:
        room = 0
        for deployment in self._deployments:
            here = deployment.client.room()
            if here is None:
                return None
            room += here
        return room

    def pressure(self) -> str:
        if not self._deployments:
            return f"no workers available for model {self._name!r}"
        if self.room() != 0:
            return ""
        return "; ".join(deployment.client.pressure() for deployment in self._deployments)

    def on_room(self, callback: Callable[[], None]) -> Callable[[], None]:
        token = object()
        self._callbacks[token] = callback
        if len(self._callbacks) == 1:
            self._watch()

        def end() -> None:
            if self._callbacks.pop(token, None) is not None and not self._callbacks:
                self._watch()

        return end

    def _watch(self) -> None:
        """Watch the instances of all deployments if anybody wants to know, else of none."""
        for end in self._watches:
            end()
        views = {deployment.client.view for deployment in self._deployments}
        self._watches = [view.watch_room(self._more_room) for view in views] if self._callbacks else []

    def _more_room(self) -> None:
        for callback in tuple(self._callbacks.values()):
            try:
                callback()
            except Exception:
                logger.exception("somebody who waits for room for model %s failed", self._name)


def turns(weights: Sequence[int], turn: int) -> int:
    """Whose turn it is: the index of one of `weights`, each as often as its weight says, in a fixed order."""
    total = sum(weights)
    if not total:
        return turn % len(weights)
    turn %= total
    for place, weight in enumerate(weights):
        turn -= weight
        if turn < 0:
            return place
    return len(weights) - 1
