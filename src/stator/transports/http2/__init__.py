"""The HTTP/2 plane: for meshes and proxies that understand HTTP only."""

from stator.transports.http2.config import Http2Config
from stator.transports.http2.plane import Http2Plane

__all__ = ["Http2Config", "Http2Plane"]
