"""Which event plane a runtime has."""

from collections.abc import Callable, Mapping
from typing import Any

from stator import settings
from stator.errors import ConfigError
from stator.events import EventHost, EventPlane, MemoryBus, MemoryEvents, MemoryEventsConfig
from stator.runtime.plugins import config_type, load_plugin

__all__ = ["OpenEvents", "choose_event_plane"]

OpenEvents = Callable[[EventHost], EventPlane]


def choose_event_plane(given: str | MemoryBus, *, in_memory: bool, sections: Mapping[str, Any]) -> OpenEvents:
    """The plane that is meant; `in_memory` says whether discovery is, which decides for `auto`. Reads the disk.

    Raises `ConfigError` when there is no such plug-in, or its settings do not fit.
    """
    if isinstance(given, MemoryBus):
        return lambda host: MemoryEvents(MemoryEventsConfig(), host=host, bus=given)
    name = ("memory" if in_memory else "zmq") if given == "auto" else given
    factory = load_plugin("stator.events", name)
    kind = config_type(factory)
    if kind is None:
        raise ConfigError(f"event plane plug-in {name!r} does not say which settings it takes")
    prefix = f"{kind.section}."
    own = settings.load(kind, {key.removeprefix(prefix): value for key, value in sections.items() if key.startswith(prefix)})
    return lambda host: factory(own, host=host)
