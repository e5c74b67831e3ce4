"""Settings of health, canary and status server."""

import ipaddress
from typing import Annotated, ClassVar, Literal

from stator.config import Config, Setting
from stator.errors import ConfigError

__all__ = ["HealthConfig"]

FIXED_PATHS = ("/metrics", "/metadata", "/drain", "/resume")
ENGINE_PREFIX = "/engine/"


def _reference_port(text: str) -> int:
    """The reference's port is a signed number of 16 bits; every negative one means off (`spec/25 §1.2`)."""
    port = int(text)
    if not -(2**15) <= port < 2**15:
        raise ValueError("the reference has it as a signed 16-bit number: expected -32768 to 32767")
    return max(port, -1)


def _whole_seconds(text: str) -> int:
    """The reference takes no fractions here (`spec/25 §1.2`)."""
    return int(text)


class HealthConfig(Config, frozen=True, kw_only=True):
    """What a process tells about its health, and how it finds out. Times are in seconds."""

    section: ClassVar[str] = "health"

    port: Annotated[
        int,
        Setting(
            doc="port of the status server; -1: no server, 0: any free one",
            dyn="DYN_SYSTEM_PORT",
            dyn_read=_reference_port,
            ge=-1,
            le=65535,
        ),
    ] = -1
    host: Annotated[
        str, Setting(doc="address of the status server; beyond loopback needs insecure_bind", dyn="DYN_SYSTEM_HOST")
    ] = "127.0.0.1"
    insecure_bind: Annotated[bool, Setting(doc="allow the status server, which has no TLS, beyond loopback")] = False
    starting_status: Annotated[
        Literal["ready", "notready"],
        Setting(doc="health of the process until it is set", dyn="DYN_SYSTEM_STARTING_HEALTH_STATUS"),
    ] = "notready"
    endpoints: Annotated[
        tuple[str, ...],
        Setting(
            doc="names of endpoints that must all be ready for the process to be", dyn="DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS"
        ),
    ] = ()
    health_path: Annotated[str, Setting(doc="path of the health page", dyn="DYN_SYSTEM_HEALTH_PATH")] = "/health"
    live_path: Annotated[str, Setting(doc="path of the liveness page", dyn="DYN_SYSTEM_LIVE_PATH")] = "/live"

    canary: Annotated[bool, Setting(doc="probe endpoints that have a canary payload", dyn="DYN_HEALTH_CHECK_ENABLED")] = False
    canary_wait: Annotated[
        float,
        Setting(
            doc="an endpoint silent for this long is probed",
            unit="s",
            gt=0,
            dyn="DYN_CANARY_WAIT_TIME",
            dyn_read=_whole_seconds,
        ),
    ] = 10.0
    canary_timeout: Annotated[
        float,
        Setting(
            doc="a canary's whole answer",
            unit="s",
            gt=0,
            dyn="DYN_HEALTH_CHECK_REQUEST_TIMEOUT",
            dyn_read=_whole_seconds,
        ),
    ] = 3.0
    canary_busy_limit: Annotated[
        float | None,
        Setting(
            doc="an endpoint at capacity that answered nothing for this long is sick, not busy; none: never", unit="s", gt=0
        ),
    ] = 300.0

    body_limit: Annotated[int, Setting(doc="largest request body of the status server", unit="bytes", ge=1)] = 2**20
    http_timeout: Annotated[
        float, Setting(doc="to receive a request of the status server, and to send its answer", unit="s", gt=0)
    ] = 10.0
    callback_timeout: Annotated[float, Setting(doc="what an engine route, a drain or a resume may take", unit="s", gt=0)] = (
        300.0
    )
    max_connections: Annotated[int, Setting(doc="connections to the status server at one time", ge=1)] = 128

    def check(self) -> None:
        """Routes do not hide each other; a server without TLS stays on loopback unless told otherwise."""
        for name in ("health_path", "live_path"):
            path: str = getattr(self, name)
            if not path.startswith("/") or path in FIXED_PATHS or path.startswith(ENGINE_PREFIX):
                raise ConfigError(
                    f"{name} = {path!r}: expected a path that begins with / and is none of "
                    f"{', '.join(FIXED_PATHS)} nor below {ENGINE_PREFIX}"
                )
        if self.health_path == self.live_path:
            raise ConfigError(f"health_path and live_path are both {self.live_path!r}; give them different paths")
        if self.port >= 0 and not (self.insecure_bind or _is_loopback(self.host)):
            raise ConfigError(
                f"host {self.host!r} of the status server is reachable from other machines over plain HTTP, and its routes "
                "drain the process; use a loopback address, or allow it with insecure_bind (STATOR_HEALTH_INSECURE_BIND=true)"
            )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
