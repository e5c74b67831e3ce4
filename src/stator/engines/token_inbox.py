"""Where the tokens of one sequence wait for the request that wants them. Event loop only."""

import asyncio

from stator.engines.sequence import Finish, TokenChoice

__all__ = ["TokenInbox"]


class TokenInbox:
    """Filled by `put`, emptied by one reader.

    Holds at most the sequence's `max_tokens` choices: a slow reader costs that much, no more.
    """

    __slots__ = ("_choices", "_error", "_finish", "_waiter", "_woken")

    def __init__(self) -> None:
        self._choices: list[TokenChoice] = []
        self._finish: Finish | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._woken = False

    def put(self, choice: TokenChoice | None, finish: Finish | None, error: Exception | None) -> None:
        """The next token, the end, or an error."""
        if choice is not None:
            self._choices.append(choice)
        self._finish = finish
        self._error = error
        self._notify()

    def wake(self) -> None:
        """Let the reader go on without a token."""
        self._woken = True
        self._notify()

    async def take(self) -> tuple[list[TokenChoice], Finish | None]:
        """Everything that has come, at least one token unless woken. Raises what `put` was given, after the tokens before it.

        Cancelling it takes nothing.
        """
        if not self._choices and self._finish is None and self._error is None and not self._woken:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None and not self._choices:
            raise self._error
        choices, self._choices = self._choices, []
        self._woken = False
        return choices, self._finish

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
