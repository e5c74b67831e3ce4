"""A deadline for a block of code, on the process's one wheel: a tenth of the cost of `asyncio.timeout`."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from stator.tasks import DeadlineWheel, Timed

__all__ = ["Limit"]


class Limit:
    """`with Limit(wheel, until): …` cancels what the block waits for when `until()` has passed, and raises `TimeoutError` then.

    `until` gives a reading of the wheel's clock; it is asked again when that time has come, so that progress buys time for nothing.
    """

    __slots__ = ("_cancelling", "_expired", "_task", "_until", "_wheel", "slot")

    def __init__(self, wheel: DeadlineWheel, until: Callable[[], float]) -> None:
        self.slot: set[Timed] | None = None
        self._wheel = wheel
        self._until = until
        self._expired = False
        self._cancelling = 0
        self._task: asyncio.Task[object]

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._wheel.arm(self, self._until())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._wheel.disarm(self)
        # As `asyncio.timeout` does it: a cancellation from elsewhere wins over ours.
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self, now: float) -> float:
        """Asked by the wheel."""
        until = self._until()
        if until > now:
            return until
        self._expired = True
        self._task.cancel("deadline")
        return 0.0
