"""How the native plane is plugged in."""

from stator.protocol.native.hello import VERSION
from stator.protocol.records import EndpointRecord, NativeAddress
from stator.transports.native.client import NativeClient
from stator.transports.native.config import NativeConfig
from stator.transports.native.server import NativeServer
from stator.transports.plane import PlaneHost

__all__ = ["NativePlane"]


class NativePlane:
    """`stator.transports.plane.Plane` of the native plane."""

    name = "native"

    def reaches(self, record: EndpointRecord) -> bool:
        """Whether the instance speaks a version of ours."""
        native = record.stator
        return isinstance(native, NativeAddress) and native.plane >= VERSION

    async def listen(self, host: PlaneHost) -> NativeServer:
        """Open the worker's listeners."""
        return await NativeServer.listen(host.load(NativeConfig), host)

    async def connect(self, host: PlaneHost) -> NativeClient:
        """Start the caller's side."""
        return await NativeClient.start(host.load(NativeConfig), host)
