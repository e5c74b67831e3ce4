"""Closed by default: what may be bound, what may be advertised; and what is taken from the machine."""

import os
import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from stator.errors import ConfigError
from stator.runtime import host
from stator.runtime.config import RuntimeConfig, is_wildcard
from stator.runtime.host import advertised_host, check_bind, raise_file_limit, socket_directory

pytestmark = pytest.mark.timeout(10)


@pytest.fixture(autouse=True)
def outside_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POD_IP", raising=False)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_may_be_bound(address: str) -> None:
    check_bind(address, allowed=False)


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "::", "", "0", "10.1.2.3", "192.168.0.1", "2001:db8::1", "example.org", "127.0.0.1.nip"]
)
def test_everything_else_needs_permission(address: str) -> None:
    with pytest.raises(ConfigError, match="STATOR_INSECURE_BIND") as caught:
        check_bind(address, allowed=False)
    assert repr(address) in caught.value.message
    check_bind(address, allowed=True)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "", "*", "0", "0::0", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0"])
def test_all_spellings_of_a_wildcard(address: str) -> None:
    assert is_wildcard(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost", "0.0.0.1", "worker-0", "10.0.0.0"])
def test_no_wildcard(address: str) -> None:
    assert not is_wildcard(address)


def test_what_is_bound_is_advertised() -> None:
    assert advertised_host(RuntimeConfig()) == "127.0.0.1"
    assert advertised_host(RuntimeConfig(host="::1")) == "::1"
    assert advertised_host(RuntimeConfig(host="10.1.2.3", insecure_bind=True)) == "10.1.2.3"


def test_the_setting_wins() -> None:
    config = RuntimeConfig(host="0.0.0.0", insecure_bind=True, advertise_host="worker-7.cluster")
    assert advertised_host(config) == "worker-7.cluster"


def test_an_advertised_address_does_not_permit_the_bind() -> None:
    with pytest.raises(ConfigError, match="insecure_bind"):
        advertised_host(RuntimeConfig(host="0.0.0.0", advertise_host="10.1.2.3"))


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::", "0::0"])
def test_a_wildcard_is_never_advertised(wildcard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_routable_address", lambda address: "10.9.8.7")
    assert advertised_host(RuntimeConfig(host=wildcard, insecure_bind=True)) == "10.9.8.7"
    monkeypatch.setenv("POD_IP", "10.1.1.1")
    assert advertised_host(RuntimeConfig(host=wildcard, insecure_bind=True)) == "10.1.1.1"
    with pytest.raises(ConfigError, match="wildcard"):
        RuntimeConfig(advertise_host=wildcard)


def test_the_routable_address_is_an_address_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        found = advertised_host(RuntimeConfig(host="0.0.0.0", insecure_bind=True))
    except ConfigError as error:  # a machine without any route says what to set
        assert "STATOR_ADVERTISE_HOST" in error.message
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((found, 0))


def test_without_a_route_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoute:
        def __init__(self, *arguments: object) -> None: ...

        def __enter__(self) -> "NoRoute":
            return self

        def __exit__(self, *arguments: object) -> None: ...

        def connect(self, address: object) -> None:
            raise OSError(101, "Network is unreachable")

    names = {name: getattr(socket, name) for name in ("AF_INET", "AF_INET6", "SOCK_DGRAM")}
    monkeypatch.setattr(host, "socket", SimpleNamespace(socket=NoRoute, **names))
    with pytest.raises(ConfigError, match="STATOR_ADVERTISE_HOST"):
        advertised_host(RuntimeConfig(host="0.0.0.0", insecure_bind=True))


def test_open_files_are_raised_to_the_hard_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        raise_file_limit()
        now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert now == hard if hard != resource.RLIM_INFINITY else now >= 65536
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_place_for_sockets_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    directory = socket_directory()
    assert directory is not None
    assert directory.is_relative_to(tmp_path)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert directory.stat().st_uid == os.getuid()
    assert socket_directory() == directory


def test_no_place_for_sockets_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "stator").mkdir(mode=0o700)
    (tmp_path / "stator" / "sockets").write_text("in the way")
    assert socket_directory() is None
