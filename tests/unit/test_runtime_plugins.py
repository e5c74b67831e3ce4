"""Plug-ins are found by entry point; what cannot be had is said in one line."""

import sys
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace
from typing import Annotated, ClassVar, cast

import pytest

from stator.config import Config, Setting
from stator.discovery.memory import MemoryDiscoveryConfig, MemoryStore, open_memory
from stator.engines.echo import EchoEngine, EchoOptions
from stator.errors import ConfigError
from stator.routing import BUILT_IN, LeastLoaded
from stator.runtime import Runtime, plugins
from stator.runtime.plugins import check_settings, config_type, load_plugin, plugin_names

pytestmark = pytest.mark.timeout(10)


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("stator.routing", BUILT_IN),
        ("stator.transports", ("memory", "native", "tcp")),
        ("stator.discovery", ("file", "memory")),
    ],
)
def test_the_built_ins_register_like_everybody(group: str, names: tuple[str, ...]) -> None:
    assert set(names) <= set(plugin_names(group))
    for name in names:
        assert callable(load_plugin(group, name))


def test_the_name_leads_to_the_class() -> None:
    assert load_plugin("stator.routing", "least_loaded") is LeastLoaded


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no plug-in called 'carrier_pigeon'.*native") as caught:
        load_plugin("stator.transports", "carrier_pigeon")
    assert caught.value.code == "config"


def test_an_unknown_group_is_empty() -> None:
    assert plugin_names("stator.nonsense") == []
    with pytest.raises(ConfigError, match="none"):
        load_plugin("stator.nonsense", "x")


@pytest.mark.parametrize("value", ["stator.no_such_module:Thing", "stator.errors:NoSuchThing"])
def test_a_plug_in_that_cannot_be_loaded_is_a_config_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("broken", value, "stator.test")
    monkeypatch.setattr(plugins, "_registered", lambda group: {"broken": entry})
    with pytest.raises(ConfigError, match="'broken'"):
        load_plugin("stator.test", "broken")


async def test_joining_a_cluster_reads_what_is_installed_in_a_thread() -> None:
    """`no_blocking_calls` fails this test otherwise."""
    plugins._registered.cache_clear()  # pyright: ignore[reportPrivateUsage]
    async with Runtime.connect(discovery=MemoryStore(), plane="auto", host="127.0.0.1") as runtime:
        assert runtime.config.plane == "auto"


def test_a_plug_in_says_which_settings_it_takes() -> None:
    assert config_type(EchoEngine) is EchoOptions
    assert config_type(open_memory) is MemoryDiscoveryConfig
    assert config_type(LeastLoaded) is None
    assert config_type(print) is None


def test_settings_of_plug_ins_are_known_and_misspelt_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(Config, frozen=True, kw_only=True):
        section: ClassVar[str] = "theirs"
        speed: Annotated[int, Setting(doc="how fast")] = 1

    class Engine:
        options_type = Theirs

    entries = {
        "stator.engines": {
            "theirs": EntryPoint("theirs", "theirs:Engine", "x"),
            "broken": EntryPoint("broken", "nowhere:X", "x"),
        }
    }
    monkeypatch.setattr(plugins, "_registered", lambda group: entries.get(group, {}))
    monkeypatch.setitem(sys.modules, "theirs", cast(ModuleType, SimpleNamespace(Engine=Engine)))
    monkeypatch.setenv("STATOR_THEIRS_SPEED", "2")
    check_settings()
    monkeypatch.setenv("STATOR_THEIRS_SPED", "2")
    with pytest.raises(ConfigError, match="'STATOR_THEIRS_SPED'; did you mean 'STATOR_THEIRS_SPEED'"):
        check_settings()
