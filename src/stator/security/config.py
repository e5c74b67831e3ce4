"""Settings of TLS between processes."""

from pathlib import Path
from typing import Annotated, ClassVar

from stator.config import Config, Setting
from stator.errors import ConfigError

__all__ = ["TlsConfig"]


class TlsConfig(Config, frozen=True, kw_only=True):
    """Certificates for every plane; with none of them set, connections between processes are not encrypted. Files are PEM, and are
    read again when they change.
    """

    section: ClassVar[str] = "tls"

    cert_path: Annotated[
        Path | None,
        Setting(doc="certificate chain of this process, which listeners show; with key_path", dyn="DYN_TCP_TLS_CERT_PATH"),
    ] = None
    key_path: Annotated[Path | None, Setting(doc="its key, not encrypted", dyn="DYN_TCP_TLS_KEY_PATH")] = None
    ca_cert_path: Annotated[
        Path | None,
        Setting(doc="authorities whose certificates a dialler accepts; default: the system's", dyn="DYN_TCP_TLS_CA_CERT_PATH"),
    ] = None
    server_name: Annotated[
        str,
        Setting(
            doc="name that a dialler demands of every certificate it is shown; default: the host it dialled",
            dyn="DYN_TCP_TLS_SERVER_NAME",
        ),
    ] = ""
    client_ca_cert_path: Annotated[
        Path | None,
        Setting(
            doc="mutual TLS: authorities of which whoever connects must show a certificate",
            dyn="DYN_TCP_TLS_CLIENT_CA_CERT_PATH",
        ),
    ] = None
    client_cert_path: Annotated[
        Path | None,
        Setting(
            doc="certificate that a dialler shows where one is asked for; default: cert_path",
            dyn="DYN_TCP_TLS_CLIENT_CERT_PATH",
        ),
    ] = None
    client_key_path: Annotated[
        Path | None, Setting(doc="its key, not encrypted; default: key_path", dyn="DYN_TCP_TLS_CLIENT_KEY_PATH")
    ] = None
    handshake_timeout: Annotated[
        float, Setting(doc="longest TLS handshake, on both sides", unit="s", gt=0, dyn="DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS")
    ] = 3.0

    def check(self) -> None:
        """A certificate needs its key, and only who shows a certificate can ask for one."""
        for cert, key in (("cert_path", "key_path"), ("client_cert_path", "client_key_path")):
            if (getattr(self, cert) is None) != (getattr(self, key) is None):
                raise ConfigError(f"tls.{cert} and tls.{key} must be given together")
        if self.client_ca_cert_path is not None and self.cert_path is None:
            raise ConfigError(
                "tls.client_ca_cert_path asks callers for certificates, which needs tls.cert_path and tls.key_path too"
            )
        if self.server_name and not self.enabled:
            raise ConfigError("tls.server_name has no effect without certificates; set tls.ca_cert_path")

    @property
    def enabled(self) -> bool:
        """Whether any certificate is configured."""
        return any((self.cert_path, self.ca_cert_path, self.client_ca_cert_path, self.client_cert_path))

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read."""
        paths = (
            self.cert_path,
            self.key_path,
            self.ca_cert_path,
            self.client_ca_cert_path,
            self.client_cert_path,
            self.client_key_path,
        )
        return tuple(path for path in paths if path is not None)
