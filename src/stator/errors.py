"""The error tree, and the catalogue in it. Every error says who must act: the branch names the party, `code` is stable.

Control flow never reads message texts: it looks at the class, at `code` (the wire field and metric label)
or at `retryable` (another instance may be tried, as long as no item was delivered). `docs/errors.md` is made from what stands here.
Foreign exceptions are mapped once, at the border of the room that met them, with ``raise … from``.
"""

from typing import ClassVar

__all__ = [
    "Cancelled",
    "ConfigError",
    "ConnectFailed",
    "Disconnected",
    "EngineError",
    "NotTrusted",
    "Overloaded",
    "PeerProtocolError",
    "StatorError",
    "StreamIncomplete",
    "Timeout",
    "Unavailable",
    "UsageError",
]


class StatorError(Exception):
    """Something failed that has no better name; an error of a newer peer arrives as this.

    `message` is for people; `instance` is the id of the instance concerned (0: none); `phase` names what was
    being waited for, one of the phases of `stator.protocol.stream.Phase` in lower case, or "".
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    fault: str = "unknown"
    """who must act"""
    http_status: int = 500
    """what an HTTP client is answered"""
    advice: str = "read the message, and the log of the process it names"
    """what to do, for people"""

    def __init__(self, message: str, *, instance: int = 0, phase: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.instance = instance
        self.phase = phase


class UsageError(StatorError):
    """The caller's mistake: a wrong name, type, state or size. Retrying the same call cannot help."""

    code = "usage"
    fault = "the caller"
    advice = "fix the call: repeating it cannot help"


class ConfigError(UsageError):
    """A setting is unknown, malformed or contradicts another; the message names it and what to do."""

    code = "config"
    fault = "the operator"
    advice = "fix the setting that the message names"


class PeerProtocolError(StatorError):
    """The other process sent bytes that break the wire format. Its connection is closed with the reason."""

    code = "protocol"
    fault = "the other process"
    http_status = 502
    advice = "compare the versions of both processes; the connection was closed"


class Unavailable(StatorError):
    """Nobody is there: no instance is registered, or the chosen one is draining or does not know the endpoint."""

    code = "unavailable"
    retryable = True
    fault = "nobody is there"
    http_status = 503
    advice = "start workers, or wait until one is ready"


class Overloaded(StatorError):
    """Somebody is there but at capacity; try another instance, or later."""

    code = "overloaded"
    retryable = True
    fault = "capacity"
    http_status = 503
    advice = "send less, or add workers; another instance, or a later try, may do"


class Disconnected(StatorError, ConnectionError):
    """The connection ended before the stream did."""

    code = "disconnected"
    retryable = True
    fault = "the network, or a process that ended"
    http_status = 502
    advice = "nothing, as a rule: it is tried elsewhere by itself before the first item"


class ConnectFailed(Disconnected):
    """No connection could be made, or the process that answered is not the one in the record."""

    code = "connect_failed"
    advice = "see that the address in the record can be reached; the instance is avoided for a while"


class NotTrusted(ConnectFailed):
    """Two processes do not trust each other: TLS, certificates or the cluster secret differ, or one side has none.

    `reason` labels the metric (`docs/security.md`).
    """

    code = "not_trusted"
    fault = "the operator"
    advice = "give both processes the same secret and certificates of one authority; docs/security.md explains each reason"

    def __init__(self, message: str, *, reason: str = "unknown", instance: int = 0, phase: str = "connect") -> None:
        super().__init__(message, instance=instance, phase=phase)
        self.reason = reason


class StreamIncomplete(Disconnected):
    """Items were delivered, then the stream was cut without its final sentinel: the answer is truncated."""

    code = "stream_incomplete"
    retryable = False
    advice = "discard the answer, which is truncated, or ask for the rest"


class Timeout(StatorError, TimeoutError):
    """A wait reached its deadline; `phase` says which one."""

    code = "timeout"
    retryable = True
    fault = "whoever `phase` names"
    http_status = 504
    advice = "find out why it is slow, or raise the limit of that phase"


class Cancelled(StatorError):
    """The request was killed by its own side; what the other side still did is not known."""

    code = "cancelled"
    fault = "the caller"
    advice = "nothing: the request was killed by its own side"


class EngineError(StatorError):
    """The handler raised. `kind` is one of the reference's backend kinds (`spec/10 §4.3`), `Unknown` if it fits none.

    `InvalidArgument` means that the request was at fault (HTTP 400); every other kind is the worker's fault.
    """

    code = "engine"
    fault = "the handler"
    advice = "look into the worker's log; the message has type and text of what it raised"

    def __init__(self, message: str, *, kind: str = "Unknown", instance: int = 0, phase: str = "") -> None:
        super().__init__(message, instance=instance, phase=phase)
        self.kind = kind
        if kind == "InvalidArgument":
            self.fault = "the request"
            self.http_status = 400
            self.advice = "fix the request: the message says what the handler found wrong with it"
