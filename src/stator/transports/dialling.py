"""One attempt to connect that many wait for, and what each of them is told when it fails."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from stator.errors import ConnectFailed, NotTrusted, StatorError, Timeout, Unavailable
from stator.tasks import Scope

__all__ = ["SharedDial", "connect_error"]

T = TypeVar("T")


class SharedDial(Generic[T]):
    """A dial under way, as a task of `dials`; a failed dial is not a failed task. It leaves the keeping of what it made to `connect`:
    nobody may be waiting any more.
    """

    def __init__(
        self, connect: Callable[[], Coroutine[Any, Any, T]], *, dials: Scope, name: str, ended: Callable[[], object]
    ) -> None:
        """`ended` is called once, before those who wait go on, however it ends. Raises `RuntimeError` when `dials` is closed."""
        self._task = dials.spawn(_outcome(connect), name=name)
        self._task.add_done_callback(lambda _: ended())

    @property
    def over(self) -> bool:
        """Whether it has ended, which may be before `ended` is called. `wait` returns at once then, and does not let the loop go on:
        who tries until something has changed makes a new dial instead.
        """
        return self._task.done()

    async def wait(self) -> T:
        """What it made. Raises what it met: an `OSError` or `StatorError`, the same one for all, see `connect_error`; and
        `ConnectionAbortedError` when its scope closed. Cancelled: the dial goes on for the others.
        """
        try:
            outcome = await asyncio.shield(self._task)
        except asyncio.CancelledError:
            ours = asyncio.current_task()
            if self._task.cancelled() and ours is not None and not ours.cancelling():
                raise ConnectionAbortedError("the client closed its plane") from None
            raise
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def _outcome(connect: Callable[[], Coroutine[Any, Any, T]]) -> T | OSError | StatorError:
    try:
        return await connect()
    except (OSError, StatorError) as error:
        return error


def connect_error(error: Exception, *, sought: str = "connection", address: str, limit: float, instance: int) -> StatorError:
    """A failed dial, as one of those who waited for it is told: raise it from `error`. `sought` was to be had within `limit` seconds."""
    if isinstance(error, TimeoutError):
        return Timeout(f"no {sought} to {address} within {limit} s", instance=instance, phase="connect")
    if isinstance(error, Unavailable):
        return Unavailable(error.message, instance=instance, phase="connect")
    text = f"cannot connect to {address}: {error}"
    if isinstance(error, NotTrusted):
        return NotTrusted(text, reason=error.reason, instance=instance)
    return ConnectFailed(text, instance=instance, phase="connect")
