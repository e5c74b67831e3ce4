"""The reference's runtime object."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from stator.dynamo.endpoint import Endpoint
from stator.dynamo.errors import InvalidType, InvalidValue, NotThere
from stator.dynamo.membership import Membership
from stator.errors import UsageError
from stator.protocol.ids import EndpointId

__all__ = ["Component", "DistributedRuntime", "Namespace"]


class DistributedRuntime:
    """A process' membership in a cluster. Made at once, connected at the first `await` that needs it, left by `shutdown`.

    `discovery_backend` is `file`, `etcd`, `kubernetes` or `mem`. `request_plane` (`tcp` or `nats`) is how the reference's processes reach
    this one; between Stator processes requests travel on a plane of its own. Arguments win over `DYN_*` and `STATOR_*` variables; None
    asks those.
    """

    def __init__(
        self,
        event_loop: asyncio.AbstractEventLoop | None,
        discovery_backend: str | None,
        request_plane: str | None,
        enable_nats: bool | None = None,
        *,
        event_plane: str | None = None,
    ) -> None:
        """Raises `ValueError` for planes that nobody has. `enable_nats` is ignored: NATS is used where a plane is."""
        self._loop = event_loop
        self._membership = Membership(discovery=discovery_backend, request_plane=request_plane, event_plane=event_plane)

    async def connected(self) -> "DistributedRuntime":
        """Connect now; from then on `connection_id` and the makers of metrics work. Stator's own. Raises what connecting raises."""
        await self._membership.runtime()
        return self

    def namespace(self, name: str) -> "Namespace":
        """`namespace(a).component(b).endpoint(c)` is `endpoint("a.b.c")`. Not in 1.3.1."""
        return Namespace(self, name)

    def endpoint(self, path: str) -> Endpoint:
        """The endpoint at `namespace.component.endpoint`, with or without `dyn://`. Raises `ValueError` for anything else."""
        if not isinstance(path, str):  # pyright: ignore[reportUnnecessaryIsInstance]: callers are untyped
            raise InvalidType(f"an endpoint path must be a text, not {type(path).__name__}")
        parts = path.removeprefix("dyn://").split(".")
        if len(parts) != 3:
            raise InvalidValue(
                f"Invalid endpoint path '{path}'. Expected format: 'namespace.component.endpoint' or"
                " 'dyn://namespace.component.endpoint'"
            )
        try:
            return Endpoint(self._membership, EndpointId(*parts))
        except UsageError as error:
            raise InvalidValue(f"Invalid endpoint path '{path}': {error.message}") from error

    def shutdown(self) -> None:
        """Begin to leave: `serve_endpoint` drains and returns, clients see nobody. Idempotent."""
        self._membership.shutdown()

    async def aclose(self, *, drain: bool = True) -> None:
        """`shutdown`, and wait until the cluster is left. Stator's own. Without `drain`, or cancelled, requests are ended at once."""
        await self._membership.aclose(drain=drain)

    def event_loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop it was given."""
        return self._loop

    def system_status_server_url(self) -> str | None:
        """Where the status server answers; None if it does not, or not yet."""
        runtime = self._membership.connected
        return None if runtime is None else runtime.status_url

    def set_health_status(self, ready: bool) -> None:
        """What this process says of its own health; decides when neither endpoints nor canaries do."""
        if not isinstance(ready, bool):  # pyright: ignore[reportUnnecessaryIsInstance]: callers are untyped
            raise InvalidType(f"ready must be a bool, not {type(ready).__name__}")
        self._membership.when_connected(lambda runtime: runtime.health.set_system(ready))

    def register_engine_route(self, route_name: str, callback: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> None:
        """Answer `/engine/{route_name}` of the status server with what `callback(body)` returns, instead of any before it."""
        if not callable(callback):
            raise InvalidType(f"the callback of engine route {route_name!r} must be an async function")
        if not route_name.strip("/"):
            raise InvalidValue("an engine route needs a name, like control/start_profile")
        self._membership.when_connected(lambda runtime: runtime.engine_routes.register(route_name, callback))

    @property
    def membership(self) -> Membership:
        """The runtime behind it."""
        return self._membership

    @staticmethod
    def detached() -> "DistributedRuntime":
        """Raises `NotThere`: it belongs to programs that embed the reference's runtime."""
        raise NotThere("DistributedRuntime.detached is not planned: Stator's runtime always belongs to an event loop")

    def to_capsule(self) -> Any:
        """Raises `NotThere`: there is no native runtime to hand on."""
        raise NotThere(
            "DistributedRuntime.to_capsule is not planned: Stator has no native runtime to hand to an extension module"
        )


class Namespace:
    """The first part of a path."""

    def __init__(self, runtime: DistributedRuntime, name: str) -> None:
        self._runtime = runtime
        self._name = name

    def component(self, name: str) -> "Component":
        """The component `name`."""
        return Component(self._runtime, f"{self._name}.{name}")


class Component:
    """The first two parts of a path."""

    def __init__(self, runtime: DistributedRuntime, path: str) -> None:
        self._runtime = runtime
        self._path = path

    def endpoint(self, name: str) -> Endpoint:
        """The endpoint `name`. Raises `ValueError` if one of the names is none."""
        return self._runtime.endpoint(f"{self._path}.{name}")
