"""Secrets in settings show themselves in no `repr`, error, traceback, log line or page, whatever setting holds them."""

import copy
import importlib.util
import logging
import pickle
import re
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stator import settings
from stator.config import Config, Secret, fields_of
from stator.errors import ConfigError
from stator.runtime.config import RuntimeConfig

ROOT = Path(__file__).parents[2]
VALUE = "do-not-show-me-anywhere"
TELLING = re.compile(r"(^|_)(password|passphrase|secret|token|nkey|api_key|credentials|key_text)(_|$)")
"""names of what should be kept to oneself; counts of tokens, and paths, are something else"""


def _page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs" / "settings_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CONFIGS: list[type[Config]] = _page().config_classes()
SECRETS = [(config, field) for config in CONFIGS for field in fields_of(config) if field.kind == "secret"]


def test_there_are_secrets_to_look_after() -> None:
    assert (RuntimeConfig, "cluster_secret") in [(config, field.name) for config, field in SECRETS]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_what_sounds_secret_is_one(config: type[Config]) -> None:
    for field in fields_of(config):
        if TELLING.search(field.name) and field.kind == "str":
            pytest.fail(f"{config.__name__}.{field.name} is a plain text")
        for name in field.setting.dyn_names:
            if re.search(r"PASSWORD|SECRET|NKEY", name):
                assert field.kind == "secret", f"{config.__name__}.{field.name} is read from {name}"


def test_a_secret_shows_nothing() -> None:
    secret = Secret(VALUE)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r}", f"{[secret]}"]
    assert all(VALUE not in each for each in shown)
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            take(secret)


@pytest.mark.parametrize(("config", "field"), SECRETS, ids=[f"{config.__name__}.{field.name}" for config, field in SECRETS])
def test_no_setting_shows_its_secret(config: type[Config], field: Any, caplog: pytest.LogCaptureFixture) -> None:
    try:
        loaded = settings.load(config, {field.name: VALUE}, env={})
    except ConfigError as error:  # it needs another setting beside it
        said = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
        assert VALUE not in str(error) and VALUE not in said.replace(f"{{'{field.name}': '{VALUE}'}}", "")
        return
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("stator").debug("%s %r", loaded, loaded)
    assert VALUE not in repr(loaded) + str(loaded) + caplog.text
    assert getattr(loaded, field.name).reveal() == VALUE


def test_a_short_secret_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match="at least 16") as caught:
        settings.load(RuntimeConfig, {"cluster_secret": "only-fifteen-ch"}, env={})
    assert "only-fifteen" not in str(caught.value)


@pytest.mark.parametrize("source", ["variable", "file", "toml"])
def test_the_secret_of_the_cluster_comes_from_a_variable_or_a_file(source: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(VALUE + "\n")
    toml = tmp_path / "stator.toml"
    toml.write_text(f'cluster_secret_file = "{path}"\n')
    env = {
        "variable": {"STATOR_CLUSTER_SECRET": VALUE},
        "file": {"STATOR_CLUSTER_SECRET_FILE": str(path)},
        "toml": {"STATOR_CONFIG": str(toml)},
    }[source]
    settings.check_names([RuntimeConfig], env=env)
    assert settings.load(RuntimeConfig, env=env).cluster_secret == Secret(VALUE)
    assert settings.load(RuntimeConfig, env={}).cluster_secret is None


def test_a_secret_closes_the_compatible_planes() -> None:
    assert settings.load(RuntimeConfig, {"cluster_secret": VALUE}, env={}).closed
    assert not settings.load(RuntimeConfig, {"cluster_secret": VALUE, "compatible": True}, env={}).closed
    assert not settings.load(RuntimeConfig, {"compatible": True}, env={}).closed
    with pytest.raises(ConfigError, match="STATOR_COMPATIBLE"):
        settings.load(RuntimeConfig, {"cluster_secret": VALUE, "plane": "compatible"}, env={})
