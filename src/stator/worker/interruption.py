"""Ending, from outside, what a generator waits for; its reader pays nothing per item for that."""

import asyncio
import weakref
from collections.abc import AsyncGenerator
from types import AsyncGeneratorType
from typing import Any, cast

__all__ = ["Interruption"]


class Interruption:
    """For one async generator that waits for another's items. The generator `begin`s, somebody `interrupt`s, and then

        except asyncio.CancelledError:
            if not interruption.ends(): raise

    in the generator tells that interruption from a cancellation of its task, which it must pass on.
    """

    __slots__ = ("_generator", "_task", "happened")

    def __init__(self) -> None:
        self._generator: weakref.ref[AsyncGeneratorType[Any, Any]] | None = None  # weak: one that is dropped must be collected
        self._task: asyncio.Task[Any] | None = None
        self.happened = False

    def of(self, generator: AsyncGenerator[Any]) -> None:
        """Which generator may be interrupted."""
        self._generator = weakref.ref(cast(AsyncGeneratorType[Any, Any], generator))

    def begin(self) -> None:
        """In the generator's first step: it is read by the present task from now on."""
        self._task = asyncio.current_task()

    def interrupt(self) -> None:
        """End the generator's present wait. Nothing if it has none: it looks itself when it goes on. In the event loop's thread."""
        generator = None if self._generator is None else self._generator()
        if self._task is not None and generator is not None and generator.ag_running and not self.happened:
            self.happened = True
            self._task.cancel()

    def ends(self) -> bool:
        """Whether the wait ended by this alone, so that the task may go on. Take it back once, however the wait ended."""
        if not self.happened:
            return False
        self.happened = False
        return self._task is not None and not self._task.uncancel()

    def close(self) -> None:
        """The generator ends: nothing may be interrupted any more."""
        if self.happened and self._task is not None:
            self._task.uncancel()
        self._generator = self._task = None
