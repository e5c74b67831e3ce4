"""Where the output of one request waits for its reader. Event loop only."""

import asyncio

from stator.llm.output import EngineOutput

__all__ = ["OutputInbox"]


class OutputInbox:
    """Filled by `put` and `fail`, emptied by one reader. Holds at most the answer: a slow reader costs that much, no more."""

    __slots__ = ("_error", "_outputs", "_waiter", "_woken")

    def __init__(self) -> None:
        self._outputs: list[EngineOutput] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._woken = False

    def put(self, output: EngineOutput) -> None:
        """The next item."""
        self._outputs.append(output)
        self._notify()

    def fail(self, error: Exception) -> None:
        """There will be no more."""
        if self._error is None:
            self._error = error
        self._notify()

    def wake(self) -> None:
        """Let the reader go on without an item."""
        self._woken = True
        self._notify()

    async def take(self) -> list[EngineOutput]:
        """Everything that has come, at least one item unless woken. Raises what `fail` was given, after the items before it.

        Cancelling it takes nothing.
        """
        if not self._outputs and self._error is None and not self._woken:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._woken = False
        if self._error is not None and not self._outputs:
            raise self._error
        outputs, self._outputs = self._outputs, []
        return outputs

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
