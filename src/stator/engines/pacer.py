"""A beat shared by all requests of an engine: one timer wakes everybody, as one step of a real engine does."""

import asyncio
from collections.abc import Hashable

__all__ = ["Pacer"]


class Pacer:
    """Beats every `period` seconds as long as somebody waits; the beats do not drift. Event loop only."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._waiters: dict[Hashable, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0

    async def beat(self, key: Hashable) -> None:
        """Wait for the next beat, or for `wake(key)`. One wait per key at a time. Cancelling it changes nothing for others."""
        loop = asyncio.get_running_loop()
        waiter = self._waiters[key] = loop.create_future()
        if self._timer is None:
            self._schedule(loop)
        try:
            await waiter
        finally:
            if self._waiters.get(key) is waiter:
                del self._waiters[key]

    def wake(self, key: Hashable) -> None:
        """End the wait of `key` now. Harmless if there is none."""
        waiter = self._waiters.get(key)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def close(self) -> None:
        """Wake everybody and stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._release()

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self._next += self._period
        if self._next <= now:  # first beat, or the loop was held up: begin anew
            self._next = now + self._period
        self._timer = loop.call_at(self._next, self._strike, loop)

    def _strike(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiters:
            self._release()
            self._schedule(loop)

    def _release(self) -> None:
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            if not waiter.done():
                waiter.set_result(None)
