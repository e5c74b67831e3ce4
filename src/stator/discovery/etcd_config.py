"""Settings of the etcd backend: the reference's variables (`spec/20 §4.2`), and what it has no settings for."""

from pathlib import Path
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from stator.config import Config, Secret, Setting
from stator.errors import ConfigError

__all__ = ["EtcdConfig"]


class EtcdConfig(Config, frozen=True, kw_only=True):
    """Where etcd is, who we are there, and how long it may take. Certificates are files, or texts as the reference has them."""

    section: ClassVar[str] = "etcd"
    location: ClassVar[str] = "endpoints"

    endpoints: Annotated[
        tuple[str, ...],
        Setting(
            doc="members of one etcd cluster, as `http://host:port`; without a scheme https is meant if a certificate is set",
            dyn="ETCD_ENDPOINTS",
        ),
    ] = ("http://localhost:2379",)
    username: Annotated[str, Setting(doc="user to log in as; empty: nobody", dyn="ETCD_AUTH_USERNAME")] = ""
    password: Annotated[Secret, Setting(doc="password of the user", dyn="ETCD_AUTH_PASSWORD")] = Secret("")
    ca_path: Annotated[
        Path | None, Setting(doc="certificates that sign those of etcd; none: those the system trusts, or `ca_text`")
    ] = None
    cert_path: Annotated[Path | None, Setting(doc="our certificate, where etcd wants one; none: `cert_text`")] = None
    key_path: Annotated[
        Path | None, Setting(doc="the key of our certificate; none: `key_text`, or in the file of the certificate")
    ] = None
    ca_text: Annotated[str, Setting(doc="PEM text instead of `ca_path`", dyn="ETCD_AUTH_CA")] = ""
    cert_text: Annotated[str, Setting(doc="PEM text instead of `cert_path`", dyn="ETCD_AUTH_CLIENT_CERT")] = ""
    key_text: Annotated[Secret, Setting(doc="PEM text instead of `key_path`", dyn="ETCD_AUTH_CLIENT_KEY")] = Secret("")
    server_name: Annotated[str, Setting(doc="name that the certificate of etcd must have; empty: the host of the endpoint")] = (
        ""
    )
    lease_ttl: Annotated[
        int,
        Setting(
            doc="an owner silent for longer is dead; signs of life are given every third of it. etcd may grant more",
            unit="s",
            ge=1,
            le=9_000_000_000,
            dyn="ETCD_LEASE_TTL",
            on_bad_dyn="default",
        ),
    ] = 10
    start_timeout: Annotated[
        float,
        Setting(doc="how long etcd is waited for at the start; once it was there it is waited for without end", unit="s", ge=0),
    ] = 10.0
    connect_timeout: Annotated[float, Setting(doc="longest wait for a member to take a connection", unit="s", gt=0)] = 1.0
    request_timeout: Annotated[
        float, Setting(doc="longest wait for a member's answer; then the next member is asked", unit="s", gt=0)
    ] = 2.0
    answer_timeout: Annotated[
        float,
        Setting(
            doc="longest wait for any member's answer; after it a registration fails and lists answer what is known",
            unit="s",
            gt=0,
        ),
    ] = 5.0
    reconnect_first: Annotated[float, Setting(doc="time before all members are tried again", unit="s", gt=0)] = 0.1
    reconnect_most: Annotated[
        float, Setting(doc="longest time between tries; a third of the TTL if that is shorter", unit="s", gt=0)
    ] = 2.0

    def check(self) -> None:
        if not self.endpoints:
            raise ConfigError("etcd.endpoints is empty; name at least one member, as http://host:2379")
        for endpoint in self.endpoints:
            if problem := _problem(endpoint):
                raise ConfigError(
                    f"etcd.endpoints (ETCD_ENDPOINTS) has {_shown(endpoint)!r}: {problem}; expected http://host:2379"
                )
        if bool(self.username) != bool(self.password):
            raise ConfigError(
                "etcd.username and etcd.password (ETCD_AUTH_USERNAME, ETCD_AUTH_PASSWORD) are set together or not at all"
            )
        for name, path, text in (
            ("ca", self.ca_path, self.ca_text),
            ("cert", self.cert_path, self.cert_text),
            ("key", self.key_path, self.key_text),
        ):
            if path is not None and text:
                raise ConfigError(f"etcd.{name}_path and etcd.{name}_text are both set; remove one")
        if bool(self.cert_text) != bool(self.key_text):
            raise ConfigError("etcd.cert_text and etcd.key_text (ETCD_AUTH_CLIENT_CERT, …_KEY) are set together or not at all")
        if self.key_path is not None and self.cert_path is None:
            raise ConfigError("etcd.key_path is set without etcd.cert_path")
        if self.tls and any(url.startswith("http://") for url in self.urls):
            raise ConfigError(
                "etcd.endpoints (ETCD_ENDPOINTS) has an http:// member although certificates are set; write https://, "
                "or remove the certificates"
            )
        if self.reconnect_most < self.reconnect_first:
            raise ConfigError(
                f"etcd.reconnect_most = {self.reconnect_most} is below etcd.reconnect_first = {self.reconnect_first}"
            )

    @property
    def tls(self) -> bool:
        """Whether certificates are set."""
        return any((self.ca_path, self.cert_path, self.ca_text, self.cert_text))

    @property
    def urls(self) -> tuple[str, ...]:
        """The members, each once, with its scheme and without a slash at the end."""
        scheme = "https" if self.tls else "http"
        whole = (url if "://" in url else f"{scheme}://{url}" for url in map(str.strip, self.endpoints))
        return tuple(dict.fromkeys(url.rstrip("/") for url in whole))


def _shown(url: str) -> str:
    """`url` for people: without what stands before the host, which may be a password."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _problem(url: str) -> str:
    """Why `url` names no member; "" if it does."""
    try:
        parts = urlsplit(url.strip() if "://" in url else f"http://{url.strip()}")
        _ = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme not in ("http", "https"):
        return f"scheme {parts.scheme!r} is neither http nor https"
    if parts.username is not None or parts.password is not None:
        return "user and password belong into etcd.username and etcd.password"
    if parts.path.strip("/") or parts.query or parts.fragment:
        return "it has more than a host and a port"
    return "" if parts.hostname else "it names no host"
