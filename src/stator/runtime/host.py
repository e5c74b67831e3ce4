"""What the machine offers: addresses, open files, a place for sockets."""

import ipaddress
import logging
import socket
from pathlib import Path

from stator import settings
from stator.errors import ConfigError
from stator.runtime.config import RuntimeConfig, is_wildcard
from stator.security import Tls

__all__ = ["advertised_host", "check_bind", "is_loopback", "raise_file_limit", "socket_directory", "warn_of_open_doors"]

logger = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches what listens on `host`; a name other than localhost may be anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, *, allowed: bool) -> None:
    """Refuse to listen beyond loopback unless that was allowed (`design.md §7`)."""
    if not allowed and not is_loopback(host):
        raise ConfigError(
            f"host = {host!r} is reachable by others and neither a secret nor TLS is set; use a loopback address, set "
            "cluster_secret (STATOR_CLUSTER_SECRET) or certificates (STATOR_TLS_CERT_PATH, `stator certs init`), "
            "or allow it with insecure_bind (STATOR_INSECURE_BIND=true)"
        )


def warn_of_open_doors(config: RuntimeConfig, tls: Tls | None) -> None:
    """Say what of a process that listens beyond loopback anybody may use."""
    if is_loopback(config.host):
        return
    if config.cluster_secret is None and not (tls is not None and tls.mutual):
        logger.warning(
            "whoever reaches %s may send requests: set a cluster secret, or mutual TLS (tls.client_ca_cert_path)", config.host
        )
    elif tls is None:
        logger.warning("what is said on %s can be read by others on its way: set certificates (tls.cert_path)", config.host)
    if config.event_plane in ("auto", "zmq") and config.discovery != "memory":
        logger.warning("events on %s are neither encrypted nor proved: take event_plane = nats, with TLS", config.host)


def advertised_host(config: RuntimeConfig, tls: Tls | None = None) -> str:
    """The address to write into records: the setting, the pod's, the one bound to, or the routable one for a wildcard.

    Raises `ConfigError` for one beyond loopback that is not allowed: TLS allows it, and a secret where every plane proves it.
    """
    check_bind(config.host, allowed=config.insecure_bind or config.closed or tls is not None)
    if config.advertise_host:
        return config.advertise_host
    if not is_wildcard(config.host):
        return config.host
    return settings.pod_ip() or _routable_address(config.host)


def _routable_address(wildcard: str) -> str:
    """The address this machine would use towards others; nothing is sent."""
    family, target = (socket.AF_INET6, "2001:db8::1") if ":" in wildcard else (socket.AF_INET, "192.0.2.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError as error:
            raise ConfigError("no routable address found; set advertise_host (STATOR_ADVERTISE_HOST)") from error
        return str(probe.getsockname()[0])


def raise_file_limit() -> None:
    """Allow as many open files as the hard limit does: a socket each for thousands of streams of the compatible plane."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard or hard == resource.RLIM_INFINITY:
        wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 65536)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError) as error:
            logger.info("the limit of open files stays at %d: %s", soft, error)


def socket_directory() -> Path | None:
    """A private directory for Unix sockets; None if there is none. Touches the disk."""
    try:
        directory = settings.user_root() / "sockets"
        directory.mkdir(mode=0o700, exist_ok=True)
    except (ConfigError, OSError) as error:
        logger.info("no Unix sockets: %s", error)
        return None
    return directory
