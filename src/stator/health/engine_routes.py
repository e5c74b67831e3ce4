"""Callbacks an engine offers to its operator under `/engine/…` (`spec/25 §5.1`)."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from stator.errors import UsageError

__all__ = ["Answer", "EngineCallback", "EngineRoutes", "call", "failure_text"]

logger = logging.getLogger(__name__)

EngineCallback = Callable[[Any], Awaitable[Any]]
"""Takes the request's JSON value (`{}` for an empty body) and returns one that can be JSON."""

Answer = tuple[int, bytes]
"""HTTP status and JSON text"""


class EngineRoutes:
    """The callbacks of this process by name. Names are free and may contain slashes: `control/start_profile`."""

    def __init__(self) -> None:
        self._callbacks: dict[str, EngineCallback] = {}

    def register(self, name: str, callback: EngineCallback) -> None:
        """Offer `callback` at `/engine/<name>`, instead of any before it. `UsageError` for an empty name."""
        if not name.strip("/"):
            raise UsageError("an engine route needs a name, like control/start_profile")
        self._callbacks[name.removeprefix("/")] = callback

    def unregister(self, name: str) -> None:
        """Take a callback away. Idempotent."""
        self._callbacks.pop(name.removeprefix("/"), None)

    @property
    def names(self) -> list[str]:
        """What is offered, oldest first."""
        return list(self._callbacks)

    async def handle(self, name: str, body: bytes) -> Answer:
        """The answer to a request for `/engine/<name>`. Cancelled: the callback is cancelled."""
        callback = self._callbacks.get(name)
        if callback is None:
            return 404, _error("Route not found", f"Route /engine/{name} not found")
        try:
            value: Any = msgspec.json.decode(body) if body else {}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return 400, _error("Invalid JSON", str(error))
        return await call(f"/engine/{name}", lambda: callback(value))


async def call(route: str, callback: Callable[[], Awaitable[Any]]) -> Answer:
    """200 and the callback's result, or 500 and what it raised."""
    try:
        return 200, msgspec.json.encode(await callback())
    except (Exception, SystemExit) as error:
        logger.warning("%s failed", route, exc_info=error)
        return 500, failure_text(f"Python callback failed: {type(error).__name__}: {error}")


def failure_text(message: str) -> bytes:
    """The body of a 500."""
    return _error("Handler error", message)


def _error(error: str, message: str) -> bytes:
    return msgspec.json.encode({"error": error, "message": message})
