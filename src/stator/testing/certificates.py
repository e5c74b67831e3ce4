"""Authorities and certificates for tests, good ones and bad ones. Needs the library `cryptography`."""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stator.security import Tls, TlsConfig
from stator.tasks import SystemClock

__all__ = ["Authority", "tls_of"]

_SOME = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class Authority:
    """A private authority; its certificate is at `path`."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        self.path = directory / f"{name}.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _name(name)
        now = datetime.now(UTC)
        self._certificate = (
            _builder(self._subject, self._subject, self._key, begins=now - timedelta(hours=1), ends=now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "stator"),
        begins: timedelta = timedelta(hours=-1),
        ends: timedelta = timedelta(days=30),
        password: str = "",
    ) -> tuple[Path, Path]:
        """A certificate for `hosts`, valid from now plus `begins` to now plus `ends`; paths of certificate and key, which are replaced."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        built = (
            _builder(_name(name), self._subject, key, begins=now + begins, ends=now + ends)
            .add_extension(x509.ExtendedKeyUsage(_SOME), critical=False)
            .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        locked = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        cert_path, key_path = self.directory / f"{name}.pem", self.directory / f"{name}-key.pem"
        key_path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
        cert_path.write_bytes(built.public_bytes(serialization.Encoding.PEM))
        return cert_path, key_path


def tls_of(
    authority: Authority,
    name: str = "process",
    *,
    mutual: bool = True,
    trusts: Authority | None = None,
    server_name: str = "stator",
    patience: float = 1.0,
) -> Tls:
    """A process with a good certificate, which trusts the authority's others, or those of `trusts`."""
    cert, key = authority.issue(name)
    trusted = (trusts or authority).path
    config = TlsConfig(
        cert_path=cert,
        key_path=key,
        ca_cert_path=trusted,
        client_ca_cert_path=trusted if mutual else None,
        server_name=server_name,
        handshake_timeout=patience,
    )
    return Tls(config, clock=SystemClock())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
