"""Settings of the NATS event plane."""

from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from stator.config import Config, Setting
from stator.errors import ConfigError

__all__ = ["NatsConfig", "shown_url"]

_SCHEMES = ("nats", "tls", "ws", "wss")


class NatsConfig(Config, frozen=True, kw_only=True):
    """Where the servers are, and what may wait while none of them is there."""

    section: ClassVar[str] = "nats"

    servers: Annotated[
        tuple[str, ...],
        Setting(doc="servers of one cluster, as `nats://host:port`; the first that answers is used", dyn="NATS_SERVER"),
    ] = ("nats://127.0.0.1:4222",)
    connect_timeout: Annotated[float, Setting(doc="longest wait for a server to take a connection", unit="s", gt=0)] = 2.0
    reconnect_first: Annotated[float, Setting(doc="time before the first try to connect again", unit="s", gt=0)] = 0.1
    reconnect_most: Annotated[float, Setting(doc="longest time between tries", unit="s", gt=0)] = 5.0
    ping_interval: Annotated[
        float,
        Setting(doc="time between questions whether the server is still there; it may take as long to answer", unit="s", gt=0),
    ] = 10.0
    send_queue: Annotated[int, Setting(doc="messages that wait for the server; the oldest is dropped for the next", ge=1)] = (
        32_768
    )
    send_queue_bytes: Annotated[
        int, Setting(doc="bytes of messages that wait for the server; one message may always wait", unit="bytes", ge=1)
    ] = 64 * 2**20

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

    @property
    def urls(self) -> list[str]:
        """The servers, each with its scheme."""
        return [url if "://" in url else f"nats://{url}" for url in self.servers]


def shown_url(url: str) -> str:
    """`url` for people: without what stands before the host, which may be a password."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _problem(url: str) -> str:
    """Why `url` names no server; "" if it does."""
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        _ = parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme not in _SCHEMES:
        return f"scheme {parts.scheme!r} is none of {', '.join(_SCHEMES)}"
    return "" if parts.hostname else "it names no host"
