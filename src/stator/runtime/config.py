"""Settings of a runtime."""

import ipaddress
from typing import Annotated, Literal

from stator.config import Config, Secret, Setting
from stator.errors import ConfigError
from stator.transports.inbox import PhaseLimits

__all__ = ["RuntimeConfig", "is_wildcard"]


def _discovery(text: str) -> str:
    """The reference says `mem` for memory, and falls back to etcd when nothing is said."""
    return {"mem": "memory"}.get(text, text)


def _request_plane(text: str) -> str:
    """Any case is accepted, and two values (`spec/10 §1.7`)."""
    if text.lower() not in ("tcp", "nats"):
        raise ValueError("expected tcp or nats")
    return text.lower()


def _event_plane(text: str) -> str:
    """The reference knows two, and takes its default for anything else (`spec/25 §2`)."""
    if text not in ("nats", "zmq"):
        raise ValueError("expected nats or zmq")
    return text


_SHORTEST_SECRET = 16
"""characters: who listens to a handshake may try secrets at leisure"""


def is_wildcard(host: str) -> bool:
    """Whether listening on `host` means all addresses of the machine: nobody can connect to that."""
    if host in ("", "*", "0"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_unspecified


class RuntimeConfig(Config, frozen=True, kw_only=True):
    """How a process joins a cluster, and how long its requests wait. Times are in seconds; None waits for ever."""

    discovery: Annotated[
        str,
        Setting(
            doc="backend that knows who is there: a plug-in's name, or with its place: etcd://host:2379,host2:2379, file:///directory",
            dyn="DYN_DISCOVERY_BACKEND",
            dyn_read=_discovery,
        ),
    ] = "file"
    plane: Annotated[
        Literal["auto", "native", "compatible", "memory"],
        Setting(doc="how requests travel; auto: native where the worker speaks it, compatible otherwise"),
    ] = "auto"
    request_plane: Annotated[
        Literal["tcp", "nats", "http2"],
        Setting(
            doc="what a worker takes requests of the compatible plane by; callers follow each worker's record",
            dyn="DYN_REQUEST_PLANE",
            dyn_read=_request_plane,
            on_bad_dyn="error",
            dyn_empty="value",
        ),
    ] = "tcp"
    event_plane: Annotated[
        str,
        Setting(
            doc="how events travel: a plug-in's name, or auto: memory when discovery is in memory, zmq otherwise",
            dyn="DYN_EVENT_PLANE",
            dyn_read=_event_plane,
            on_bad_dyn="default",
        ),
    ] = "auto"
    host: Annotated[str, Setting(doc="address that listeners bind to", dyn="DYN_TCP_RPC_HOST")] = "127.0.0.1"
    advertise_host: Annotated[
        str, Setting(doc="address that others reach us at; default: the pod's, or the one bound to, or the routable one")
    ] = ""
    insecure_bind: Annotated[bool, Setting(doc="allow listening beyond loopback without secret or TLS")] = False
    cluster_secret: Annotated[
        Secret | None,
        Setting(doc="what all processes of the cluster prove to each other on the native plane; at least 16 characters"),
    ] = None
    compatible: Annotated[
        bool, Setting(doc="speak the compatible planes, which prove nothing, although a cluster secret is set")
    ] = False
    connect_timeout: Annotated[float | None, Setting(doc="wait for a connection", unit="s", gt=0)] = 3.0
    accept_timeout: Annotated[
        float | None, Setting(doc="wait for the worker to take the request", unit="s", gt=0, dyn="DYN_TCP_REQUEST_TIMEOUT")
    ] = 5.0
    call_home_timeout: Annotated[
        float | None, Setting(doc="wait for the worker to call home (compatible plane; includes its queue)", unit="s", gt=0)
    ] = 60.0
    prologue_timeout: Annotated[float | None, Setting(doc="wait for the handler to be called", unit="s", gt=0)] = 60.0
    first_item_timeout: Annotated[float | None, Setting(doc="wait for the first item", unit="s", gt=0)] = 300.0
    item_timeout: Annotated[float | None, Setting(doc="wait for each further item", unit="s", gt=0)] = 120.0
    input_timeout: Annotated[
        float | None,
        Setting(doc="bidirectional requests: a handler's wait for an input, and a caller's wait to send one", unit="s", gt=0),
    ] = 300.0
    request_timeout: Annotated[float | None, Setting(doc="longest time of a whole request", unit="s", gt=0)] = None
    instance_timeout: Annotated[
        float, Setting(doc="how long a request waits for an instance when there is none", unit="s", ge=0)
    ] = 2.0
    native_retry: Annotated[
        float, Setting(doc="time before the native plane is tried again after a fallback", unit="s", gt=0)
    ] = 30.0
    shutdown_timeout: Annotated[
        float,
        Setting(
            doc="how long running requests may take at shutdown",
            unit="s",
            ge=0,
            dyn="DYN_RUNTIME_GRACEFUL_SHUTDOWN_TIMEOUT_SECS",
        ),
    ] = 30.0

    def check(self) -> None:
        if not self.host:
            raise ConfigError("host is empty, which would listen everywhere; name an address, 0.0.0.0 if it is meant")
        if self.advertise_host and is_wildcard(self.advertise_host):
            raise ConfigError(f"advertise_host = {self.advertise_host!r} is a wildcard; others cannot connect to it")
        if self.cluster_secret is not None and len(self.cluster_secret.reveal()) < _SHORTEST_SECRET:
            raise ConfigError(
                f"cluster_secret is too short: at least {_SHORTEST_SECRET} characters, better 32 random bytes in hex"
            )
        if self.closed and self.plane == "compatible":
            raise ConfigError(
                "plane = compatible cannot prove the cluster secret; set compatible (STATOR_COMPATIBLE=true) if it is meant"
            )

    @property
    def closed(self) -> bool:
        """Whether only planes that prove the cluster secret are spoken."""
        return self.cluster_secret is not None and not self.compatible

    @property
    def limits(self) -> PhaseLimits:
        """The limits of a request's phases."""
        return PhaseLimits(
            connect=self.connect_timeout,
            accept=self.accept_timeout,
            call_home=self.call_home_timeout,
            prologue=self.prologue_timeout,
            first_item=self.first_item_timeout,
            items=self.item_timeout,
            input=self.input_timeout,
            total=self.request_timeout,
        )
