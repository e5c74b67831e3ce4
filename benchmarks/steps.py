"""The pace of an engine: one scheduler step every so often, which wakes all streams at once."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["STEP", "Steps"]

STEP = 0.02
"""Seconds between two scheduler steps: 50 tokens/s for each stream."""


class Steps:
    """Lets streams wait for the next step. It has a task only while there are streams: an idle worker must cost nothing."""

    def __init__(self, period: float = STEP) -> None:
        self._period = period
        self._waiting: set[asyncio.Queue[None]] = set()
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def ticks(self) -> Iterator[asyncio.Queue[None]]:
        """A queue that gets one entry per step, as an engine's output queue does."""
        queue: asyncio.Queue[None] = asyncio.Queue()
        self._waiting.add(queue)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._step())
        try:
            yield queue
        finally:
            self._waiting.discard(queue)

    async def _step(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while self._waiting:
            due = max(due + self._period, loop.time())
            await asyncio.sleep(due - loop.time())
            for queue in list(self._waiting):
                queue.put_nowait(None)
