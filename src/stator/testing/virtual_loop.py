"""An event loop whose time passes only when there is nothing else to do, and then at once: hours of timers in seconds, sockets included.

Everything that goes by the loop's clock (and by `VirtualClock`) sees time stand still while code runs and jump to the next timer when all
is done. Sockets within the process work as they are: what one end has written the other can read before any time passes. While work runs in
a thread (`asyncio.to_thread`) time stands still as well.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["VirtualClock", "VirtualLoop", "run_virtually"]

T = TypeVar("T")

_REAL_WAIT = 0.05
"""seconds of real time until it is looked again, where only the world outside can bring news"""


class _Selector(selectors.DefaultSelector):
    """Waits in virtual time."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if found or timeout == 0:
            return found
        if self.loop.threads or timeout is None:
            return super().select(_REAL_WAIT)
        self.loop.pass_time(timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Begins at 1000 s."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self._virtual_now = 1000.0
        self.threads = 0
        """calls that run in threads"""
        super().__init__(selector)

    def time(self) -> float:
        return self._virtual_now

    def pass_time(self, seconds: float) -> None:
        """Nothing happens for so long."""
        self._virtual_now += seconds

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        future = super().run_in_executor(executor, func, *args)
        self.threads += 1
        future.add_done_callback(self._returned)
        return future

    def _returned(self, _: object) -> None:
        self.threads -= 1


class VirtualClock:
    """`stator.clock.Clock` by the loop's time."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return self._loop.time() + 1_700_000_000.0


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end on a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
