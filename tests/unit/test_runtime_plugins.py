"""Plug-ins are found by entry point; what cannot be had is said in one line."""

from importlib.metadata import EntryPoint

import pytest

from stator.errors import ConfigError
from stator.routing import BUILT_IN, LeastLoaded
from stator.runtime import plugins
from stator.runtime.plugins import load_plugin, plugin_names

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
