"""Engines by name: the entry points of the group `stator.engines`. The built-in ones are found the same way."""

from collections.abc import Mapping
from typing import Any

from stator.errors import ConfigError
from stator.runtime.plugins import load_plugin, plugin_names
from stator.settings import load
from stator.worker.engine import LLMEngine

__all__ = ["create_engine", "known_engines", "load_engine"]

_GROUP = "stator.engines"


def known_engines() -> list[str]:
    """Names of all installed engines, sorted. Imports none of them."""
    return plugin_names(_GROUP)


def load_engine(name: str) -> type[LLMEngine]:
    """The class of an engine.

    Raises `ConfigError` for a name that is not installed (listing those that are) and for a plug-in that cannot be imported.
    """
    try:
        found = load_plugin(_GROUP, name)
    except AttributeError as error:
        raise ConfigError(f"engine {name!r} cannot be loaded: {error}") from error
    if not isinstance(found, type) or not callable(getattr(found, "generate", None)):
        raise ConfigError(f"engine {name!r} is {found!r}, which is no engine: expected a class with generate()")
    return found  # pyright: ignore[reportUnknownVariableType]  # a plug-in's class; its shape was checked as far as it can be


def create_engine(name: str, options: Mapping[str, Any] | None = None) -> LLMEngine:
    """An engine, not started. `options` win over its settings (`STATOR_<ENGINE>_<OPTION>`); texts are read like settings.

    Reads the settings file if there is one: not for the event loop. Raises `ConfigError` for an unknown engine or option, or a
    value out of range.
    """
    engine_type: Any = load_engine(name)
    return engine_type(load(engine_type.options_type, options))
