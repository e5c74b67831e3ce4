"""A caller's inputs on the in-memory plane: through their JSON form, in order, bounded, a loop tick later."""

import asyncio
from collections.abc import Callable
from typing import Any

from stator.protocol.values import decode_value, encode_json
from stator.transports.inputs import InputStream

__all__ = ["MemoryInputs"]

_YIELD_EVERY = 64
_MIN_CHARGE = 64


class MemoryInputs:
    """`InputSender` of the caller, and the link of what the handler reads. `later` brings a step to the other side."""

    def __init__(self, stream: InputStream, *, window: int, later: Callable[[Callable[[], object]], None]) -> None:
        self.stream = stream
        self.over = False
        self._window = window
        self._later = later
        self._accepted = False
        self._unread = 0
        self._since_yield = 0
        self._resumed: asyncio.Future[None] | None = None
        stream.link = self

    # -- InputSender

    def send(self, item: Any) -> bool:
        if self.over:
            return False
        data = encode_json(item)
        self._unread += max(len(data), _MIN_CHARGE)
        self._later(lambda: self.stream.receive((decode_value(data, "json"),)))
        self._since_yield += 1
        return self._unread < self._window and self._since_yield < _YIELD_EVERY

    async def ready(self) -> None:
        self._since_yield = 0
        await asyncio.sleep(0)
        while not self.over and (not self._accepted or self._unread >= self._window):
            self._resumed = asyncio.get_running_loop().create_future()
            try:
                await self._resumed
            finally:
                self._resumed = None

    def end(self) -> None:
        if not self.over:
            self.close()
            self._later(self.stream.finish)

    def close(self) -> None:
        self.over = True
        self._resume()

    # -- the worker's side

    def open(self) -> None:
        """The handler was called: the caller may send."""
        self._accepted = True
        self._resume()

    # -- StreamLink

    def stop(self) -> None:
        """The caller hears of the answer's end."""

    def kill(self) -> None:
        """The handler reads no more; the caller hears of the answer's end."""

    def taken(self) -> None:
        self._unread = 0
        self._resume()

    def _resume(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)
