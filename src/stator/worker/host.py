"""What a worker needs around it: a place in a cluster, and an endpoint to serve on."""

from typing import Any, Protocol

from stator.events.interface import EventPlane
from stator.health import EngineRoutes, SystemHealth
from stator.protocol.ids import EndpointId
from stator.protocol.records import ModelRecord
from stator.runtime.engine import Generate
from stator.telemetry import MetricsLevel

__all__ = ["ServedEndpoint", "WorkerHost"]


class ServedEndpoint(Protocol):
    """An endpoint that takes requests. Leaving discovery, refusing requests and closing are three steps."""

    @property
    def inflight(self) -> int:
        """Requests that have not ended."""
        ...

    async def register(self) -> None:
        """Put the record into discovery again."""
        ...

    async def unregister(self) -> None:
        """Remove the record from discovery; requests that still come are served."""
        ...

    def drain(self) -> None:
        """Refuse new requests from now on."""
        ...

    async def idle(self) -> None:
        """Wait until no request is running."""
        ...

    def kill_all(self) -> None:
        """Kill what is still running."""
        ...

    async def aclose(self) -> None:
        """Stop serving. Idempotent."""
        ...


class WorkerHost(Protocol):
    """A connected runtime, as a worker sees it."""

    @property
    def instance_id(self) -> int: ...

    @property
    def metrics(self) -> MetricsLevel:
        """The root of the process' metrics."""
        ...

    @property
    def health(self) -> SystemHealth: ...

    @property
    def engine_routes(self) -> EngineRoutes: ...

    @property
    def events(self) -> EventPlane: ...

    async def serve(
        self, endpoint: EndpointId, generate: Generate, *, slots: int | None = None, **options: Any
    ) -> ServedEndpoint:
        """On return requests are taken and the endpoint's record is in discovery.

        `slots`: requests the engine answers at once, where the operator has not set a number. Options: `canary_payload`,
        `metrics_labels` (`stator.runtime.Endpoint.start`).
        """
        ...

    async def publish(self, record: ModelRecord) -> None: ...

    async def withdraw(self, record: ModelRecord) -> None: ...
