"""Typed errors of the reference. A handler raises them; the caller sees kind and text of what it raised (`spec/10 §4.3`)."""

import logging
from typing import Any, ClassVar

from stator.errors import EngineError

__all__ = [
    "Cancelled",
    "CannotConnect",
    "ConnectionTimeout",
    "Disconnected",
    "DynamoException",
    "EngineShutdown",
    "HttpError",
    "InvalidArgument",
    "RouterQueueLimitExceeded",
    "SelectionServiceError",
    "StreamIncomplete",
    "Unknown",
]

logger = logging.getLogger(__name__)

_LONGEST = 8192
"""characters of an `HttpError`'s message"""


class DynamoException(EngineError):
    """The root of the reference's errors. Takes any arguments, as `Exception` does; `str()` of it is the text that is sent."""

    wire_kind: ClassVar[str] = "Unknown"

    def __init__(self, *args: Any) -> None:
        super().__init__(args[0] if len(args) == 1 and isinstance(args[0], str) else _text(args), kind=self.wire_kind)
        self.args = args


class Unknown(DynamoException):
    """Fits none of the others."""


class InvalidArgument(DynamoException):
    """The request is at fault."""

    wire_kind = "InvalidArgument"


class CannotConnect(DynamoException):
    """A connection that the handler needed could not be made."""

    wire_kind = "CannotConnect"


class Disconnected(DynamoException):
    """A connection that the handler had was lost."""

    wire_kind = "Disconnected"


class ConnectionTimeout(DynamoException):
    """Something that the handler waited for took too long."""

    wire_kind = "ConnectionTimeout"


class Cancelled(DynamoException):
    """The handler gave the request up because it was cancelled."""

    wire_kind = "Cancelled"


class EngineShutdown(DynamoException):
    """The engine is ending or dead: the request may be tried elsewhere."""

    wire_kind = "EngineShutdown"


class StreamIncomplete(DynamoException):
    """The handler's own source of items ended too early."""

    wire_kind = "StreamIncomplete"


class RouterQueueLimitExceeded(DynamoException):
    """Raised by the reference's KV router when a queue is full. Here it is only a name to catch and to raise."""


class SelectionServiceError(DynamoException):
    """Raised by the reference's selection service. Here it is only a name to catch and to raise."""


class HttpError(Exception):
    """An answer of its own for an HTTP client: `code` is the status, 0–599, `message` its text, cut at 8 192 characters."""

    def __init__(self, code: int, message: str) -> None:
        """Raises `ValueError` for anything but an integer and a text."""
        if not isinstance(code, int) or isinstance(code, bool):  # pyright: ignore[reportUnnecessaryIsInstance]: callers are untyped
            raise ValueError("HttpError status code must be an integer")
        if not isinstance(message, str):  # pyright: ignore[reportUnnecessaryIsInstance]: callers are untyped
            raise ValueError("HttpError message must be a string")
        if not 0 <= code < 600:
            raise ValueError("HTTP status code must be an integer between 0 and 599")
        if len(message) > _LONGEST:
            logger.warning(
                "the message of an HttpError has %d characters; what is beyond %d is dropped", len(message), _LONGEST
            )
            message = f"{message[: _LONGEST - 3]}..."
        super().__init__(f"HTTP {code}: {message}")
        self.code = code
        self.message = message


def _text(args: tuple[Any, ...]) -> str:
    return str(Exception(*args))
