"""How the HTTP/2 plane is plugged in. Nothing of the library is imported before the plane is used."""

from stator.protocol.records import EndpointRecord
from stator.transports.http2.config import Http2Config
from stator.transports.plane import PlaneClient, PlaneHost, PlaneServer

__all__ = ["Http2Plane"]


class Http2Plane:
    """`stator.transports.plane.Plane` of the HTTP/2 plane."""

    name = "http2"

    def reaches(self, record: EndpointRecord) -> bool:
        """Whether the instance takes requests over HTTP."""
        return record.transport.http is not None

    async def listen(self, host: PlaneHost) -> PlaneServer:
        """Open the worker's listener."""
        from stator.transports.http2.server import Http2Server

        return await Http2Server.listen(host.load(Http2Config), host)

    async def connect(self, host: PlaneHost) -> PlaneClient:
        """Connections are made on first use."""
        from stator.transports.http2.client import Http2Client

        return await Http2Client.start(host.load(Http2Config), host)
