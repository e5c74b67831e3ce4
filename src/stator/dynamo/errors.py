"""What callers of this room get, in the classes and words of the reference (`spec/10 §4.4`, `spec/20 §8`)."""

from stator.errors import ConnectFailed, EngineError, StatorError, StreamIncomplete, Unavailable, UsageError
from stator.protocol.stream import Phase
from stator.protocol.wire_errors import to_wire

__all__ = [
    "CallFailed",
    "InvalidType",
    "InvalidValue",
    "NotSendable",
    "NotThere",
    "StreamFailed",
    "call_failed",
    "is_of_stream",
    "stream_failed",
]

_NOT_CALLED = "CannotConnect: Worker generate() failed before response stream: "
_CUT = "Stream ended before generation completed"


class InvalidValue(UsageError, ValueError):
    """An argument has a value that cannot be meant."""


class InvalidType(UsageError, TypeError):
    """An argument is of the wrong type."""


class NotSendable(UsageError, TypeError):
    """A request has no JSON form."""


class NotThere(UsageError, NotImplementedError):
    """A name of the reference that Stator does not have, or has not yet; the message says which work brings it."""


class CallFailed(StatorError):
    """There is no stream: nobody to call, no connection, or the handler could not be called. `__cause__` is Stator's own error.

    The text is `{kind}: {message}` with the reference's kinds; the reference raises a bare `Exception`.
    """


class StreamFailed(CallFailed, ValueError):
    """The stream ended by an error. A `ValueError`, as in the reference, whatever the reason."""


def call_failed(error: StatorError, *, endpoint: str, listed: bool, wanted: int | None = None) -> CallFailed:
    """What is raised instead of `error` before there is a stream.

    `endpoint` is the path with slashes; `listed` says whether the endpoint has instances, `wanted` which one alone would do.
    """
    if isinstance(error, Unavailable) and wanted is not None and not listed:
        return CallFailed(f"CannotConnect: instance_id={wanted} not found for endpoint {endpoint}", instance=wanted)
    if isinstance(error, Unavailable) and not listed:
        return CallFailed(f"Unavailable: No workers available for endpoint {endpoint}")
    if error.phase == Phase.PROLOGUE.label and isinstance(error, EngineError):
        return CallFailed(f"{_NOT_CALLED}Generate Error: {error.message}", instance=error.instance, phase=error.phase)
    if error.phase == Phase.PROLOGUE.label and isinstance(error, ConnectFailed):
        said = error.message.partition(": ")[2] or error.message
        return CallFailed(f"{_NOT_CALLED}{said}", instance=error.instance, phase=error.phase)
    return CallFailed(_text(error), instance=error.instance, phase=error.phase)


def is_of_stream(error: StatorError) -> bool:
    """Whether `error` came after an instance had accepted the request: readers of the stream get it, not the caller."""
    if isinstance(error, EngineError):
        return error.phase != Phase.PROLOGUE.label
    return error.phase in (Phase.FIRST_ITEM.label, Phase.ITEMS.label)


def stream_failed(error: StatorError) -> StreamFailed:
    """What is raised instead of `error` while a stream is read."""
    return StreamFailed(_text(error), instance=error.instance, phase=error.phase)


def _text(error: StatorError) -> str:
    if isinstance(error, StreamIncomplete):
        return f"Disconnected: {error.message}" if _CUT in error.message else f"Disconnected: {_CUT}: {error.message}"
    wire = to_wire(error)
    kind = wire.error_type
    name = kind if isinstance(kind, str) else f"Backend{kind.get('Backend', 'Unknown')}"
    return f"{name}: {wire.message}"
