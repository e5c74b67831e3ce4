"""What a runtime's parts share. Namespaces, endpoints and clients hold this struct, never the runtime itself."""

import asyncio
import logging
from random import Random
from typing import TYPE_CHECKING, Protocol

import msgspec

from stator.clock import Clock
from stator.discovery.interface import Discovery
from stator.errors import UsageError
from stator.events import EventPlane
from stator.health import EngineRoutes, HealthConfig, SystemHealth
from stator.protocol.ids import EndpointId
from stator.routing import RoutingConfig
from stator.runtime.config import RuntimeConfig
from stator.runtime.meter import ProcessMeter
from stator.runtime.network import Network
from stator.runtime.view import InstanceView
from stator.tasks import DeadlineWheel, Scope

if TYPE_CHECKING:
    from stator.health.server import StatusServer

__all__ = ["RequestIds", "Servable", "Services", "ViewsObserver"]

logger = logging.getLogger(__name__)


class RequestIds:
    """Request ids: unique, in the form of a UUID of version 4, at the price of a counter."""

    def __init__(self, random: Random) -> None:
        text = f"{random.getrandbits(60):015x}"
        self._prefix = f"{text[:8]}-{text[8:12]}-4{text[12:15]}-8{random.getrandbits(12):03x}-"
        self._next = 0

    def __call__(self) -> str:
        self._next += 1
        return f"{self._prefix}{self._next:012x}"


class Servable(Protocol):
    """A served endpoint, as the others of its runtime and shutting down see it."""

    @property
    def listed(self) -> bool: ...

    @property
    def inflight(self) -> int: ...

    async def leave(self) -> None: ...

    async def enter(self) -> None: ...

    async def finish(self, timeout: float) -> None: ...


class Services(msgspec.Struct, kw_only=True):
    """One runtime's discovery, events, planes, time, tasks and views."""

    config: RuntimeConfig
    routing: RoutingConfig
    discovery: Discovery
    events: EventPlane
    network: Network
    wheel: DeadlineWheel
    scope: Scope
    clock: Clock
    random: Random
    new_id: RequestIds
    closing: asyncio.Event
    """set when shutdown begins"""
    views: dict[EndpointId, InstanceView]
    meter: ProcessMeter
    health: SystemHealth
    health_config: HealthConfig
    engine_routes: EngineRoutes
    status: "StatusServer | None"
    served: "dict[str, Servable]"
    """what this process serves, by the path that requests name"""

    def view(self, endpoint: EndpointId) -> InstanceView:
        """The instances of an endpoint: one watch and one occupancy table for all clients of the process."""
        view = self.views.get(endpoint)
        if view is None:
            if self.scope.closed:
                raise UsageError("the runtime has left its cluster; connect again")
            view = InstanceView(endpoint, self.routing, self.wheel.now, self.network.forget)
            self.views[endpoint] = view
            self.scope.spawn(view.follow(self.discovery), name=f"watch {endpoint}")
        return view


class ViewsObserver:
    """Hands news about instances from the planes to every view (`stator.transports.plane.InstanceObserver`)."""

    def __init__(self, views: dict[EndpointId, InstanceView]) -> None:
        self._views = views

    def suspect(self, instance: int) -> None:
        for view in self._views.values():
            view.availability.mark_suspect(instance)

    def recovered(self, instance: int) -> None:
        for view in self._views.values():
            view.availability.mark_success(instance)  # what failed on the way to it was not its fault

    def lost(self, instance: int, reason: str) -> None:
        for view in self._views.values():
            view.availability.clear_suspect(instance)
            view.availability.mark_inhibited(instance, view.now(), reason)

    def draining(self, instance: int) -> None:
        for view in self._views.values():
            view.availability.mark_draining(instance)
