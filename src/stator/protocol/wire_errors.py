"""Errors on the compatible wire: the reference's kinds and ours (`spec/10 §4.3, §1.8, §8`).

An error item names a kind of the runtime (`"Disconnected"`) or, as `{"Backend": kind}`, one that the handler raised. The latter
is always an `EngineError`: nothing is concluded about the instance from what an engine says about connections of its own.
"""

from typing import Any

import msgspec

from stator.errors import (
    Cancelled,
    ConnectFailed,
    Disconnected,
    EngineError,
    Overloaded,
    StatorError,
    StreamIncomplete,
    Timeout,
    Unavailable,
    UsageError,
)
from stator.protocol.stream import Phase
from stator.protocol.values import DECODE_ERRORS

__all__ = ["BACKEND_KINDS", "RUNTIME_KINDS", "WireError", "engine_error", "from_wire", "is_migratable", "to_wire"]

BACKEND_KINDS = frozenset(
    {
        "Unknown",
        "InvalidArgument",
        "CannotConnect",
        "Disconnected",
        "ConnectionTimeout",
        "ResponseTimeout",
        "Cancelled",
        "EngineShutdown",
        "StreamIncomplete",
    }
)
"""What may stand in `{"Backend": …}`: a reader of 1.3.1 cannot decode an item that names another kind."""

RUNTIME_KINDS = frozenset(
    {
        "Unknown",
        "InvalidArgument",
        "CannotConnect",
        "Disconnected",
        "ConnectionTimeout",
        "ResponseTimeout",
        "Cancelled",
        "ResourceExhausted",
        "Unavailable",
    }
)
"""What may stand there as plain text, the same way."""


class WireError(msgspec.Struct, frozen=True, kw_only=True):
    """The error object of an item, and of 1.6.1's prologue. 1.6.1 adds `class` (who must act); its other fields are ignored."""

    error_type: str | dict[str, str]
    message: str = "unknown error"
    class_: str | msgspec.UnsetType | None = msgspec.field(default=msgspec.UNSET, name="class")


# -- the worker's side ------------------------------------------------------------------------------------------------------

_WIRE_TYPES: tuple[tuple[type[StatorError], str], ...] = (
    (Overloaded, "ResourceExhausted"),
    (Unavailable, "Unavailable"),
    (ConnectFailed, "CannotConnect"),
    (Disconnected, "Disconnected"),
    (Timeout, "ResponseTimeout"),
    (Cancelled, "Cancelled"),
    (UsageError, "InvalidArgument"),
)
"""First match wins: `ConnectFailed` is a `Disconnected`."""


def to_wire(error: StatorError) -> WireError:
    """The error object for `error`. Types that the reference has no word for become `Unknown`; the message always stays."""
    if isinstance(error, EngineError):
        kind = error.kind if error.kind in BACKEND_KINDS else "Unknown"
        return WireError(error_type={"Backend": kind}, message=error.message)
    if isinstance(error, Timeout) and error.phase == Phase.CONNECT.label:
        return WireError(error_type="ConnectionTimeout", message=error.message)
    for kind, name in _WIRE_TYPES:
        if isinstance(error, kind):
            return WireError(error_type=name, message=error.message)
    return WireError(error_type="Unknown", message=error.message)


_ENGINE_KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (ValueError, "InvalidArgument"),
    (TypeError, "InvalidArgument"),
    (TimeoutError, "ConnectionTimeout"),
    (ConnectionError, "Disconnected"),
)


def engine_error(error: BaseException, *, instance: int = 0) -> StatorError:
    """What a handler's exception becomes: an `EngineError` of the kind the reference gives it; our own errors stay."""
    if isinstance(error, StatorError):
        return error
    if isinstance(error, GeneratorExit):
        return EngineError("engine shutting down", kind="EngineShutdown", instance=instance)
    return EngineError(f"{type(error).__name__}: {_text(error)}", kind=_engine_kind(error), instance=instance)


def _engine_kind(error: BaseException) -> str:
    for kind, name in _ENGINE_KINDS:
        if isinstance(error, kind):
            return name
    # asyncio's class, recognised by name: this room knows no event loop.
    if any(base.__name__ == "CancelledError" for base in type(error).__mro__):
        return "Cancelled"
    return "Unknown"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # `__str__` is the handler's own code
        return "(its text cannot be made)"


# -- the client's side ------------------------------------------------------------------------------------------------------


def from_wire(raw: Any, *, comments: list[str] | None = None, phase: Phase = Phase.ITEMS, instance: int = 0) -> StatorError:
    """What an error object means to the caller. Never raises: whatever cannot be read is an `EngineError` of kind `Unknown`.

    `comments` stand in for a missing error object. `phase` is the reader's: a connection that the worker lost in mid-stream
    makes the answer incomplete.
    """
    try:
        wire = msgspec.convert(raw, WireError)
    except DECODE_ERRORS:
        text = ", ".join(comments) if raw is None and comments else _loose_message(raw)
        return EngineError(text, instance=instance)
    error_type, message = wire.error_type, wire.message
    if isinstance(error_type, dict):
        kind = error_type.get("Backend", "Unknown")
        return EngineError(message, kind=kind if kind in BACKEND_KINDS else "Unknown", instance=instance)
    where = phase.label
    match error_type:
        case "ResourceExhausted":
            return Overloaded(message, instance=instance, phase=where)
        case "Unavailable":
            return Unavailable(message, instance=instance, phase=where)
        case "CannotConnect":
            return ConnectFailed(message, instance=instance, phase=where)
        case "Disconnected":
            cut = StreamIncomplete if phase is Phase.ITEMS else Disconnected
            return cut(message, instance=instance, phase=where)
        case "ConnectionTimeout":
            return Timeout(message, instance=instance, phase=Phase.CONNECT.label)
        case "ResponseTimeout":
            return Timeout(message, instance=instance, phase=where)
        case "Cancelled":
            return Cancelled(message, instance=instance, phase=where)
        case "InvalidArgument":
            return EngineError(message, kind="InvalidArgument", instance=instance)
        case _:
            return _by_class(wire, where, instance)


def _by_class(wire: WireError, phase: str, instance: int) -> StatorError:
    """An error type that is not known, from a later release: its class says who must act."""
    match wire.class_:
        case "InvalidRequest":
            return EngineError(wire.message, kind="InvalidArgument", instance=instance)
        case "Unavailable":
            return Unavailable(wire.message, instance=instance, phase=phase)
        case "DeadlineExceeded":
            return Timeout(wire.message, instance=instance, phase=phase)
        case _:
            return EngineError(wire.message, instance=instance)


def _loose_message(raw: Any) -> str:
    if isinstance(raw, dict):
        message: Any = raw.get("message")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]: any JSON object
        if isinstance(message, str):
            return message
    return "unknown error"


def is_migratable(error: StatorError) -> bool:
    """Whether the rest of the answer may be asked from another instance by whoever knows how to continue it (`spec/50 §17`).

    Lost connections, refusals, timeouts and an engine that shuts down; never a request that was cancelled or is at fault.
    """
    if isinstance(error, EngineError):
        return error.kind == "EngineShutdown"
    return error.retryable or isinstance(error, Disconnected)
