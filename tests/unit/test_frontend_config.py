"""Settings of the frontend: closed unless told otherwise, and the reference's names."""

from pathlib import Path

import pytest

from stator.config import fields_of
from stator.errors import ConfigError
from stator.frontend.admission_limits import AdmissionLimits
from stator.frontend.config import FrontendConfig, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_is_open(host: str) -> None:
    assert FrontendConfig(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_beyond_loopback_needs_a_word(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="insecure"):
        FrontendConfig(host=host)
    assert FrontendConfig(host=host, insecure_bind=True).insecure_bind
    FrontendConfig(host=host, tls_cert_path=Path("c"), tls_key_path=Path("k"))


def test_tls_needs_both_files() -> None:
    with pytest.raises(ConfigError, match="tls_key_path"):
        FrontendConfig(tls_cert_path=Path("c"))


def test_budget_holds_one_body() -> None:
    with pytest.raises(ConfigError, match="body_budget"):
        FrontendConfig(body_limit=100, body_budget=99)


@pytest.mark.parametrize("bad", [{"port": 70_000}, {"overload_status": 200}, {"silence": 0}, {"graceful_shutdown": -1}])
def test_ranges(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        FrontendConfig(**bad)  # type: ignore[arg-type]  # wrong on purpose


def test_names_of_the_reference() -> None:
    names = {name: field.name for field in fields_of(FrontendConfig) for name in field.setting.dyn_names}
    assert names == {
        "DYN_HTTP_HOST": "host",
        "DYN_HTTP_PORT": "port",
        "DYN_TLS_CERT_PATH": "tls_cert_path",
        "DYN_TLS_KEY_PATH": "tls_key_path",
        "DYN_HTTP_BODY_LIMIT_MB": "body_limit",
        "DYN_HTTP_OVERLOAD_STATUS_CODE": "overload_status",
        "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS": "graceful_shutdown",
        "DYN_DISABLE_FRONTEND_ADMIN_API": "admin_api",
        "DYN_METRICS_PREFIX": "metrics_prefix",
    }
    (limit,) = [field for field in fields_of(FrontendConfig) if field.name == "body_limit"]
    assert limit.setting.dyn_read is not None
    assert limit.setting.dyn_read("7") == 7 * 2**20
    assert {field.variable for field in fields_of(FrontendConfig)} >= {"STATOR_HTTP_PORT", "STATOR_HTTP_BODY_LIMIT"}


def test_the_queue_is_on_by_default_and_each_setting_reaches_it() -> None:
    limits = FrontendConfig().admission
    assert limits == AdmissionLimits()
    changed = FrontendConfig(
        queue=1, queue_wait=2, queue_target=3, queue_burst=4, queue_timeout=5, queue_ageing=6, queue_tenants=7
    ).admission
    assert changed == AdmissionLimits(depth=1, wait=2, target=3, burst=4, timeout=5, ageing=6, tenants=7)
    with pytest.raises(ConfigError, match="queue_timeout"):
        FrontendConfig(queue_timeout=0)
