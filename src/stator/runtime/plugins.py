"""Plug-ins by entry point: engines, discovery backends, event planes, planes and routing policies, the built-in ones included."""

import logging
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_type_hints

from stator import settings
from stator.config import Config
from stator.errors import ConfigError

__all__ = ["check_settings", "config_type", "load_plugin", "plugin_names"]

logger = logging.getLogger(__name__)

_GROUPS = ("stator.discovery", "stator.engines", "stator.events", "stator.routing", "stator.transports")


@cache
def _registered(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)}


def plugin_names(group: str) -> list[str]:
    """The names registered in `group` (`stator.discovery`, `stator.events`, `stator.transports`, `stator.routing`, `stator.engines`)."""
    return sorted(_registered(group))


def load_plugin(group: str, name: str) -> Any:
    """What the entry point `name` of `group` refers to; `ConfigError` if there is none or it cannot be imported."""
    entry = _registered(group).get(name)
    if entry is None:
        raise ConfigError(f"{group} has no plug-in called {name!r}; there are: {', '.join(plugin_names(group)) or 'none'}")
    try:
        return entry.load()
    except Exception as error:  # a plug-in's module may do anything
        logger.debug("loading the plug-in %s of %s failed", name, group, exc_info=error)
        reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"the plug-in {name!r} of {group} cannot be loaded: {reason}") from error


def config_type(plugin: Any) -> type[Config] | None:
    """The settings a plug-in takes: its `options_type`, or what its first parameter is annotated with."""
    found = getattr(plugin, "options_type", None)
    if found is None:
        try:
            function = plugin.__init__ if isinstance(plugin, type) else plugin
            found = next(iter(get_type_hints(function).values()), None)
        except (TypeError, NameError):
            return None
    return found if isinstance(found, type) and issubclass(found, Config) else None


def check_settings() -> None:
    """Refuse settings that nobody has (`settings.check_names`); those of installed plug-ins are known.

    Plug-ins are imported only when a name turns up that is not ours. Also finds out what is installed: reads the disk, not for
    the event loop.
    """
    for group in _GROUPS:
        _registered(group)
    try:
        settings.check_names()
    except ConfigError:
        settings.check_names(_foreign_settings())


def _foreign_settings() -> Iterator[type[Config]]:
    for group in _GROUPS:
        for entry in _registered(group).values():
            if entry.module.partition(".")[0] == "stator":
                continue
            try:
                found = config_type(load_plugin(group, entry.name))
            except ConfigError:
                continue  # whoever uses it is told
            if found is not None:
                yield found
