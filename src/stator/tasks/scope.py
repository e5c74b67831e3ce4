"""Supervised tasks: every task of the process belongs to a named scope, and a scope ends with all of its tasks."""

import asyncio
import logging
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

__all__ = ["Scope"]

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Scope:
    """Owner of tasks. A task that crashes is logged with its name and does not disturb its siblings.

    Use as `async with`, or call `aclose` from the owner's own `aclose`. Leaving cancels what still runs and waits for it, at most
    `close_timeout` seconds; tasks that swallow their cancellation longer than that are reported by name and left behind.
    """

    def __init__(self, name: str, *, close_timeout: float = 10.0) -> None:
        self.name = name
        self._close_timeout = close_timeout
        self._tasks: dict[asyncio.Task[Any], Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called: `spawn` refuses from then on."""
        return self._closed

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str | None = None, about: Any = None) -> asyncio.Task[T]:
        """Start `work` as a task of this scope; `about` is kept beside it (`subjects`).

        Raises RuntimeError when the scope is closed (and closes the coroutine).
        """
        if self._closed:
            work.close()
            raise RuntimeError(f"scope {self.name!r} is closed")
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        task = loop.create_task(work, name=name)
        self._tasks[task] = about
        task.add_done_callback(self._finished)
        return task

    def subjects(self) -> list[Any]:
        """What the running tasks are about."""
        return list(self._tasks.values())

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("task %s of %s failed", task.get_name(), self.name, exc_info=error)

    async def join(self) -> None:
        """Wait until no task is left. Cancelling it leaves the tasks running."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def aclose(self) -> None:
        """Cancel every task and wait for it (never for the calling one). Idempotent."""
        self._closed = True
        current = asyncio.current_task()
        waiting = {task for task in self._tasks if task is not current}
        for task in waiting:
            task.cancel(f"scope {self.name} closes")
        if waiting:
            _, left = await asyncio.wait(waiting, timeout=self._close_timeout)
            for task in left:
                logger.error("task %s of %s did not end within %s s", task.get_name(), self.name, self._close_timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
