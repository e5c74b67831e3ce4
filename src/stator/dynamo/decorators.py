"""The decorators with which programs for the reference begin."""

import asyncio
import inspect
import logging
import signal
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from stator.dynamo.distributed import DistributedRuntime
from stator.tasks import Scope

__all__ = ["dynamo_endpoint", "dynamo_worker"]

logger = logging.getLogger(__name__)

_SAME_SIGNAL = 0.3
"""seconds in which a second signal is the first one again: a process group and a parent often both get it"""

_TO_RETURN = 2.0
"""seconds in which the program may return once its runtime has drained and left, before it is cancelled"""

Main = Callable[..., Awaitable[Any]]


def dynamo_worker(enable_nats: bool | None = None) -> Callable[[Main], Callable[..., Coroutine[Any, Any, None]]]:
    """Call the decorated function with a connected runtime, and leave the cluster when it ends.

    Discovery and planes are those of the settings. SIGTERM drains what is served; then the function should return, as it does when
    it awaits `serve_endpoint`, and the process ends with 0. One that does not is cancelled and the process ends by the signal. A
    second SIGTERM cancels at once. SIGINT stays asyncio's. `enable_nats` is ignored, with a `DeprecationWarning`.
    """
    if enable_nats is not None:
        warnings.warn("enable_nats is ignored: settings say which planes are used", DeprecationWarning, stacklevel=2)

    def decorate(function: Main) -> Callable[..., Coroutine[Any, Any, None]]:
        @wraps(function)
        async def main(*args: Any, **kwargs: Any) -> None:
            runtime = DistributedRuntime(asyncio.get_running_loop(), None, None)
            async with Scope("signals of dynamo_worker") as scope:
                with _terminating(runtime, scope) as terminated:
                    try:
                        await runtime.connected()
                        await function(runtime, *args, **kwargs)
                        await runtime.aclose()
                    except asyncio.CancelledError:
                        if not terminated():
                            raise
                    finally:
                        await runtime.aclose(drain=False)

        return main

    return decorate


@contextmanager
def _terminating(runtime: DistributedRuntime, scope: Scope) -> Generator[Callable[[], bool]]:
    """SIGTERM shuts `runtime` down. Yields what says whether the calling task was cancelled for it; then the signal ends the
    process afterwards. A program that handles SIGTERM itself is left alone.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    signalled: float | None = None
    cancelled = False

    def cancel() -> None:
        nonlocal cancelled
        cancelled = True
        if task is not None:
            task.cancel()

    async def leave() -> None:
        runtime.shutdown()
        await runtime.membership.left()
        await asyncio.sleep(_TO_RETURN)
        logger.warning("the program did not return within %s s after its runtime had left; it is cancelled", _TO_RETURN)
        cancel()

    def on_signal() -> None:
        nonlocal signalled
        if signalled is None:
            logger.info("SIGTERM: draining")
            signalled = loop.time()
            scope.spawn(leave(), name="sigterm")
        elif loop.time() - signalled >= _SAME_SIGNAL:
            logger.warning("second SIGTERM: stopping at once")
            cancel()

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        loop.add_signal_handler(signal.SIGTERM, on_signal)
    try:
        yield lambda: cancelled
    finally:
        if ours:
            loop.remove_signal_handler(signal.SIGTERM)
    if cancelled:
        signal.raise_signal(signal.SIGTERM)


def dynamo_endpoint(request_model: Any, response_model: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn the last positional argument of a handler into a `request_model`, a pydantic model; any other type changes nothing.

    A text is read as JSON, a dict as fields; anything else, and what does not fit, is a `ValueError`. Items are not checked against
    `response_model`, as in the reference.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        async def generate(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            if len(args) in (1, 2) and _is_model(request_model):
                args = (*args[:-1], _request(request_model, args[-1]))
            async for item in function(*args, **kwargs):
                yield item

        return generate

    return decorate


def _is_model(kind: Any) -> bool:
    """Whether it is a pydantic model; pydantic need not be installed."""
    return inspect.isclass(kind) and hasattr(kind, "model_validate") and hasattr(kind, "model_validate_json")


def _request(model: Any, given: Any) -> Any:
    try:
        if isinstance(given, str):
            return model.model_validate_json(given)
        if isinstance(given, dict):
            return model.model_validate(given)
    except ValueError as error:  # pydantic's is one
        raise ValueError(f"Invalid request: {error}") from error
    raise ValueError(f"Invalid request: {given}")
