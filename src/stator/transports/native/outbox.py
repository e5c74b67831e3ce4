"""The writing end of one native stream: the `Responder` a handler's driver sends through."""

import asyncio
from typing import Any

from stator.protocol.native.server import ServerSession, ServerStream
from stator.protocol.values import encode_json

__all__ = ["Outbox"]

_YIELD_EVERY = 64
"""items after which a producer that never suspends lets the loop run"""


class Outbox(ServerStream):
    """`ServerStream` with waiting. `send` is the token path: one encode, one list append."""

    __slots__ = ("_loop", "_resumed")

    def __init__(self, session: ServerSession, number: int, credit: int) -> None:
        super().__init__(session, number, credit)
        self._resumed: asyncio.Future[None] | None = None

    def send(self, item: Any) -> bool:
        """Encode and queue one item; False: await `ready()` before the next.

        Raises `EngineError` for a value without JSON form and for an item that the client does not accept; nothing was queued then.
        """
        if self.dead:
            return False
        if self.push(encode_json(item)) < _YIELD_EVERY and self.credit > 0 and self.outgoing.writable:
            return True
        self.take_back_oversized()  # an item above that limit has always used up the credit
        return False

    async def ready(self) -> None:
        """Let the loop run once; then wait for credit and for the queue to leave. Cancelling it changes nothing."""
        await asyncio.sleep(0)
        while not self.dead and (self.credit <= 0 or self.waiting):
            self._resumed = asyncio.get_running_loop().create_future()
            try:
                await self._resumed
            finally:
                self._resumed = None

    def drained(self) -> None:
        if self._resumed is not None:
            self._wake()

    def credited(self) -> None:
        if self._resumed is not None:
            self._wake()

    def _wake(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)
