"""Settings of what goes over NATS: requests and events."""

from pathlib import Path
from typing import Annotated, ClassVar
from urllib.parse import SplitResult, urlsplit

from stator.config import Config, Secret, Setting
from stator.errors import ConfigError

__all__ = ["NatsConfig", "shown_url"]

_SCHEMES = ("nats", "tls")


class NatsConfig(Config, frozen=True, kw_only=True):
    """Where the servers are, who we are to them, how long to wait, what may wait while none of them is there."""

    section: ClassVar[str] = "nats"

    servers: Annotated[
        tuple[str, ...],
        Setting(
            doc="servers of one cluster, as `nats://host:port`, or `tls://host:port` to insist on TLS; the first that answers is used",
            dyn="NATS_SERVER",
        ),
    ] = ("nats://127.0.0.1:4222",)

    # -- login: one of the kinds; without any, user and password of the server's address, else user "user", password "user"
    auth_username: Annotated[str, Setting(doc="log in as this user, with `auth_password`", dyn="NATS_AUTH_USERNAME")] = ""
    auth_password: Annotated[Secret, Setting(doc="its password", dyn="NATS_AUTH_PASSWORD")] = Secret("")
    auth_token: Annotated[Secret, Setting(doc="log in with this token", dyn="NATS_AUTH_TOKEN")] = Secret("")
    auth_nkey: Annotated[
        Secret, Setting(doc="log in with this nkey, given as its seed (`SU…`); needs the extra `certs`", dyn="NATS_AUTH_NKEY")
    ] = Secret("")
    auth_credentials_file: Annotated[
        Path | None,
        Setting(
            doc="log in with this file of a JWT and its seed (`.creds`), read at each connection; needs the extra `certs`",
            dyn="NATS_AUTH_CREDENTIALS_FILE",
        ),
    ] = None

    # -- TLS
    tls_ca: Annotated[
        Path | None,
        Setting(doc="certificates of who signs the servers'; default: the system's. Given, a server without TLS is refused"),
    ] = None
    tls_cert: Annotated[Path | None, Setting(doc="our certificate, for servers that ask for one")] = None
    tls_key: Annotated[Path | None, Setting(doc="its key")] = None
    tls_name: Annotated[str, Setting(doc="name that the servers' certificates bear; default: the host's in `servers`")] = ""
    tls_first: Annotated[bool, Setting(doc="TLS before the server's greeting, as its `handshake_first` wants it")] = False

    # -- waits
    connect_timeout: Annotated[float, Setting(doc="longest wait for one server to take a connection", unit="s", gt=0)] = 2.0
    reconnect_first: Annotated[float, Setting(doc="time before the first try to connect again", unit="s", gt=0)] = 0.1
    reconnect_most: Annotated[float, Setting(doc="longest time between tries", unit="s", gt=0)] = 1.0
    ping_interval: Annotated[float, Setting(doc="time between questions whether the server is still there", unit="s", gt=0)] = (
        5.0
    )
    ping_timeout: Annotated[
        float, Setting(doc="time the server has to answer; one that does not is given up", unit="s", gt=0)
    ] = 1.0
    request_timeout: Annotated[
        float,
        Setting(doc="longest wait for a worker to acknowledge a request", unit="s", gt=0, dyn="DYN_NATS_REQUEST_TIMEOUT_SECS"),
    ] = 10.0

    # -- what may wait
    send_queue: Annotated[int, Setting(doc="events that wait for the server; the oldest is dropped for the next", ge=1)] = (
        32_768
    )
    send_queue_bytes: Annotated[
        int, Setting(doc="bytes of events that wait for the server; one event may always wait", unit="bytes", ge=1)
    ] = 64 * 2**20
    unacknowledged: Annotated[
        int, Setting(doc="requests of a process that wait for their acknowledgement; more are refused", ge=1)
    ] = 65_536

    def check(self) -> None:
        if self.reconnect_most < self.reconnect_first:
            raise ConfigError(
                f"nats.reconnect_most = {self.reconnect_most} is below nats.reconnect_first = {self.reconnect_first}"
            )
        if not self.servers:
            raise ConfigError("nats.servers is empty; name at least one server, as nats://host:port")
        for url in self.servers:
            if problem := _problem(url):
                raise ConfigError(f"nats.servers (NATS_SERVER) has {shown_url(url)!r}: {problem}; expected nats://host:port")
        self._check_login()
        if (self.tls_cert is None) is not (self.tls_key is None):
            raise ConfigError("nats.tls_cert and nats.tls_key belong together; one of them is missing")

    def _check_login(self) -> None:
        if bool(self.auth_username) is not bool(self.auth_password):
            raise ConfigError(
                "nats.auth_username (NATS_AUTH_USERNAME) and nats.auth_password (NATS_AUTH_PASSWORD) belong together; one is missing"
            )
        given = {
            "nats.auth_username": self.auth_username,
            "nats.auth_token": self.auth_token,
            "nats.auth_nkey": self.auth_nkey,
            "nats.auth_credentials_file": self.auth_credentials_file,
        }
        kinds = [name for name, value in given.items() if value]
        if len(kinds) > 1:
            raise ConfigError(f"{' and '.join(kinds)} are different ways to log in; keep one of them")

    def __repr__(self) -> str:
        """Passwords may stand in the addresses."""
        return f"NatsConfig(servers={tuple(map(shown_url, self.servers))!r}, …)"

    @property
    def urls(self) -> list[str]:
        """The servers, each with its scheme."""
        return [url if "://" in url else f"nats://{url}" for url in self.servers]

    @property
    def shown(self) -> str:
        """The servers, for people."""
        return ", ".join(map(shown_url, self.urls))

    def insists_on_tls(self, url: str) -> bool:
        """Whether a server at `url` that does not speak TLS is refused."""
        return url.startswith("tls://") or self.tls_first or self.tls_ca is not None or self.tls_cert is not None


def shown_url(url: str) -> str:
    """`url` for people: without what stands before the host, which may be a password."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _problem(url: str) -> str:
    """Why `url` names no server; "" if it does."""
    try:
        parts: SplitResult = urlsplit(url if "://" in url else f"nats://{url}")
        _ = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme not in _SCHEMES:
        return f"scheme {parts.scheme!r} is none of {', '.join(_SCHEMES)}"
    return "" if parts.hostname else "it names no host"
