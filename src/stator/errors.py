"""The error tree. Every error says who must act: the branch names the party, `code` is stable.

Control flow never reads message texts: it looks at the class, at `code` (the wire field and metric label)
or at `retryable` (another instance may be tried, as long as no item was delivered).
Foreign exceptions are mapped once, at the border of the room that met them, with ``raise … from``.
"""

from typing import ClassVar

__all__ = [
    "Cancelled",
    "ConfigError",
    "ConnectFailed",
    "Disconnected",
    "EngineError",
    "Overloaded",
    "PeerProtocolError",
    "StatorError",
    "StreamIncomplete",
    "Timeout",
    "Unavailable",
    "UsageError",
]


class StatorError(Exception):
    """Root of the tree.

    `message` is for people; `instance` is the id of the instance concerned (0: none); `phase` names what was
    being waited for, one of the phases of `stator.protocol.stream.Phase` in lower case, or "".
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, instance: int = 0, phase: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.instance = instance
        self.phase = phase


class UsageError(StatorError):
    """The caller's mistake: a wrong name, type, state or size. Retrying the same call cannot help."""

    code = "usage"


class ConfigError(UsageError):
    """A setting is unknown, malformed or contradicts another; the message names it and what to do."""

    code = "config"


class PeerProtocolError(StatorError):
    """The other process sent bytes that break the wire format. Its connection is closed with the reason."""

    code = "protocol"


class Unavailable(StatorError):
    """Nobody is there: no instance is registered, or the chosen one is draining or does not know the endpoint."""

    code = "unavailable"
    retryable = True


class Overloaded(StatorError):
    """Somebody is there but at capacity; try another instance, or later."""

    code = "overloaded"
    retryable = True


class Disconnected(StatorError, ConnectionError):
    """The connection ended before the stream did."""

    code = "disconnected"
    retryable = True


class ConnectFailed(Disconnected):
    """No connection could be made, or the process that answered is not the one in the record."""

    code = "connect_failed"


class StreamIncomplete(Disconnected):
    """Items were delivered, then the stream was cut without its final sentinel: the answer is truncated."""

    code = "stream_incomplete"
    retryable = False


class Timeout(StatorError, TimeoutError):
    """A wait reached its deadline; `phase` says which one."""

    code = "timeout"
    retryable = True


class Cancelled(StatorError):
    """The request was killed by its own side; what the other side still did is not known."""

    code = "cancelled"


class EngineError(StatorError):
    """The handler raised. `kind` is one of the reference's backend kinds (`spec/10 §4.3`), `Unknown` if it fits none.

    `InvalidArgument` means that the request was at fault (HTTP 400); every other kind is the worker's fault.
    """

    code = "engine"

    def __init__(self, message: str, *, kind: str = "Unknown", instance: int = 0, phase: str = "") -> None:
        super().__init__(message, instance=instance, phase=phase)
        self.kind = kind
