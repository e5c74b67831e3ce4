"""Waiting for a connection on behalf of one request."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from stator.transports.inbox import UNLINKED, Inbox

__all__ = ["while_wanted"]


class _Opening:
    """The link of a request of which nothing was sent: stopping and killing it end the wait."""

    def __init__(self, inbox: Inbox, wait: asyncio.Timeout) -> None:
        self._inbox = inbox
        self._wait: asyncio.Timeout | None = wait

    def stop(self) -> None:
        """No handler was called that could say goodbye: the stream is complete and empty."""
        if self._inbox.finish():
            self.kill()

    def kill(self) -> None:
        wait, self._wait = self._wait, None
        if wait is not None:
            wait.reschedule(asyncio.get_running_loop().time())

    def taken(self) -> None:
        """There is nothing to take."""

    def over(self) -> None:
        """The wait has ended by itself."""
        self._wait = None


@asynccontextmanager
async def while_wanted(inbox: Inbox) -> AsyncGenerator[None, None]:
    """Do what is in the block, usually dialling, until it is done or the request is over: killed, stopped, or out of time.

    Look at `inbox.ended` afterwards; errors of the block are raised only while the request is wanted.
    """
    opening: _Opening | None = None
    try:
        async with asyncio.timeout(None) as wait:
            opening = inbox.link = _Opening(inbox, wait)
            try:
                yield
            finally:
                opening.over()
    except Exception:
        if not inbox.ended:
            raise
    finally:
        if inbox.link is opening:
            inbox.link = UNLINKED
