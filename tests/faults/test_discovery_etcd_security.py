"""etcd that wants a user, a certificate or both: who is let in, and what those are told who are not."""

import asyncio
import datetime
import ipaddress
import logging
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from stator.config import Secret
from stator.discovery.etcd import EtcdConfig, EtcdDiscovery, open_etcd
from stator.errors import ConfigError, StatorError, Unavailable
from stator.protocol.records import EndpointRecord, Query
from stator.settings import load
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record, until
from stator.testing.etcd_server import EtcdServer, EtcdTls, etcd_server
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(60)

ENDPOINTS = Query(EndpointRecord.bucket)
PASSWORD = "correct-horse-battery"
QUICK: dict[str, Any] = {"lease_ttl": 2, "request_timeout": 1.0, "start_timeout": 0.5, "reconnect_most": 0.3}


def discovery(url: str, **settings: Any) -> EtcdDiscovery:
    return open_etcd(EtcdConfig(endpoints=(url,), **{**QUICK, **settings}), clock=SystemClock(), random=Random())


async def opens(one: EtcdDiscovery) -> None:
    """It works, reading and writing."""
    async with one:
        await one.register(endpoint_record(1))
        assert await one.list(ENDPOINTS) == [endpoint_record(1)]


async def refused(one: EtcdDiscovery) -> StatorError:
    with pytest.raises(StatorError) as caught:
        async with one:
            await one.register(endpoint_record(1))
    assert PASSWORD not in f"{caught.value!r}{caught.value.__cause__!r}{one.status!r}"
    return caught.value


# Users


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """Tokens live for a second, so that they have to be renewed."""
    with etcd_server(tmp_path_factory.mktemp("guarded"), flags=("--auth-token-ttl", "1")) as server:
        server.add_user("stator", PASSWORD)
        yield server


def user(server: EtcdServer, password: str = PASSWORD, name: str = "stator") -> EtcdDiscovery:
    return discovery(server.url, username=name, password=Secret(password))


async def test_a_user_is_let_in(guarded: EtcdServer) -> None:
    await opens(user(guarded))


async def test_a_wrong_password_is_told_at_once(guarded: EtcdServer) -> None:
    error = await refused(user(guarded, "wrong"))
    assert isinstance(error, ConfigError)
    assert "log-in as 'stator' was refused" in error.message
    assert "ETCD_AUTH_PASSWORD" in error.message
    assert "wrong" not in error.message.replace("log-in", "")


async def test_nobody_is_not_let_in(guarded: EtcdServer) -> None:
    error = await refused(discovery(guarded.url))
    assert isinstance(error, ConfigError)
    assert "user name is empty" in error.message


async def test_a_user_without_permission_is_told_what_is_missing(tmp_path: Path) -> None:
    with etcd_server(tmp_path) as server:
        await asyncio.to_thread(server.add_user, "stator", PASSWORD, prefix="v2/")
        async with user(server) as one:
            with pytest.raises(ConfigError, match="permission"):
                await one.register(endpoint_record(1))
            with pytest.raises(ConfigError, match="cannot read v1/instances in etcd"):
                await one.list(ENDPOINTS)
            assert dict(one.owned()) == {}


async def test_tokens_are_renewed_and_survive_a_restart(guarded: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "stator")
    async with user(guarded) as worker, user(guarded) as client, client.watch(ENDPOINTS) as watch:
        await worker.register(endpoint_record(1))
        await until(watch, lambda: len(watch.current) == 1)
        await asyncio.sleep(2.5)  # twice the life of a token, and more
        await worker.register(endpoint_record(2))
        await until(watch, lambda: len(watch.current) == 2)
        await asyncio.to_thread(guarded.kill)
        await asyncio.to_thread(guarded.start)
        await eventually(lambda: worker.status.connected and client.status.connected, what="both are let in again")
        await worker.register(endpoint_record(3))
        await until(watch, lambda: len(watch.current) == 3)
        assert len(await client.list(ENDPOINTS)) == 3
    assert PASSWORD not in caplog.text


async def test_a_user_where_none_are_wanted_is_let_in(tmp_path: Path) -> None:
    with etcd_server(tmp_path) as server:
        await opens(user(server))


def test_the_password_of_the_environment_stays_secret() -> None:
    config = load(EtcdConfig, env={"ETCD_AUTH_USERNAME": "stator", "ETCD_AUTH_PASSWORD": PASSWORD})
    assert config.password.reveal() == PASSWORD
    assert PASSWORD not in repr(config)


# Certificates


class Authority:
    """Signs certificates for tests."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._builder(self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.path = directory / f"{name}.pem"
        self.path.write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=2))
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate for 127.0.0.1, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = self._builder(subject, key).add_extension(x509.SubjectAlternativeName([address]), critical=False)
        certificate, secret = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        certificate.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        secret.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return certificate, secret


class Certified:
    """A server that proves who it is and wants its clients to do so, and the certificates for both."""

    def __init__(self, directory: Path) -> None:
        ours, theirs = Authority(directory, "ours"), Authority(directory, "theirs")
        self.ca, self.wrong_ca = ours.path, theirs.path
        self.client = ours.issue("client")
        self.foreign = theirs.issue("foreign")
        certificate, key = ours.issue("server")
        self.tls = EtcdTls(ca=ours.path, certificate=certificate, key=key)
        self.mutual = EtcdTls(ca=ours.path, certificate=certificate, key=key, client_ca=ours.path)
        certificate, key = theirs.issue("replaced")
        self.replaced = EtcdTls(ca=theirs.path, certificate=certificate, key=key, client_ca=theirs.path)


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    return Certified(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def one_sided(certified: Certified, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path_factory.mktemp("tls"), tls=certified.tls) as server:
        yield server


@pytest.fixture(scope="module")
def mutual(certified: Certified, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path_factory.mktemp("mutual"), tls=certified.mutual) as server:
        yield server


async def test_over_tls_with_a_ca(certified: Certified, one_sided: EtcdServer) -> None:
    await opens(discovery(one_sided.url, ca_path=certified.ca))
    await opens(discovery(one_sided.url.removeprefix("https://"), ca_path=certified.ca))


async def test_over_mutual_tls_with_files(certified: Certified, mutual: EtcdServer) -> None:
    certificate, key = certified.client
    await opens(discovery(mutual.url, ca_path=certified.ca, cert_path=certificate, key_path=key))


async def test_over_mutual_tls_with_the_texts_of_the_reference(certified: Certified, mutual: EtcdServer) -> None:
    certificate, key = certified.client
    env = {
        "ETCD_ENDPOINTS": mutual.url,
        "ETCD_AUTH_CA": certified.ca.read_text(),
        "ETCD_AUTH_CLIENT_CERT": certificate.read_text(),
        "ETCD_AUTH_CLIENT_KEY": key.read_text(),
    }
    await opens(open_etcd(load(EtcdConfig, env=env), clock=SystemClock(), random=Random()))


async def test_certificates_that_were_replaced_are_used_when_the_old_ones_do_not_serve(
    certified: Certified, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server's certificate and ours are signed by another authority from one moment to the next."""
    caplog.set_level(logging.INFO, "stator.discovery")
    ca, certificate, key = tmp_path / "ca.pem", tmp_path / "own.pem", tmp_path / "own.key"
    for source, target in zip((certified.ca, *certified.client), (ca, certificate, key), strict=True):
        target.write_bytes(source.read_bytes())
    server = EtcdServer(tmp_path / "etcd", tls=certified.mutual)
    try:
        await asyncio.to_thread(server.start)
        async with discovery(server.url, ca_path=ca, cert_path=certificate, key_path=key) as one:
            await one.register(endpoint_record(1))
            await asyncio.to_thread(server.kill)
            server.use(certified.replaced)
            await asyncio.to_thread(server.start)
            for source, target in zip((certified.wrong_ca, *certified.foreign), (ca, certificate, key), strict=True):
                target.write_bytes(source.read_bytes())
            await eventually(lambda: any("were read again" in record.message for record in caplog.records), within=10)
            await eventually(lambda: one.status.connected, within=10)
            assert await one.register(endpoint_record(2))
    finally:
        server.kill()


async def test_a_wrong_ca_is_told_at_once(certified: Certified, one_sided: EtcdServer) -> None:
    error = await refused(discovery(one_sided.url, ca_path=certified.wrong_ca, start_timeout=30.0))
    assert isinstance(error, ConfigError)
    assert "its certificate is not trusted" in error.message
    assert "etcd.ca_path" in error.message


async def test_another_name_is_told_at_once(certified: Certified, one_sided: EtcdServer) -> None:
    error = await refused(discovery(one_sided.url, ca_path=certified.ca, server_name="etcd.example", start_timeout=30.0))
    assert isinstance(error, ConfigError)
    assert "its certificate is not trusted" in error.message


@pytest.mark.parametrize("which", ["none", "foreign"])
async def test_who_has_no_certificate_is_not_let_in(certified: Certified, mutual: EtcdServer, which: str) -> None:
    own = {} if which == "none" else dict(zip(("cert_path", "key_path"), certified.foreign, strict=True))
    error = await refused(discovery(mutual.url, ca_path=certified.ca, **own))
    assert isinstance(error, Unavailable)
    assert "certificate" in error.message.lower() or "unknown ca" in error.message.lower()


async def test_plaintext_to_tls_and_the_reverse(certified: Certified, one_sided: EtcdServer, guarded: EtcdServer) -> None:
    error = await refused(discovery(one_sided.url.replace("https", "http")))
    assert isinstance(error, Unavailable)
    assert "write https://" in error.message
    error = await refused(discovery(guarded.url.replace("http", "https"), ca_path=certified.ca))
    assert isinstance(error, Unavailable)
    assert "write http://" in error.message


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"ca_path": Path("/nowhere/ca.pem")}, r"etcd\.ca_path = '/nowhere/ca\.pem' holds no certificates: No such file"),
        ({"ca_text": "/etc/ca.pem"}, r"ETCD_AUTH_CA.* PEM text, not a path"),
        ({"cert_text": "x", "key_text": Secret(PASSWORD)}, r"ETCD_AUTH_CLIENT_CERT.*no usable pair"),
        ({"cert_path": Path("/nowhere/c.pem")}, r"etcd\.cert_path = '/nowhere/c\.pem': no usable pair"),
    ],
)
async def test_certificates_that_are_none_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        async with discovery("https://127.0.0.1:1", **settings):
            pass
    assert PASSWORD not in str(caught.value)
