"""How the NATS plane is plugged in. Nothing of the library is imported before the plane is used."""

from stator.errors import ConfigError
from stator.protocol.records import EndpointRecord
from stator.transports.plane import PlaneClient, PlaneHost, PlaneServer

__all__ = ["NatsPlane"]


class NatsPlane:
    """`stator.transports.plane.Plane` of the compatible plane over NATS."""

    name = "nats"

    def reaches(self, record: EndpointRecord) -> bool:
        """Whether the instance takes requests by a NATS subject."""
        return record.transport.nats_tcp is not None

    async def listen(self, host: PlaneHost) -> PlaneServer:
        """Connect, ready to subscribe."""
        raise ConfigError("the plane is not there yet")

    async def connect(self, host: PlaneHost) -> PlaneClient:
        """Open the listener for answers and connect."""
        raise ConfigError("the plane is not there yet")
