"""An event loop whose turns, time and network are the test's: nothing happens until it is told to.

loop.act(step)      run a function as code on the loop would, without a turn
loop.turn()         one turn: what is ready runs, what that makes ready waits for the next
loop.finish(coro)   turns until a coroutine is done
loop.pass_time(s)   move the clock and run what becomes due
loop.connections    the network: every connection made on this loop, whose bytes the test carries (`Pipe`)
"""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from stator.testing.pipe import Pipe

__all__ = ["ManualLoop"]

T = TypeVar("T")

_MOST_TURNS = 10_000
_STEP = 0.1


class ManualLoop(asyncio.SelectorEventLoop):
    """Connections made by `create_connection` to a `create_server` of the same loop are pipes; nothing else has a network.

    `resets_lose`: what was written and not carried is lost when a connection is reset, else it is read before the reset is noticed.
    `hold_dials`: connections wait to be made until `let_dials_through`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = 1000.0
        self.connections: list[Pipe] = []
        self.resets_lose = False
        self.hold_dials = False
        self.failures: list[dict[str, Any]] = []
        """what the loop's exception handler was told"""
        self._listeners: dict[int, Listener] = {}
        self._held: list[asyncio.Future[None]] = []
        self.set_exception_handler(lambda _, context: self.failures.append(context))

    def time(self) -> float:
        return self._now

    def monotonic(self) -> float:
        """`stator.clock.Clock`."""
        return self._now

    def wall(self) -> float:
        return self._now + 1_700_000_000.0

    # -- turns

    def act(self, step: Callable[[], T]) -> T:
        """Run `step` with this loop as the running one."""
        asyncio._set_running_loop(self)
        try:
            return step()
        finally:
            asyncio._set_running_loop(None)

    def turn(self) -> None:
        """One turn."""
        self.call_soon(self.stop)
        self.run_forever()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task; it begins with the next turn."""
        return self.act(lambda: self.create_task(work))

    def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """Turns until `work` is done, while bytes are carried; time passes when nothing else helps."""
        task = self.spawn(work)
        for _ in range(_MOST_TURNS):
            if task.done():
                return task.result()
            self.settle()
            if not task.done():
                self.pass_time(_STEP)
        raise AssertionError(f"{work} did not end")

    def pass_time(self, seconds: float) -> None:
        """Let time pass in small steps, with turns between them."""
        end = self._now + seconds
        while self._now < end - 1e-9:
            self._now += min(_STEP, end - self._now)
            self.settle()

    def settle(self) -> None:
        """Turns and bytes until nothing moves."""
        quiet = 0
        for _ in range(_MOST_TURNS):
            self.let_dials_through()
            moved = self.act(lambda: sum(pipe.carry() for pipe in tuple(self.connections)))
            self.connections = [pipe for pipe in self.connections if not pipe.over]
            busy = bool(self._ready)  # type: ignore[attr-defined]  # of BaseEventLoop
            self.turn()
            quiet = 0 if moved or busy else quiet + 1
            if quiet >= 2:
                return
        raise AssertionError("it never comes to rest")

    # -- network

    def let_dials_through(self) -> None:
        """Make the connections that were held."""
        held, self._held = self._held, []
        for each in held:
            if not each.done():
                each.set_result(None)

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:  # type: ignore[override]
        """A listener that connections of this loop reach. Any port that is not taken for 0."""
        number = port or 20_000 + len(self._listeners)
        listener = self._listeners[number] = Listener(self, protocol_factory, number)
        return listener

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:  # type: ignore[override]
        """A pipe to whoever listens at `port`. Raises `ConnectionRefusedError` when nobody does."""
        await asyncio.sleep(0)
        if self.hold_dials:
            held = self.create_future()
            self._held.append(held)
            await held
        listener = self._listeners.get(port)
        if listener is None:
            raise ConnectionRefusedError(f"nobody listens at port {port}")
        protocol = protocol_factory()
        pipe = Pipe(self, protocol, listener.factory(), lose=lambda: self.resets_lose, reset_on_close=listener.linger_off)
        self.connections.append(pipe)
        pipe.dialled.made()
        pipe.accepted.made()
        try:
            await asyncio.sleep(0)  # until both have been told
        except asyncio.CancelledError:
            pipe.dialled.abort()
            raise
        return pipe.dialled, protocol

    def forget_listener(self, port: int) -> None:
        """Nobody listens there any more."""
        self._listeners.pop(port, None)

    def close(self) -> None:
        if not self.is_closed():
            self._listeners.clear()
            self.connections.clear()
            super().close()


class Listener:
    """`asyncio.Server`, as far as planes use one; also the socket in it."""

    def __init__(self, loop: ManualLoop, factory: Callable[[], asyncio.BaseProtocol], port: int) -> None:
        self.factory = factory
        self.linger_off = False
        self._loop = loop
        self._port = port

    @property
    def sockets(self) -> list["Listener"]:
        return [self]

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", self._port

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        """SO_LINGER, which accepted sockets inherit: closing one is a reset."""
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self.linger_off = True

    def close(self) -> None:
        self._loop.forget_listener(self._port)

    async def wait_closed(self) -> None:
        """Connections are not waited for."""
