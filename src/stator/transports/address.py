"""Addresses of this host: what to bind and advertise, what is here, how they are written."""

import asyncio
import fcntl
import ipaddress
import socket
import struct
from functools import lru_cache

from stator.errors import ConfigError

__all__ = ["interface_address", "is_local", "is_loopback", "is_wildcard", "join_host_port", "numeric_host"]

_SIOCGIFADDR = 0x8915


def join_host_port(host: str, port: int) -> str:
    """`host:port`, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def numeric_host(host: str) -> str:
    """`host` as an IP address, looked up if it is a name: the reference reads nothing else. `ConfigError` when it has none."""
    try:
        ipaddress.ip_address(host)
        return host
    except ValueError:
        pass
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"host {host!r} is neither an IP address nor a name that can be looked up: {error}") from error
    return str(min(found, key=lambda entry: entry[0] is not socket.AF_INET)[4][0])


def is_wildcard(host: str) -> bool:
    """Whether `host`, an IP address, stands for all addresses of this host."""
    return ipaddress.ip_address(host).is_unspecified


def is_loopback(host: str) -> bool:
    """Whether only this host can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@lru_cache(maxsize=4096)
def is_local(host: str) -> bool:
    """Whether `host` is an address of this host, which can be bound. A host name counts as local; nothing is known of it."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError:
        return True
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def interface_address(name: str) -> str:
    """The IPv4 address of the network interface `name`; `ValueError` when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError as error:
            raise ValueError(f"Interface not found: {name}") from error
    return socket.inet_ntoa(answer[20:24])
