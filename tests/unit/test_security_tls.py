"""Certificates of a process: what settings are allowed, what contexts demand, and files that change while they are used."""

import logging
import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stator import settings
from stator.errors import ConfigError
from stator.security import Tls, TlsConfig
from stator.security.validity import Validity, read_validity
from stator.tasks import SystemClock
from stator.testing.certificates import Authority, tls_of
from stator.testing.manual_clock import ManualClock

pytestmark = pytest.mark.timeout(30)


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "stator") -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A handshake in memory; raises what either side does."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialled = client.wrap_bio(down, up, server_hostname=name)
    accepted = server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (dialled, accepted):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return dialled, accepted


def serial(tls: Tls) -> str:
    """Of the certificate that listeners show."""
    dialled, _ = shake(tls.server_context(), tls.client_context())
    found = dialled.getpeercert()
    assert found is not None
    return str(found["serialNumber"])


# -- settings


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"cert_path": "a"}, "tls.cert_path and tls.key_path"),
        ({"key_path": "a"}, "tls.cert_path and tls.key_path"),
        ({"client_cert_path": "a"}, "tls.client_cert_path and tls.client_key_path"),
        ({"client_ca_cert_path": "a"}, "needs tls.cert_path"),
        ({"server_name": "stator"}, "set tls.ca_cert_path"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings.load(TlsConfig, values, env={})


def test_the_names_of_the_reference_are_read() -> None:
    names = ("CERT_PATH", "KEY_PATH", "CA_CERT_PATH", "CLIENT_CA_CERT_PATH", "CLIENT_CERT_PATH", "CLIENT_KEY_PATH")
    env = {f"DYN_TCP_TLS_{name}": f"/tls/{name}" for name in names}
    config = settings.load(TlsConfig, env={**env, "DYN_TCP_TLS_SERVER_NAME": "w", "DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS": "7"})
    assert config.files == tuple(Path(f"/tls/{name}") for name in names)
    assert (config.server_name, config.handshake_timeout, config.enabled) == ("w", 7.0, True)
    assert settings.load(TlsConfig, {"cert_path": "x", "key_path": "y"}, env=env).cert_path == Path("x")


def test_without_settings_there_is_no_tls() -> None:
    assert not settings.load(TlsConfig, env={}).enabled


# -- contexts


def test_contexts_are_strict(tmp_path: Path) -> None:
    tls = tls_of(Authority(tmp_path))
    server, client = tls.server_context(), tls.client_context()
    assert tls.mutual and tls.listens and tls.server_name == "stator"
    for context in (server, client):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert context.verify_mode is ssl.CERT_REQUIRED
    assert client.check_hostname
    assert server is tls.server_context() and client is tls.client_context()
    dialled, accepted = shake(server, client)
    assert dialled.version() == accepted.version() == "TLSv1.3"
    assert accepted.getpeercert()  # its own certificate is what it shows as a dialler


def test_protocols_are_negotiated(tmp_path: Path) -> None:
    tls = tls_of(Authority(tmp_path))
    dialled, accepted = shake(tls.server_context(("h2", "http/1.1")), tls.client_context(("http/1.1",)))
    assert dialled.selected_alpn_protocol() == accepted.selected_alpn_protocol() == "http/1.1"
    assert tls.server_context() is not tls.server_context(("h2", "http/1.1"))


def test_one_sided_tls_asks_for_no_certificate(tmp_path: Path) -> None:
    tls = tls_of(Authority(tmp_path), mutual=False)
    assert not tls.mutual
    assert tls.server_context().verify_mode is ssl.CERT_NONE


def test_who_has_no_certificate_cannot_listen(tmp_path: Path) -> None:
    tls = Tls(TlsConfig(ca_cert_path=Authority(tmp_path).path), clock=SystemClock())
    assert not tls.listens and tls.client_context()
    with pytest.raises(ConfigError, match=r"tls\.cert_path"):
        tls.server_context()


@pytest.mark.parametrize("what", ["missing", "garbage", "other key", "locked"])
def test_files_that_cannot_be_used_are_named(tmp_path: Path, what: str) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("process", password="x" if what == "locked" else "")
    if what == "missing":
        cert.unlink()
    elif what == "garbage":
        cert.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    elif what == "other key":
        _, key = authority.issue("another")
    with pytest.raises(ConfigError, match=r"process\.pem"):
        Tls(TlsConfig(cert_path=cert, key_path=key), clock=SystemClock())


def test_an_authority_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        Tls(TlsConfig(ca_cert_path=path), clock=SystemClock())


# -- files that change


def test_new_files_are_used_and_old_contexts_are_left_alone(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tls = tls_of(authority)
    tls.server_context(("h2",))
    before, held = serial(tls), tls.server_context()
    assert not tls.look()
    authority.issue("process")
    assert tls.look() and not tls.look()
    assert serial(tls) != before
    assert tls.server_context() is not held
    dialled, _ = shake(tls.server_context(("h2",)), tls.client_context(("h2",)))
    assert dialled.selected_alpn_protocol() == "h2"


def test_a_new_authority_replaces_the_old_one(tmp_path: Path) -> None:
    tls = tls_of(Authority(tmp_path))
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    os.replace(other.path, tmp_path / "ca.pem")
    assert tls.look()
    with pytest.raises(ssl.SSLCertVerificationError):
        serial(tls)  # the old authority's certificate is trusted no more


def test_a_link_that_points_elsewhere_is_seen(tmp_path: Path) -> None:
    """As Kubernetes exchanges mounted secrets."""
    authority = Authority(tmp_path)
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        for path in authority.issue("process"):
            path.rename(tmp_path / version / path.name)
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "1")
    config = TlsConfig(
        cert_path=link / "process.pem", key_path=link / "process-key.pem", ca_cert_path=authority.path, server_name="stator"
    )
    tls = Tls(config, clock=SystemClock())
    before = serial(tls)
    (tmp_path / "next").symlink_to(tmp_path / "2")
    os.replace(tmp_path / "next", link)
    assert tls.look() and serial(tls) != before


@pytest.mark.parametrize("damage", ["half", "empty", "gone", "mismatch"])
def test_half_written_files_change_nothing_but_one_line_in_the_log(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path)
    tls = tls_of(authority)
    before, cert = serial(tls), tmp_path / "process.pem"
    whole = cert.read_bytes()
    for step in range(3):
        match damage:
            case "half":
                cert.write_bytes(whole[: len(whole) // 2 + step])
            case "empty":
                cert.write_bytes(b" " * step)
            case "gone":
                cert.unlink(missing_ok=True)
            case _:
                new, _ = authority.issue(f"another{step}")
                cert.write_bytes(new.read_bytes())
        assert not tls.look()
        assert serial(tls) == before
    warnings = [entry for entry in caplog.records if entry.levelno == logging.WARNING]
    assert len(warnings) == 1 and "stay" in warnings[0].getMessage()
    authority.issue("process")
    assert tls.look() and serial(tls) != before
    cert.write_bytes(b"")
    tls.look()
    assert len([entry for entry in caplog.records if entry.levelno == logging.WARNING]) == 2  # another accident


# -- the end of a certificate


def test_a_certificate_that_ends_soon_is_announced_once_a_day(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cert, key = Authority(tmp_path).issue("process", begins=timedelta(days=-89), ends=timedelta(days=3))
    clock = ManualClock(wall=datetime.now(UTC).timestamp())
    tls = Tls(TlsConfig(cert_path=cert, key_path=key), clock=clock)
    for _ in range(5):
        tls.look()
    assert [entry.getMessage() for entry in caplog.records] == [f"the certificate {cert} expires in 72.0 hours"]
    clock.advance(4 * 86400)
    tls.look()
    assert "has expired" in caplog.records[-1].getMessage()
    assert len(caplog.records) == 2


def test_a_young_certificate_is_not_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tls_of(Authority(tmp_path))
    assert not caplog.records


@pytest.mark.parametrize("years", [0, 10, 60])
def test_the_time_of_a_certificate_is_read(tmp_path: Path, years: int) -> None:
    """Beyond 2049 it is written in another form."""
    ends = timedelta(days=365 * years + 1)
    cert, _ = Authority(tmp_path).issue("process", begins=timedelta(days=-2), ends=ends)
    now = datetime.now(UTC).timestamp()
    found = read_validity(cert.read_text() + "trailing")
    assert found.begins == pytest.approx(now - 2 * 86400, abs=60)
    assert found.ends == pytest.approx(now + ends.total_seconds(), abs=60)


@pytest.mark.parametrize(
    "text",
    ["", "nothing", "-----BEGIN CERTIFICATE-----\n", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"],
)
def test_what_is_no_certificate_has_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="certificate"):
        read_validity(text)


def test_soon_depends_on_the_life_of_a_certificate() -> None:
    day = Validity(begins=0.0, ends=86400.0)
    assert not day.ending(70_000.0) and day.ending(80_000.0)
    decade = Validity(begins=0.0, ends=3650 * 86400.0)
    assert not decade.ending(3630 * 86400.0) and decade.ending(3640 * 86400.0)
