"""Ports on the loopback address that are free now."""

import socket
from contextlib import ExitStack

from stator.errors import ConfigError

__all__ = ["free_ports"]

_TRIES = 50


def free_ports(count: int) -> int:
    """The first of `count` consecutive TCP ports that nobody has on 127.0.0.1; others may take them afterwards.

    Raises `ConfigError` when none are found. Does not wait for anything.
    """
    for _ in range(_TRIES):
        with ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            base: int = first.getsockname()[1]
            try:
                for port in range(base + 1, base + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):  # taken · beyond 65535
                continue
            return base
    raise ConfigError(f"there are no {count} free ports in a row on 127.0.0.1")
