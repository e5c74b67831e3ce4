"""A runtime that is connected when it is first needed: the reference's constructor cannot wait, Stator's runtime must."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from stator.dynamo.errors import InvalidValue
from stator.errors import UsageError
from stator.protocol.ids import EndpointId
from stator.runtime import Runtime, ServedEndpoint
from stator.tasks import Scope

__all__ = ["Membership"]

logger = logging.getLogger(__name__)

_BACKENDS = {"file": "file", "mem": "memory"}


class Membership:
    """One runtime of this process from its first use to `shutdown`. One task enters and leaves it; nothing else may.

    Configured before it is connected: what `when_connected` is given is done then.
    """

    def __init__(self, *, discovery: str | None, request_plane: str | None, event_plane: str | None = None) -> None:
        """`discovery` is the reference's name of a backend, or that of a plug-in; None is the setting, here and for the others. Raises
        `InvalidValue` for planes that nobody has.
        """
        if request_plane not in (None, "tcp", "nats"):
            raise InvalidValue(f"Invalid request plane mode: '{request_plane}'. Valid options are: 'nats', 'tcp'")
        if event_plane not in (None, "zmq", "nats"):
            raise InvalidValue(f"Invalid event_plane value '{event_plane}'. Valid values: 'nats', 'zmq'")
        given = {
            "discovery": None if discovery is None else _BACKENDS.get(discovery, discovery),
            "request_plane": request_plane,
            "event_plane": event_plane,
        }
        self._settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.served: dict[EndpointId, ServedEndpoint] = {}
        """what this runtime serves now"""
        self._scope = Scope("runtime of stator.dynamo", close_timeout=60.0)
        self._keeper: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[Runtime] | None = None
        self._runtime: Runtime | None = None
        self._closing = False
        self._deferred: list[Callable[[Runtime], object]] = []
        self._leaving: list[Callable[[], Awaitable[object]]] = []

    @property
    def closing(self) -> bool:
        """Whether `shutdown` was called."""
        return self._closing

    @property
    def connected(self) -> Runtime | None:
        """The runtime, if it is connected now."""
        return self._runtime

    def now(self, what: str) -> Runtime:
        """The runtime, for what cannot wait. Raises `UsageError` when it is not connected."""
        if self._runtime is None:
            state = "was shut down" if self._closing else "is not connected yet"
            raise UsageError(
                f"{what}: the runtime {state}. It connects at the first `await` that needs it; `await runtime.connected()` before, or use"
                " @dynamo_worker(), which does"
            )
        return self._runtime

    def when_connected(self, work: Callable[[Runtime], object]) -> None:
        """Do `work` with the runtime: now, or once it is connected."""
        if self._runtime is not None:
            work(self._runtime)
        elif not self._closing:
            self._deferred.append(work)

    def spawn(self, work: Coroutine[Any, Any, object], *, name: str) -> None:
        """Run `work` beside the runtime until it is left; it waits for `runtime()` itself."""
        self._scope.spawn(work, name=name)

    def on_leave(self, close: Callable[[], Awaitable[object]]) -> None:
        """Await `close()` when the runtime is about to be left, the last one given first. It must be idempotent."""
        self._leaving.append(close)

    async def runtime(self) -> Runtime:
        """The runtime, connected. Raises `UsageError` after `shutdown`, `StatorError` when the cluster cannot be joined; the next
        call tries again. Cancelling it leaves the connecting to whoever asks next.
        """
        if self._runtime is not None and not self._closing:
            return self._runtime
        if self._closing:
            raise UsageError("the runtime was shut down; make another")
        if self._ready is None:
            self._ready = asyncio.get_running_loop().create_future()
            self._keeper = self._scope.spawn(self._keep(self._ready), name="runtime")
        return await asyncio.shield(self._ready)

    async def _keep(self, ready: "asyncio.Future[Runtime]") -> None:
        try:
            async with Runtime.connect(**self._settings) as runtime:
                for work in self._deferred:
                    work(runtime)
                self._deferred.clear()
                self._runtime = runtime
                ready.set_result(runtime)
                if self._closing:
                    runtime.shutdown()
                await runtime.wait_for_shutdown()
                self._closing = True
                for close in reversed(self._leaving):
                    await close()
        except Exception as error:
            if ready.done():
                raise
            self._ready = None
            ready.set_exception(error)
            ready.exception()  # perhaps nobody waits any more
        finally:
            self._runtime = None
            if not ready.done():
                ready.cancel()

    def shutdown(self) -> None:
        """Begin to leave. Idempotent."""
        self._closing = True
        if self._runtime is not None:
            self._runtime.shutdown()

    async def left(self) -> None:
        """Wait until the cluster is left after `shutdown`. Cancelling it changes nothing."""
        if self._keeper is not None:
            await asyncio.wait((self._keeper,))

    async def aclose(self, *, drain: bool = True) -> None:
        """Leave; without `drain`, or cancelled, running requests are ended. Idempotent."""
        self.shutdown()
        try:
            if drain:
                await self.left()
        finally:
            await self._scope.aclose()
