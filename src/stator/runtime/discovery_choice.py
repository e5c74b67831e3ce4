"""Which discovery a runtime has: a plug-in's name, or `name://rest`, where the rest says where its records are."""

from collections.abc import Mapping
from typing import Any

from stator import settings
from stator.config import Config, fields_of
from stator.discovery.interface import DiscoveryFactory
from stator.errors import ConfigError
from stator.runtime.plugins import config_type, load_plugin

__all__ = ["choose_discovery", "discovery_name"]

_LOCATION = "location"
"""class variable of a backend's settings: the field that the rest of `name://rest` sets"""


def discovery_name(text: str) -> str:
    """The plug-in that `text` names: `etcd` for `etcd` and for `etcd://one:2379,two:2379`."""
    return text.partition("://")[0]


def choose_discovery(text: str, sections: Mapping[str, Any]) -> tuple[DiscoveryFactory, Config]:
    """The backend that is meant and its settings; what `text` says of its place gives way to `sections` alone. Reads the disk.

    Raises `ConfigError` when there is no such plug-in, or its settings do not fit, or the text has a user or a password:
    texts like it stand in lists of processes.
    """
    name, separator, rest = text.partition("://")
    factory = load_plugin("stator.discovery", name)
    kind = config_type(factory)
    if kind is None:
        raise ConfigError(f"discovery plug-in {name!r} does not say which settings it takes")
    prefix = f"{kind.section}."
    own = {key.removeprefix(prefix): value for key, value in sections.items() if key.startswith(prefix)}
    if separator and rest:
        own = _place(kind, name, rest) | own
    return factory, settings.load(kind, own)


def _place(kind: type[Config], name: str, rest: str) -> dict[str, str]:
    if "@" in rest and not rest.startswith("/"):  # a path may have one
        raise ConfigError(
            f"discovery = {name}://… names a user or a password, which everybody on this machine could read; "
            f"write {name}://{rest.rpartition('@')[2]} and set {_credentials(kind)}"
        )
    field = getattr(kind, _LOCATION, "")
    if not field:
        raise ConfigError(f"discovery = {name}://{rest}: {name} has no place that could be named; write {name}")
    return {field: rest}


def _credentials(kind: type[Config]) -> str:
    """The variables for user and password, for people."""
    found = {field.name: field.variable for field in fields_of(kind)}
    names = [found[name] for name in ("username", "password") if name in found]
    return " and ".join(names) + " (or …_FILE)" if names else "them as its settings"
