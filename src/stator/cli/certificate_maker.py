"""A private authority and its certificates. The only module that imports `cryptography`."""

import contextlib
import ipaddress
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from stator.errors import UsageError

__all__ = ["AUTHORITY", "AUTHORITY_KEY", "CLUSTER_NAME", "make_authority", "make_certificate"]

AUTHORITY, AUTHORITY_KEY = "ca.pem", "ca-key.pem"
CLUSTER_NAME = "stator"
"""name in every certificate: what `tls.server_name` asks for, so that addresses may change"""

_AUTHORITY_DAYS = 3650
_EARLY = timedelta(hours=1)
"""how long ago certificates begin: clocks differ"""
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,60}[A-Za-z0-9])?")
_DNS_NAME = re.compile(r"(\*\.)?[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")


def make_authority(directory: Path) -> None:
    """Put an authority into `directory`, which is made (mode 0700). Raises `UsageError` if there is one, and changes nothing then."""
    certificate, key_path = directory / AUTHORITY, directory / AUTHORITY_KEY
    for path in (certificate, key_path):
        if path.exists():
            raise UsageError(
                f"{path} exists and is not overwritten; `stator certs issue NAME --dir {directory}` adds certificates"
            )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {directory}: {error.strerror or error}") from error
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject("Stator cluster authority")
    usage = _usage(signs=True)
    built = (
        _builder(subject, subject, key.public_key(), days=_AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(key_path, _pem_key(key), private=True, replace=False)
    _write(certificate, built.public_bytes(serialization.Encoding.PEM), private=False, replace=False)


def make_certificate(directory: Path, name: str, *, hosts: tuple[str, ...], days: int, renew: bool) -> None:
    """A certificate for the process `name`, for listening and dialling. Raises `UsageError` if there is one, unless `renew`."""
    if not _NAME.fullmatch(name) or name in ("ca", "ca-key") or name.endswith("-key"):
        raise UsageError(f"{name!r} cannot be the name of a process: letters, digits, dots and hyphens; not ca, and not …-key")
    certificate, key_path = directory / f"{name}.pem", directory / f"{name}-key.pem"
    for path in (certificate, key_path):
        if path.exists() and not renew:
            raise UsageError(f"{path} exists and is not overwritten; --renew replaces it")
    authority, authority_key = _read_authority(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    names = dict.fromkeys((CLUSTER_NAME, name, "localhost", "127.0.0.1", "::1", *hosts))
    built = (
        _builder(_subject(name), authority.subject, key.public_key(), days=days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([_alternative(each) for each in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write(key_path, _pem_key(key), private=True, replace=renew)
    _write(certificate, built.public_bytes(serialization.Encoding.PEM), private=False, replace=renew)


def _read_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((directory / AUTHORITY).read_bytes())
        key = serialization.load_pem_private_key((directory / AUTHORITY_KEY).read_bytes(), password=None)
    except FileNotFoundError as error:
        raise UsageError(f"{error.filename} is not there; `stator certs init {directory}` makes an authority") from error
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"the authority in {directory} cannot be used: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise UsageError(f"{AUTHORITY_KEY} in {directory} is not the key of {AUTHORITY}")
    return certificate, key


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + timedelta(days=days))
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Stator"), x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _DNS_NAME.fullmatch(host):
        raise UsageError(f"{host!r} is neither an address nor a host name")
    return x509.DNSName(host)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write(path: Path, data: bytes, *, private: bool, replace: bool) -> None:
    """Write a file that others see as a whole or not at all; a private one is never readable by others."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "wb") as file:
            file.write(data)
        if replace:
            draft.replace(path)
        else:
            os.link(draft, path)  # fails if it is there by now
            draft.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
