"""How the HTTP/2 plane is plugged in. Nothing of the library is imported before the plane is used."""

from stator.errors import ConfigError
from stator.protocol.records import EndpointRecord
from stator.transports.plane import PlaneClient, PlaneHost, PlaneServer

__all__ = ["Http2Plane"]


class Http2Plane:
    """`stator.transports.plane.Plane` of the HTTP/2 plane."""

    name = "http2"

    def reaches(self, record: EndpointRecord) -> bool:
        """Whether the instance takes requests over HTTP."""
        return False

    async def listen(self, host: PlaneHost) -> PlaneServer:
        """Open the listener."""
        raise ConfigError("the plane is not there yet")

    async def connect(self, host: PlaneHost) -> PlaneClient:
        """Connections are made on first use."""
        raise ConfigError("the plane is not there yet")
