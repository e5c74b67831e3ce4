"""Plug-ins by entry point: discovery backends, planes and routing policies, the built-in ones included."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from stator.errors import ConfigError

__all__ = ["load_plugin", "plugin_names"]


@cache
def _registered(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


def plugin_names(group: str) -> list[str]:
    """The names registered in `group` (`stator.discovery`, `stator.transports`, `stator.routing`, `stator.engines`)."""
    return sorted(_registered(group))


def load_plugin(group: str, name: str) -> Any:
    """What the entry point `name` of `group` refers to; `ConfigError` if there is none or it cannot be imported."""
    entry = _registered(group).get(name)
    if entry is None:
        raise ConfigError(f"{group} has no plug-in called {name!r}; there are: {', '.join(plugin_names(group)) or 'none'}")
    try:
        return entry.load()
    except ImportError as error:
        raise ConfigError(f"the plug-in {name!r} of {group} cannot be loaded: {error}") from error
