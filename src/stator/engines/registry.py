"""Engines by name: the entry points of the group `stator.engines`, the built-in ones included, or `module:Class`.

Where a class is expected, an async generator function will do: it becomes a `FunctionEngine`.
"""

import importlib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from stator.errors import ConfigError
from stator.runtime.plugins import load_plugin, plugin_names
from stator.settings import load
from stator.worker.engine import LLMEngine
from stator.worker.function_engine import FunctionEngine, FunctionOptions

__all__ = ["create_engine", "known_engines", "load_engine"]

logger = logging.getLogger(__name__)

_GROUP = "stator.engines"


def known_engines() -> list[str]:
    """Names of all installed engines, sorted. Imports none of them."""
    return plugin_names(_GROUP)


def load_engine(name: str) -> type[LLMEngine]:
    """The class of an engine; `name` may also be `module:Class`, which needs no installed plug-in. Imports it.

    Raises `ConfigError` for a name that is not installed (listing those that are), for what cannot be imported, and for a function.
    """
    found = _find(name)
    if inspect.isasyncgenfunction(found):
        raise _no_engine(name, found, "a class with generate()")
    return found


def _find(name: str) -> Any:
    """A class with `generate`, or a function."""
    found: Any = _import(name) if ":" in name else load_plugin(_GROUP, name)
    whole = callable(getattr(found, "generate", None)) if isinstance(found, type) else inspect.isasyncgenfunction(found)
    if not whole:
        raise _no_engine(name, found, "a class with generate(), or an async generator function")
    return found


def _no_engine(name: str, found: object, expected: str) -> ConfigError:
    return ConfigError(f"engine {name!r} is {found!r}, which is no engine: expected {expected}")


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # somebody's module may do anything
        logger.debug("loading the engine %s failed", path, exc_info=error)
        raise ConfigError(f"engine {path!r} cannot be loaded: {type(error).__name__}: {error}") from error


def create_engine(name: str, options: Mapping[str, Any] | None = None) -> LLMEngine:
    """An engine, not started. `options` win over its settings (`STATOR_<ENGINE>_<OPTION>`); texts are read like settings.

    Reads the settings file if there is one: not for the event loop. Raises `ConfigError` for an unknown engine or option, or a
    value out of range.
    """
    engine: Any = _find(name)
    if inspect.isasyncgenfunction(engine):
        return FunctionEngine(engine, load(FunctionOptions, options))
    found = load(engine.options_type, options)
    return engine(found) if _takes_options(engine) else engine()


def _takes_options(engine_type: type) -> bool:
    """Whether the class has a constructor of its own."""
    for each in engine_type.__mro__:
        if each in (LLMEngine, object):
            return False
        if "__init__" in vars(each):
            return True
    return False
