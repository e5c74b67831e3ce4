"""How the compatible TCP plane is plugged in."""

from stator.protocol.records import EndpointRecord
from stator.transports.plane import PlaneHost
from stator.transports.tcp.client import CompatibleClient
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.server import CompatibleServer

__all__ = ["CompatiblePlane"]


class CompatiblePlane:
    """`stator.transports.plane.Plane` of the compatible plane on TCP."""

    name = "tcp"

    def reaches(self, record: EndpointRecord) -> bool:
        """Whether the instance takes requests over TCP."""
        return record.transport.tcp is not None

    async def listen(self, host: PlaneHost) -> CompatibleServer:
        """Open the worker's listener."""
        return await CompatibleServer.listen(host.load(TcpConfig), host)

    async def connect(self, host: PlaneHost) -> CompatibleClient:
        """Open the listener for answers."""
        return await CompatibleClient.start(host.load(TcpConfig), host)
