"""What a process gives to its event plane, and how a plane is plugged in."""

from collections.abc import Callable
from random import Random

import msgspec

from stator.clock import Clock
from stator.discovery.interface import Discovery
from stator.events.config import EventsConfig
from stator.events.interface import EventPlane
from stator.protocol.event_frame import OVERHEAD

__all__ = ["EventHost", "EventPlaneFactory"]


class EventHost(msgspec.Struct, frozen=True, kw_only=True):
    """The surroundings of an event plane. Discovery is open, and stays so until the plane is closed."""

    discovery: Discovery
    clock: Clock
    random: Random
    """for publisher ids, which must be unique in the cluster: not a seeded one that others have too"""
    config: EventsConfig
    bind_host: str = "127.0.0.1"
    """address listeners bind to"""
    advertise_host: str = "127.0.0.1"
    """address written into records: never a wildcard"""

    @property
    def max_envelope(self) -> int:
        """Bytes of the largest envelope that is read."""
        return self.config.max_payload + OVERHEAD + 1024


EventPlaneFactory = Callable[..., EventPlane]
"""What the entry points of group `stator.events` name: `factory(config, *, host: EventHost)`.

Called on the event loop when the runtime joins; nothing is opened before the first publisher or subscription. The annotation of
the first parameter is the plane's `Config` struct, which `stator.settings.load` fills.
"""
