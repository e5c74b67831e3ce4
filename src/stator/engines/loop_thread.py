"""An event loop in a thread of its own, for libraries that block their loop now and then, or take the process' signals."""

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from stator.tasks import Scope

__all__ = ["LoopThread"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LoopThread:
    """`start` it, `run` and `post` work to it, `stop` it; all from the event loop of whoever owns it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, Scope, asyncio.Event]] = (
            concurrent.futures.Future()
        )
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    async def start(self) -> None:
        """On return the loop runs."""
        self._thread.start()
        await asyncio.wrap_future(self._began)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns or raises, run over there. Cancelling this call leaves it running."""
        loop, _, _ = self._began.result()
        return await asyncio.shield(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop)))

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have a function called over there, soon and in order. Nothing once the loop has ended."""
        loop, _, _ = self._began.result()
        try:
            loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            logger.debug("the loop of %s has ended", self._name)

    @property
    def scope(self) -> Scope:
        """The tasks over there; to be used there alone."""
        _, scope, _ = self._began.result()
        return scope

    async def stop(self, limit: float) -> bool:
        """Cancel what runs over there and wait, at most `limit` seconds, for the thread; False if it has not ended."""
        _, _, end = self._began.result()
        self.post(end.set)
        await asyncio.to_thread(self._thread.join, limit)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._live())
        except BaseException:
            logger.exception("the loop of %s broke", self._name)

    async def _live(self) -> None:
        end = asyncio.Event()
        async with Scope(self._name) as scope:
            self._began.set_result((asyncio.get_running_loop(), scope, end))
            await end.wait()
