"""Settings of the health room: the reference's names with its quirks, ours strict."""

import pytest

from stator.errors import ConfigError
from stator.health import HealthConfig
from stator.settings import load

pytestmark = pytest.mark.timeout(10)


def read(**env: str) -> HealthConfig:
    return load(HealthConfig, env=env)


def test_the_defaults_are_off_and_on_loopback() -> None:
    config = read()
    assert (config.port, config.host, config.starting_status) == (-1, "127.0.0.1", "notready")
    assert (config.endpoints, config.health_path, config.live_path) == ((), "/health", "/live")
    assert (config.canary, config.canary_wait, config.canary_timeout) == (False, 10.0, 3.0)


def test_the_references_names_are_read() -> None:
    config = read(
        DYN_SYSTEM_PORT="18081",
        DYN_SYSTEM_HOST="127.0.0.2",
        DYN_SYSTEM_STARTING_HEALTH_STATUS="ready",
        DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS='["generate", "second"]',
        DYN_SYSTEM_HEALTH_PATH="/healthz",
        DYN_SYSTEM_LIVE_PATH="/livez",
        DYN_HEALTH_CHECK_ENABLED="true",
        DYN_HEALTH_CHECK_REQUEST_TIMEOUT="7",
        DYN_CANARY_WAIT_TIME="20",
    )
    assert (config.port, config.host, config.starting_status) == (18081, "127.0.0.2", "ready")
    assert config.endpoints == ("generate", "second")
    assert (config.health_path, config.live_path) == ("/healthz", "/livez")
    assert (config.canary, config.canary_timeout, config.canary_wait) == (True, 7, 20)


@pytest.mark.parametrize(("text", "port"), [("-1", -1), ("-7", -1), ("0", 0), ("32767", 32767), ("", -1)])
def test_the_references_port(text: str, port: int) -> None:
    assert read(DYN_SYSTEM_PORT=text).port == port


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DYN_SYSTEM_PORT", "32768"),
        ("DYN_SYSTEM_PORT", "65535"),
        ("DYN_SYSTEM_PORT", "http"),
        ("DYN_HEALTH_CHECK_ENABLED", "1"),
        ("DYN_HEALTH_CHECK_ENABLED", "True"),
        ("DYN_SYSTEM_STARTING_HEALTH_STATUS", "bogus"),
        ("DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS", "generate"),
        ("DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS", "[1]"),
        ("DYN_HEALTH_CHECK_REQUEST_TIMEOUT", "1.5"),
        ("DYN_CANARY_WAIT_TIME", "soon"),
        ("DYN_CANARY_WAIT_TIME", "0"),
    ],
)
def test_what_aborts_the_reference_aborts_here(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name):
        read(**{name: text})


def test_our_own_names() -> None:
    config = read(
        STATOR_HEALTH_PORT="40000",
        STATOR_HEALTH_CANARY="yes",
        STATOR_HEALTH_CANARY_WAIT="0.5",
        STATOR_HEALTH_CANARY_BUSY_LIMIT="none",
    )
    assert (config.port, config.canary, config.canary_wait, config.canary_busy_limit) == (40000, True, 0.5, None)


def test_beyond_loopback_must_be_allowed_if_there_is_a_server() -> None:
    assert read(DYN_SYSTEM_HOST="0.0.0.0").port == -1
    with pytest.raises(ConfigError, match="STATOR_HEALTH_INSECURE_BIND"):
        read(DYN_SYSTEM_HOST="0.0.0.0", DYN_SYSTEM_PORT="0")
    for host in ("", "example.org", "::"):
        with pytest.raises(ConfigError, match="insecure_bind"):
            HealthConfig(host=host, port=0)
    for host in ("localhost", "::1", "[::1]", "127.1.2.3"):
        assert HealthConfig(host=host, port=0).host == host
    assert HealthConfig(host="0.0.0.0", port=0, insecure_bind=True).insecure_bind


@pytest.mark.parametrize("path", ["health", "", "/metrics", "/metadata", "/drain", "/resume", "/engine/x"])
def test_a_path_that_is_none_or_taken(path: str) -> None:
    with pytest.raises(ConfigError, match="health_path"):
        HealthConfig(health_path=path)
    with pytest.raises(ConfigError, match="live_path"):
        HealthConfig(live_path=path)


def test_both_pages_on_one_path() -> None:
    with pytest.raises(ConfigError, match="different paths"):
        HealthConfig(live_path="/health")
