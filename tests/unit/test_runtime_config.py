"""Settings of a runtime: defaults of the design, and what is refused."""

from typing import Any

import pytest

from stator import settings
from stator.errors import ConfigError
from stator.runtime.config import RuntimeConfig

pytestmark = pytest.mark.timeout(10)


def test_the_defaults_are_those_of_the_design() -> None:
    config = RuntimeConfig()
    limits = config.limits
    assert (limits.connect, limits.accept, limits.call_home, limits.prologue) == (3, 5, 60, 60)
    assert (limits.first_item, limits.items, limits.total) == (300, 120, None)
    assert (config.plane, config.discovery, config.request_plane) == ("auto", "file", "tcp")
    assert (config.native_retry, config.shutdown_timeout) == (30, 30)
    assert (config.host, config.insecure_bind) == ("127.0.0.1", False)


def test_the_limits_follow_the_settings() -> None:
    config = RuntimeConfig(connect_timeout=1, accept_timeout=None, item_timeout=7, request_timeout=9)
    assert (config.limits.connect, config.limits.accept, config.limits.items, config.limits.total) == (1, None, 7, 9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plane", "quick"),
        ("request_plane", "http"),
        ("connect_timeout", 0),
        ("item_timeout", -1),
        ("instance_timeout", -0.1),
        ("native_retry", 0),
        ("shutdown_timeout", -1),
        ("host", ""),
        ("advertise_host", "0.0.0.0"),
        ("advertise_host", "::"),
        ("advertise_host", "*"),
        ("advertise_host", "0"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        RuntimeConfig(**{field: value})


def test_our_names_win_over_the_references() -> None:
    env = {"DYN_DISCOVERY_BACKEND": "mem", "DYN_TCP_REQUEST_TIMEOUT": "7", "DYN_REQUEST_PLANE": "TCP"}
    config = settings.load(RuntimeConfig, env=env)
    assert (config.discovery, config.accept_timeout, config.request_plane) == ("memory", 7, "tcp")
    config = settings.load(RuntimeConfig, env=env | {"STATOR_DISCOVERY": "file", "STATOR_ACCEPT_TIMEOUT": "2"})
    assert (config.discovery, config.accept_timeout) == ("file", 2)
    assert settings.load(RuntimeConfig, {"accept_timeout": 1.5}, env=env).accept_timeout == 1.5


def test_a_request_plane_we_do_not_speak_is_an_error_and_not_a_surprise() -> None:
    with pytest.raises(ConfigError, match="DYN_REQUEST_PLANE"):
        settings.load(RuntimeConfig, env={"DYN_REQUEST_PLANE": "http2"})


def test_the_plane_can_be_forced() -> None:
    for plane in ("auto", "native", "compatible"):
        assert settings.load(RuntimeConfig, env={"STATOR_PLANE": plane}).plane == plane
    with pytest.raises(ConfigError, match="STATOR_PLANE"):
        settings.load(RuntimeConfig, env={"STATOR_PLANE": "fast"})
