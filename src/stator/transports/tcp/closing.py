"""How a listener and what it accepted come to their end."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

__all__ = ["closed"]

logger = logging.getLogger(__name__)

_LIMIT = 2.0
_TICKS = 100


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
