"""`stator.run`: the event loop and the signals of a program. Nothing else in Stator touches process-wide state."""

import asyncio
import gc
import logging
import signal
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

__all__ = ["new_event_loop", "run", "shutdown_event"]

logger = logging.getLogger(__name__)

_SAME_SIGNAL = 0.3
"""seconds in which a second signal is the first one again: a terminal and a parent often both send it"""

_COLLECT = (10_000, 20, 20)
"""objects made and not freed before the young ones are looked at; rounds of that before the older ones are"""

T = TypeVar("T")
_shutdown: ContextVar[asyncio.Event | None] = ContextVar("stator_shutdown", default=None)


def shutdown_event() -> asyncio.Event | None:
    """Set at the first signal of a program under `run`; None elsewhere."""
    return _shutdown.get()


def new_event_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's loop where it is installed, asyncio's where it is not."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a program: choose the fastest event loop, and make SIGTERM and SIGINT a graceful shutdown of every runtime in it.

    At the first signal each `serve` drains and returns; a second one, a moment later, cancels `main`. Returns what `main` returns.
    While it runs, the garbage collector leaves alone what was there before and looks less often at what is new.
    """
    with _calm_collector(), asyncio.Runner(loop_factory=new_event_loop()) as runner:
        return runner.run(_supervised(main))


@contextmanager
def _calm_collector() -> Generator[None, None, None]:
    """Cycles are rare here, and the default thresholds spend a seventh of a busy process on looking for them."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


async def _supervised(main: Coroutine[Any, Any, T]) -> T:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    _shutdown.set(event)
    current = asyncio.current_task()

    began = 0.0

    def on_signal(number: signal.Signals) -> None:
        nonlocal began
        if event.is_set():
            if loop.time() - began < _SAME_SIGNAL:
                return
            logger.warning("second %s: stopping at once", number.name)
            if current is not None:
                current.cancel()
        else:
            logger.info("%s: shutting down", number.name)
            began = loop.time()
            event.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        return await main
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
