"""The certificate is renewed while the frontend serves; clients that do not speak TLS, or speak it slowly, are cut off."""

import asyncio
import logging
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from stator.testing.fake_models import FakeEngine, FakeModels
from stator.testing.frontend_kit import frontend

pytestmark = pytest.mark.timeout(60)


def certificate(name: str) -> tuple[bytes, bytes]:
    """A certificate that nobody trusts, and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return made.public_bytes(pem), key.private_bytes(pem, form, plain)


class Files:
    def __init__(self, directory: Path) -> None:
        self.cert, self.key = directory / "cert.pem", directory / "key.pem"
        self.put("first")

    def put(self, name: str) -> None:
        cert, key = certificate(name)
        self.cert.write_bytes(cert)
        self.key.write_bytes(key)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def echo_models() -> FakeModels:
    models = FakeModels()
    models.add("echo", FakeEngine())
    return models


def anyone() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def connect(port: int, name: str = "localhost") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, ssl=anyone(), server_hostname=name)


async def served_name(port: int, name: str = "localhost") -> str:
    """Whose certificate a new connection gets."""
    _, writer = await connect(port, name)
    try:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
    (attribute,) = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(attribute.value)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])  # an address is not told to the server
async def test_new_connections_get_the_new_certificate_and_old_ones_go_on(
    files: Files, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO, "stator.security")
    async with frontend(echo_models(), tls_cert_path=files.cert, tls_key_path=files.key) as running:
        assert await served_name(running.port, name) == "first"
        reader, writer = await connect(running.port)
        await asyncio.to_thread(files.put, "second")
        await until(lambda: "were read again" in caplog.text)
        assert await served_name(running.port, name) == "second"
        writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
        writer.close()


async def test_files_that_do_not_fit_keep_the_old_certificate(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    async with frontend(echo_models(), tls_cert_path=files.cert, tls_key_path=files.key) as running:
        await asyncio.to_thread(files.key.write_bytes, certificate("other")[1])
        await until(lambda: "certificates in use stay" in caplog.text)
        assert await served_name(running.port) == "first"
        await asyncio.to_thread(files.cert.write_text, "nonsense")
        await asyncio.sleep(1.2)  # one more look
        assert await served_name(running.port) == "first"
        assert caplog.text.count("certificates in use stay") == 1
        caplog.set_level(logging.INFO, "stator.security")
        await asyncio.to_thread(files.put, "second")
        await until(lambda: "were read again" in caplog.text)
        assert await served_name(running.port) == "second"


async def test_who_does_not_shake_hands_is_cut_off(files: Files) -> None:
    settings = {"tls_cert_path": files.cert, "tls_key_path": files.key, "header_timeout": 0.3}
    async with frontend(echo_models(), **settings) as running:
        for beginning in (b"", b"\x16\x03\x01", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(beginning)
            try:
                assert b"HTTP" not in await asyncio.wait_for(reader.read(), 5)
            except ConnectionResetError:
                pass
            writer.close()
        assert await served_name(running.port) == "first"
