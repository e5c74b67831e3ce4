"""The caller's inputs on a native stream: `stator.transports.inputs.InputSender` with waiting."""

import asyncio
from typing import Any

from stator.protocol.native.inputs import InputSender
from stator.protocol.native.session import Session

__all__ = ["NativeInputSender"]

_YIELD_EVERY = 64
"""inputs after which a caller that never suspends lets the loop run"""


class NativeInputSender(InputSender):
    """Sends under the worker's credit, of which there is none before its handler was called."""

    __slots__ = ("_resumed",)

    def __init__(self, session: Session, number: int) -> None:
        super().__init__(session, number)
        self._resumed: asyncio.Future[None] | None = None

    def send(self, item: Any) -> bool:
        return not self.over and self.put(item) < _YIELD_EVERY and self.credit > 0 and self.outgoing.writable

    async def ready(self) -> None:
        await asyncio.sleep(0)
        while not self.over and (self.credit <= 0 or self.waiting):
            self._resumed = asyncio.get_running_loop().create_future()
            try:
                await self._resumed
            finally:
                self._resumed = None

    def end(self) -> None:
        super().end()
        self.credited()

    def drained(self) -> None:
        self.credited()

    def credited(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)
