"""The native plane on sockets: what two Stator processes use (`docs/native-plane.md`)."""

from stator.transports.native.client import NativeClient
from stator.transports.native.config import NativeConfig
from stator.transports.native.plane import NativePlane
from stator.transports.native.server import NativeServer

__all__ = ["NativeClient", "NativeConfig", "NativePlane", "NativeServer"]
