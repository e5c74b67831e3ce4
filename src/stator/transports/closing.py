"""How a listener and what it accepted come to their end."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from typing import Protocol

from stator.errors import StatorError

__all__ = ["Closable", "close_all", "closed"]

logger = logging.getLogger(__name__)

_LEAVE_LIMIT = 1.0
"""seconds in which clients must take what was answered before their connections are cut"""
_LIMIT = 2.0
_TICKS = 100


class Closable(Protocol):
    """A connection that was accepted."""

    def close(self, reason: StatorError) -> None:
        """Let what is queued leave, and close. Idempotent."""
        ...

    def abort(self, reason: StatorError) -> None:
        """Close at once. Idempotent."""
        ...


async def close_all(connections: Collection[Closable], reason: StatorError, *, empty: asyncio.Event) -> None:
    """Let what was answered leave, bounded; then cut. Connections that have ended leave `connections`, the last one sets `empty`."""
    empty.clear()
    for connection in tuple(connections):
        connection.close(reason)
    if connections:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_LIMIT):
                await empty.wait()
    for connection in tuple(connections):
        connection.abort(reason)


async def closed(listener: asyncio.Server | None, left: Callable[[], int]) -> None:
    """Wait until the listener is gone and aborted connections have been told so: `left()` is 0, in a loop tick or two.

    Bounded; from Python 3.12 on, `wait_closed` waits for accepted connections too.
    """
    for _ in range(_TICKS):
        if not left():
            break
        await asyncio.sleep(0)
    if listener is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LIMIT):
                await listener.wait_closed()
    if left():
        logger.warning("%d connections did not close", left())
