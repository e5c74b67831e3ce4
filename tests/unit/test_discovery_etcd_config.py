"""The settings of the etcd backend: the reference's variables, read at least as kindly as it reads them (`spec/20 §4.2`)."""

import logging
from pathlib import Path
from typing import Any

import pytest

from stator.config import Secret
from stator.discovery.etcd_config import EtcdConfig
from stator.errors import ConfigError
from stator.settings import load


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        (None, ("http://localhost:2379",)),
        ("", ("http://localhost:2379",)),
        ("127.0.0.1:2379", ("http://127.0.0.1:2379",)),
        (" http://a:1 , b:2/ ,https://c:3", ("http://a:1", "http://b:2", "https://c:3")),
        ("a:1,http://a:1/", ("http://a:1",)),
        ("[::1]:2379", ("http://[::1]:2379",)),
    ],
)
def test_endpoints(text: str | None, urls: tuple[str, ...]) -> None:
    env = {} if text is None else {"ETCD_ENDPOINTS": text}
    assert load(EtcdConfig, env=env).urls == urls


def test_https_is_meant_where_certificates_are() -> None:
    assert EtcdConfig(endpoints=("a:1",), ca_path=Path("ca.pem")).urls == ("https://a:1",)


@pytest.mark.parametrize(("text", "ttl"), [("3", 3), ("0", 10), ("-1", 10), ("soon", 10), ("2.5", 10)])
def test_a_bad_ttl_of_the_reference_is_ten(text: str, ttl: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(EtcdConfig, env={"ETCD_LEASE_TTL": text}).lease_ttl == ttl
    assert any("ETCD_LEASE_TTL" in record.message for record in caplog.records) is (ttl == 10)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"endpoints": ()}, "endpoints is empty"),
        ({"endpoints": ("ftp://a:1",)}, "neither http nor https"),
        ({"endpoints": ("http://user:geheim@a:1",)}, r"'http://a:1': user and password belong into etcd\.username"),
        ({"endpoints": ("http://a:port",)}, "(?i)port"),
        ({"endpoints": ("http://a:1/v3",)}, "more than a host and a port"),
        ({"endpoints": ("http://:1",)}, "names no host"),
        ({"username": "u"}, "set together"),
        ({"password": Secret("geheim")}, "set together"),
        ({"ca_path": Path("a"), "ca_text": "b"}, "both set"),
        ({"cert_text": "a"}, "set together"),
        ({"key_path": Path("a")}, "without etcd.cert_path"),
        ({"endpoints": ("http://a:1",), "ca_path": Path("a")}, "http:// member although"),
        ({"reconnect_first": 3.0}, "below"),
        ({"lease_ttl": 0}, "≥ 1|from 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        EtcdConfig(**settings)
    assert "geheim" not in str(caught.value)
