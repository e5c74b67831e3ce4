"""Names with behaviour: namespace → component → endpoint (`spec/20 §1`)."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from stator import settings
from stator.errors import UsageError
from stator.protocol.ids import EndpointId
from stator.protocol.records import EndpointRecord, Query
from stator.routing import Policy, RoutingConfig, policy_name
from stator.runtime.client import Client
from stator.runtime.engine import Engine, Handler, generate_function
from stator.runtime.plugins import load_plugin, plugin_names
from stator.runtime.served import ServedEndpoint, ServingOptions
from stator.runtime.services import Services
from stator.telemetry import MetricsLevel

__all__ = ["Component", "Endpoint", "Namespace", "make_policy"]


class Namespace:
    """A name space for components; may be nested (`parent.child`)."""

    def __init__(self, services: Services, name: str, components: "dict[tuple[str, str], Component]") -> None:
        if not name or "/" in name or ".." in f".{name}.":
            raise UsageError(f"namespace {name!r} must be non-empty, without '/' and without empty parts")
        self._services = services
        self._components = components
        self.name = name
        """the dotted name"""

    def __repr__(self) -> str:
        return f"<Namespace {self.name}>"

    @property
    def metrics(self) -> MetricsLevel:
        """Metrics of this namespace: they carry its label, and the page of the process shows them."""
        return self._services.meter.level(self.name)

    def namespace(self, name: str) -> "Namespace":
        """The namespace `name` inside this one."""
        return Namespace(self._services, f"{self.name}.{name}", self._components)

    def component(self, name: str) -> "Component":
        """The component `name`: always the same object for the same name."""
        key = (self.name, name)
        component = self._components.get(key)
        if component is None:
            component = self._components[key] = Component(self._services, self.name, name)
        return component


class Component:
    """A group of endpoints that scale together."""

    def __init__(self, services: Services, namespace: str, name: str) -> None:
        EndpointId(namespace, name, "x")  # checks the names
        self._services = services
        self.namespace = namespace
        self.name = name

    def __repr__(self) -> str:
        return f"<Component {self.namespace}.{self.name}>"

    @property
    def metrics(self) -> MetricsLevel:
        """Metrics of this component, with its labels."""
        return self._services.meter.level(self.namespace, self.name)

    def endpoint(self, name: str) -> "Endpoint":
        """The endpoint `name` of this component."""
        return Endpoint(self._services, EndpointId(self.namespace, self.name, name))

    async def list_instances(self) -> list[EndpointRecord]:
        """The records of all its endpoints' instances, ordered as the reference does: by endpoint and decimal id as text."""
        found = await self._services.discovery.list(Query(EndpointRecord.bucket, (self.namespace, self.name)))
        records = [record for record in found if isinstance(record, EndpointRecord)]
        return sorted(records, key=lambda record: (record.endpoint, str(record.instance_id)))


class Endpoint:
    """Something that can be served and called."""

    def __init__(self, services: Services, id: EndpointId) -> None:
        self._services = services
        self.id = id

    def __repr__(self) -> str:
        return f"<Endpoint {self.id}>"

    @property
    def metrics(self) -> MetricsLevel:
        """Metrics of this endpoint, with its labels, for its author; those of its requests are counted by themselves."""
        return self._services.meter.level(self.id.namespace, self.id.component, self.id.name)

    async def start(
        self,
        handler: Handler | Engine,
        *,
        device_type: str | None = None,
        metrics_labels: Sequence[tuple[str, str]] = (),
        canary_payload: Any = None,
        bidirectional: bool = False,
    ) -> ServedEndpoint:
        """Begin to serve; the caller ends it (`ServedEndpoint.finish`). On return requests are taken and the record is listed.

        `handler` is an async generator function of `(request)` or `(request, context)`, or an engine. Raises `UsageError` for anything
        else and for an endpoint name that this runtime serves already, `ConnectFailed` when no address can be bound, `Unavailable` when
        discovery cannot be written to.

        `metrics_labels` are put on each metric of its requests. `canary_payload` is the request that is sent in process when nobody
        else asked for a while (`health.canary`): while its answer is bad, the endpoint is not in discovery.

        A `bidirectional` handler takes conversations (`Client.converse`) and nothing else: `handler(inputs, context)`, where `inputs` is an
        async iterator that ends with the caller's inputs or when the conversation is stopped. Its `canary_payload` is the only input.
        """
        options = ServingOptions(
            device_type=device_type if device_type is not None else settings.device_type(),
            metrics_labels=metrics_labels,
            canary_payload=canary_payload,
            bidirectional=bidirectional,
        )
        return await ServedEndpoint.start(self._services, self.id, generate_function(handler), options)

    @asynccontextmanager
    async def serving(self, handler: Handler | Engine, **options: Any) -> AsyncGenerator[ServedEndpoint, None]:
        """Serve inside the block; leaving it drains (at most `shutdown_timeout` seconds). `options` are those of `start`."""
        served = await self.start(handler, **options)
        try:
            yield served
        except BaseException:
            await served.aclose()
            raise
        await served.finish(self._services.config.shutdown_timeout)

    async def serve(self, handler: Handler | Engine, **options: Any) -> None:
        """Serve until the runtime shuts down, then drain. Cancelling it stops at once: running requests are killed. `options`: `start`."""
        if self._services.closing.is_set():
            return
        async with self.serving(handler, **options):
            await self._services.closing.wait()

    async def client(self, policy: str | Policy | None = None, *, item_type: Any = Any) -> Client:
        """A client of this endpoint. Returns when the present instances are known (at most 5 s; later they appear by themselves).

        `policy` is a name (`round_robin`, `random`, `power_of_two`, `least_loaded`, `device_weighted`, `direct`, or a plug-in's) or an
        object; default: the setting. Items are decoded as `item_type`, any type msgspec can decode.
        """
        client = Client(self._services, self.id, make_policy(policy, self._services.routing), item_type=item_type)
        try:
            async with asyncio.timeout(5.0):
                await self._services.view(self.id).synced.wait()
        except TimeoutError:
            pass
        return client


def make_policy(policy: str | Policy | None, routing: RoutingConfig) -> Policy:
    """A policy by name (default: the setting), or the object itself. Raises `UsageError` for an unknown name."""
    if policy is not None and not isinstance(policy, str):
        return policy
    name = policy_name(policy or routing.policy, plugin_names("stator.routing"))
    make = load_plugin("stator.routing", name)
    return make(ratio=routing.device_ratio) if name == "device_weighted" else make()
