"""Where a plane listens, and what it tells others about it."""

import asyncio
from collections.abc import Callable

from stator.errors import ConfigError, ConnectFailed
from stator.transports.address import is_loopback, is_wildcard, numeric_host
from stator.transports.plane import PlaneHost

__all__ = ["BACKLOG", "listen", "own_place"]

BACKLOG = 1024
"""connections that the kernel makes before they are accepted"""


async def own_place(own: str, host: PlaneHost, *, what: str, setting: str) -> tuple[str, str]:
    """Address to bind and host to advertise of a listener that may have a `setting` of its `own`, "" for that of the process.

    Raises `ConfigError` when others than this host would reach it against the setting of the process; `what` says what they would reach.
    """
    bound = await numeric_host(own or host.bind_host)
    if is_loopback(host.bind_host) and not is_loopback(bound):
        raise ConfigError(
            f"{what} on {bound}, which is reachable by others, while host = {host.bind_host} is not;"
            f" set host (STATOR_HOST) and leave {setting} empty, or make both loopback addresses"
        )
    return bound, bound if own and not is_wildcard(bound) else host.advertise_host


async def listen(accept: Callable[[], asyncio.Protocol], host: str, port: int, *, purpose: str = "listen") -> asyncio.Server:
    """Open a listener. Raises `ConnectFailed` for an address that cannot be bound; nothing is left open then."""
    try:
        return await asyncio.get_running_loop().create_server(accept, host, port, backlog=BACKLOG)
    except OSError as error:
        raise ConnectFailed(f"cannot {purpose} on {host}:{port}: {error}") from error
