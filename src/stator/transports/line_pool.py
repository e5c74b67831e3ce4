"""The connections of a caller to one address: as few as are needed, dialled once for all who wait."""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Generic, Protocol, Self, TypeVar

from stator.errors import StatorError
from stator.tasks import Scope
from stator.transports.dialling import SharedDial, connect_error

__all__ = ["LinePool", "PooledLine"]


class PooledLine(Protocol):
    """A connection that may be in use to its limit."""

    @property
    def usable(self) -> bool:
        """Whether a request can be sent now."""
        ...


L = TypeVar("L", bound=PooledLine)


class LinePool(ABC, Generic[L]):
    """The lines to `name`. A second one is made only when the first is not usable, and so on, up to `most`.

    A plane says how a line is made (`_connect`). Its lines call `_freed` when they may be usable again, `_lost` when they have ended.
    """

    _sought: ClassVar[str] = "connection"
    """what those who wait in vain did not get"""

    def __init__(self, name: str, *, most: int, limit: float, dials: Scope, empty: Callable[[Self], None]) -> None:
        """`limit`: seconds that somebody waits. `empty` is called, once or more, when neither lines are left nor who wants one."""
        self._name = name
        self._most = most
        self._limit = limit
        self._dials = dials
        self._empty: Callable[[Self], None] = empty
        self._lines: list[L] = []
        self._dial: SharedDial[None] | None = None
        self._callers = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def lines(self) -> tuple[L, ...]:
        """Open connections."""
        return tuple(self._lines)

    def line(self) -> L | None:
        """A line that takes a request now. Hot path: each request asks."""
        for line in self._lines:
            if line.usable:
                return line
        return None

    async def wait(self, instance: int) -> L:
        """A line as soon as there is one. Cancelled: nothing changed.

        Raises `ConnectFailed`, `Timeout` or, if the plane's dial does, `Unavailable` (phase "connect").
        """
        self._callers += 1
        try:
            async with asyncio.timeout(self._limit):
                while (line := self.line()) is None:
                    await self._progress()
                return line
        except (OSError, StatorError) as error:
            raise connect_error(error, sought=self._sought, address=self._name, limit=self._limit, instance=instance) from error
        finally:
            self._callers -= 1
            self._leave_if_empty()

    # -- what a plane says

    @abstractmethod
    async def _connect(self) -> L:
        """Make a line that is usable, within `limit` seconds. Raises `OSError` or `StatorError`; nothing is left open then, nor when
        cancelled.
        """

    @property
    def _taking(self) -> int:
        """Lines that are usable or will be: with `most` of them, no further one is made."""
        return len(self._lines)

    # -- waiting

    async def _progress(self) -> None:
        """Wait for a dial, which all callers share, or for room on a line once there are `most` of them. Lets the loop go on."""
        if self._dials.closed:
            raise ConnectionAbortedError("the client closed its plane")
        dial = self._dial
        if dial is None or dial.over:
            if self._taking >= self._most:
                await self._room()
                return
            dial = self._dial = SharedDial(self._add_line, dials=self._dials, name=f"dial {self._name}", ended=self._dialled)
        await dial.wait()

    async def _room(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    async def _add_line(self) -> None:
        self._lines.append(await self._connect())

    # -- changes

    def _dialled(self) -> None:
        if self._dial is not None and self._dial.over:  # else somebody was faster, and dials again
            self._dial = None
        self._freed()
        self._leave_if_empty()

    def _freed(self) -> None:
        """There may be room: let those who wait look."""
        if self._waiters:
            waiters, self._waiters = self._waiters, deque()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _lost(self, line: L) -> None:
        if line in self._lines:
            self._lines.remove(line)
        self._freed()
        self._leave_if_empty()

    def _leave_if_empty(self) -> None:
        if not self._lines and not self._callers and (self._dial is None or self._dial.over):
            self._empty(self)
