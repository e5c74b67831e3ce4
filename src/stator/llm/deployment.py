"""The endpoints that serve one model, and how requests spread over them."""

from collections.abc import Sequence
from random import Random

from stator.errors import Unavailable
from stator.llm.card import ModelCard
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.llm.served import TokenStream
from stator.protocol.ids import EndpointId
from stator.routing import Candidate, Policy, RouteRequest
from stator.runtime.client import Client
from stator.runtime.runtime import Runtime

__all__ = ["DeployedEngine", "Deployment", "turns"]


class Deployment:
    """One endpoint that serves a model: the card its instances agree on, and those that do not agree."""

    def __init__(self, endpoint: EndpointId, card: ModelCard, checksum: str, client: Client, refused: set[int]) -> None:
        self.endpoint = endpoint
        self.card = card
        self.checksum = checksum
        self.client = client
        self.instances: tuple[int, ...] = ()
        self.refused = refused
        """instances of the endpoint that have another card: they get no requests"""

    @classmethod
    async def open(
        cls, runtime: Runtime, endpoint: EndpointId, card: ModelCard, checksum: str, *, policy: str | None
    ) -> "Deployment":
        """Join the endpoint's callers; at most 5 s until its instances are known."""
        refused = set[int]()
        chosen = _Agreeing(runtime.policy(policy), refused)
        client = await runtime.endpoint(str(endpoint)).client(chosen, item_type=EngineOutput)
        return cls(endpoint, card, checksum, client, refused)


class _Agreeing:
    """A policy that leaves out some instances."""

    __slots__ = ("_policy", "_refused", "name", "needs_load")

    def __init__(self, policy: Policy, refused: set[int]) -> None:
        self._policy = policy
        self._refused = refused
        self.name = policy.name
        self.needs_load = policy.needs_load

    def choose(self, free: Sequence[Candidate], request: RouteRequest, random: Random) -> Candidate:
        if self._refused:
            free = [candidate for candidate in free if candidate.instance_id not in self._refused]
            if not free:
                raise Unavailable("no worker that serves the model is free")
        return self._policy.choose(free, request, random)


class DeployedEngine:
    """`TokenEngine` over the deployments of one model that have the same card: each as often as it has instances."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = 0
        self.deployments: list[Deployment] = []

    def instances(self) -> list[int]:
        """The ids of all workers, sorted."""
        return sorted({instance for deployment in self.deployments for instance in deployment.instances})

    def generate(
        self, request: PreprocessedRequest, *, request_id: str, metadata: dict[str, str], headers: dict[str, str]
    ) -> TokenStream:
        deployments = self.deployments
        place = 0
        if len(deployments) > 1:
            self._turn += 1
            place = turns([len(deployment.instances) for deployment in deployments], self._turn)
        elif not deployments:
            raise Unavailable(f"no workers available for model {self._name!r}")
        return deployments[place].client.generate(request, id=request_id, metadata=metadata, headers=headers)


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
