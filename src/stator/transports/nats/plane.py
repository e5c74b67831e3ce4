"""How the NATS plane is plugged in. Nothing of the library is imported before the plane is used."""

import asyncio
from importlib.metadata import version
from typing import TYPE_CHECKING

from stator.protocol.records import EndpointRecord
from stator.transports.nats.config import NatsConfig
from stator.transports.plane import PlaneHost

if TYPE_CHECKING:
    from stator.transports.nats.client import NatsClient
    from stator.transports.nats.server import NatsServer

__all__ = ["NatsPlane"]


class NatsPlane:
    """`stator.transports.plane.Plane` of the compatible plane over NATS."""

    name = "nats"

    def reaches(self, record: EndpointRecord) -> bool:
        """Whether the instance takes requests by a NATS subject."""
        return record.transport.nats_tcp is not None

    async def listen(self, host: PlaneHost) -> "NatsServer":
        """Connect, ready to subscribe. Raises `ConnectFailed` when no server takes us."""
        config = host.load(NatsConfig)
        kind, ours = await asyncio.to_thread(_load_server)
        return await kind.listen(config, host, version=ours)

    async def connect(self, host: PlaneHost) -> "NatsClient":
        """Open the listener for answers and try to connect."""
        config = host.load(NatsConfig)
        return await (await asyncio.to_thread(_load_client)).start(config, host)


def _load_server() -> "tuple[type[NatsServer], str]":
    """Reads the disk, not for the event loop."""
    from stator.transports.nats.server import NatsServer

    return NatsServer, version("stator")


def _load_client() -> "type[NatsClient]":
    """Reads the disk, not for the event loop."""
    from stator.transports.nats.client import NatsClient

    return NatsClient
