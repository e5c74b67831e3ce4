"""Settings of the HTTP frontend."""

import ipaddress
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from stator.config import Config, Setting
from stator.errors import ConfigError
from stator.frontend.admission_limits import AdmissionLimits
from stator.telemetry.names import FRONTEND_PREFIX

__all__ = ["FrontendConfig", "is_loopback"]

_MIB = 2**20


def _mebibytes(text: str) -> int:
    return int(text) * _MIB


def _disabled(text: str) -> str:
    return "off" if text.strip().lower() in ("1", "true", "yes", "on") else "loopback"


class FrontendConfig(Config, frozen=True, kw_only=True):
    """What one frontend process needs to know. Times are in seconds, sizes in bytes."""

    section: ClassVar[str] = "http"

    host: Annotated[
        str, Setting(doc="address to listen on; beyond loopback needs TLS or insecure_bind", dyn="DYN_HTTP_HOST")
    ] = "127.0.0.1"
    port: Annotated[int, Setting(doc="port to listen on; 0: any free one", dyn="DYN_HTTP_PORT", ge=0, le=65535)] = 8000
    insecure_bind: Annotated[bool, Setting(doc="allow plain HTTP beyond loopback")] = False
    tls_cert_path: Annotated[Path | None, Setting(doc="PEM certificate chain of the server", dyn="DYN_TLS_CERT_PATH")] = None
    tls_key_path: Annotated[Path | None, Setting(doc="PEM key of the certificate", dyn="DYN_TLS_KEY_PATH")] = None

    api_keys_path: Annotated[
        Path | None,
        Setting(
            doc="file of the API keys that clients need (docs/api-keys.md), read again when it changes; none: nobody needs one"
        ),
    ] = None
    api_key_shares: Annotated[
        int,
        Setting(
            doc="frontend processes that clients are spread over: each gives this part of the limits of a key; "
            "`stator serve` knows its own",
            ge=1,
            le=4096,
        ),
    ] = 1

    body_limit: Annotated[
        int, Setting(doc="largest request body", unit="bytes", dyn="DYN_HTTP_BODY_LIMIT_MB", dyn_read=_mebibytes, ge=1)
    ] = 45 * _MIB
    body_budget: Annotated[int, Setting(doc="all bodies being received at one time", unit="bytes", ge=1)] = 512 * _MIB
    header_limit: Annotated[int, Setting(doc="longest request line or header field", unit="bytes", ge=256, le=_MIB)] = 16 * 1024
    header_count: Annotated[int, Setting(doc="most header fields of a request", ge=8, le=10_000)] = 128

    head_limit: Annotated[
        int, Setting(doc="longest request head, its line and all fields together", unit="bytes", ge=1024, le=16 * _MIB)
    ] = 64 * 1024
    max_connections: Annotated[
        int, Setting(doc="client connections at one time, idle ones included; more are answered 503 and closed", ge=1)
    ] = 16_384

    header_timeout: Annotated[
        float, Setting(doc="from the first byte of a request to the end of its headers", unit="s", gt=0)
    ] = 10.0
    body_timeout: Annotated[float, Setting(doc="grace for a request body to arrive, beside body_rate", unit="s", gt=0)] = 30.0
    body_rate: Annotated[int, Setting(doc="slowest upload that is waited for", unit="bytes per second", ge=1)] = 16 * 1024
    write_timeout: Annotated[
        float, Setting(doc="a client that takes no byte for this long is disconnected", unit="s", gt=0)
    ] = 60.0
    idle_timeout: Annotated[float, Setting(doc="a connection without a request is closed", unit="s", gt=0)] = 620.0
    silence: Annotated[float, Setting(doc="a stream with nothing to send gets a comment, for proxies", unit="s", gt=0)] = 10.0

    metrics_prefix: Annotated[
        str, Setting(doc="what most names of the frontend's metrics begin with", dyn="DYN_METRICS_PREFIX")
    ] = FRONTEND_PREFIX
    max_requests: Annotated[
        int, Setting(doc="requests answered at one time, waiting ones included; more are refused as overloaded", ge=1)
    ] = 4096
    burst: Annotated[
        int, Setting(doc="requests that begin in one turn of the event loop; the others of a burst follow in order", ge=1)
    ] = 16
    queue: Annotated[
        int,
        Setting(
            doc="calls of one model and priority that wait while its workers are at capacity; half of them of one tenant at most; "
            "0: none wait, workers refuse for themselves",
            ge=0,
        ),
    ] = 1024
    queue_wait: Annotated[
        float, Setting(doc="a request that would probably wait longer than this is refused at once; 0: none is", unit="s", ge=0)
    ] = 0.5
    queue_target: Annotated[
        float,
        Setting(doc="the same, once the queue has stood above this for queue_burst; 0: queues may stand", unit="s", ge=0),
    ] = 0.02
    queue_burst: Annotated[
        float,
        Setting(doc="a queue that stands for longer and does not shrink is no burst any more; 0: it may stand", unit="s", ge=0),
    ] = 0.1
    queue_timeout: Annotated[float, Setting(doc="longest wait in the queue, whatever was expected", unit="s", gt=0)] = 10.0
    queue_ageing: Annotated[
        int, Setting(doc="a priority class that others were preferred to so often is next; 0: it waits for ever", ge=0)
    ] = 8
    queue_tenants: Annotated[
        int, Setting(doc="API keys remembered, to share capacity fairly between them; 0: all are one tenant", ge=0)
    ] = 1024
    queue_priorities: Annotated[
        bool, Setting(doc="whether requests may say their priority (x-stator-priority, service_tier)")
    ] = True
    max_choices: Annotated[int, Setting(doc="choices of one request: n times the number of prompts", ge=1)] = 2048
    overload_status: Annotated[
        int, Setting(doc="HTTP status of an overload", dyn="DYN_HTTP_OVERLOAD_STATUS_CODE", ge=400, le=599)
    ] = 503
    retry_after: Annotated[int, Setting(doc="what Retry-After says when unavailable or overloaded", unit="s", ge=0)] = 1
    admin_api: Annotated[
        Literal["off", "loopback", "all"],
        Setting(
            doc="who may read and change /busy_threshold: clients on this machine (a proxy's are), or all; off: the route is not there",
            dyn="DYN_DISABLE_FRONTEND_ADMIN_API",
            dyn_read=_disabled,
        ),
    ] = "loopback"
    graceful_shutdown: Annotated[
        float,
        Setting(
            doc="how long running requests may go on after a stop",
            unit="s",
            dyn="DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS",
            ge=0,
        ),
    ] = 5.0

    @property
    def admission(self) -> AdmissionLimits:
        """The settings of the queue."""
        return AdmissionLimits(
            depth=self.queue,
            wait=self.queue_wait,
            target=self.queue_target,
            burst=self.queue_burst,
            timeout=self.queue_timeout,
            ageing=self.queue_ageing,
            tenants=self.queue_tenants,
        )

    def check(self) -> None:
        """TLS needs both files; plain HTTP stays on loopback unless told otherwise (design, security)."""
        if (self.tls_cert_path is None) != (self.tls_key_path is None):
            raise ConfigError("tls_cert_path and tls_key_path must be given together")
        if not (self.tls_cert_path or self.insecure_bind or is_loopback(self.host)):
            raise ConfigError(
                f"host {self.host!r} is reachable from other machines over plain HTTP: give tls_cert_path and tls_key_path, "
                "or allow it with insecure_bind (--insecure-bind)"
            )
        if self.head_limit < self.header_limit:
            raise ConfigError(f"head_limit {self.head_limit} is smaller than header_limit {self.header_limit}")
        if self.body_budget < self.body_limit:
            raise ConfigError(f"body_budget {self.body_budget} is smaller than body_limit {self.body_limit}")


def is_loopback(host: str) -> bool:
    """Whether `host` is `localhost` or a loopback address; other names are not, whatever they resolve to."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
