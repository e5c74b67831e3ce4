"""A burst of requests is let in a few at a time, so that answers of the first are on their way while the last are still read.

Without it an event loop reads and prepares all of a burst before it looks at a worker's first answer: everybody waits for everybody.
"""

import asyncio
from collections import deque

__all__ = ["Turnstile"]


class Turnstile:
    """Lets `width` callers through in one turn of the event loop; the others pass in order of arrival, `width` at each later turn."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._passed = 0
        self._scheduled = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Callers that have not passed."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Return when it is the caller's turn. Cancelling it gives the turn to the next."""
        loop = asyncio.get_running_loop()
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._turn, loop)
        if self._passed < self._width and not self._waiting:
            self._passed += 1
            return
        waiter = loop.create_future()
        self._waiting.append(waiter)
        await waiter

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """The next turn of the loop."""
        self._passed = 0
        waiting = self._waiting
        while waiting and self._passed < self._width:
            waiter = waiting.popleft()
            if not waiter.done():  # cancelled: gone
                waiter.set_result(None)
                self._passed += 1
        self._scheduled = bool(waiting)
        if waiting:
            loop.call_soon(self._turn, loop)
