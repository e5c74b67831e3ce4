"""The right of one engine call to go to a worker, and the calls that belong to one request."""

from collections.abc import Callable
from enum import IntEnum

__all__ = ["CallGroup", "Permit", "PermitState", "Priority"]


class Priority(IntEnum):
    """Classes of requests; a lower number goes first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2

    @property
    def label(self) -> str:
        """As clients and metrics spell it."""
        return self.name.lower()


class PermitState(IntEnum):
    """waiting → granted → routed → over; from any of them to over; from granted back to waiting."""

    WAITING = 0
    GRANTED = 1
    """it may go, and no worker counts it yet"""
    ROUTED = 2
    """a worker took it"""
    OVER = 3


class CallGroup:
    """What the calls of one request have in common. `since` is when it came, in monotonic seconds."""

    __slots__ = ("priority", "since", "taken", "tenant")

    def __init__(self, tenant: str, priority: Priority, since: float) -> None:
        self.tenant = tenant
        self.priority = priority
        self.since = since
        self.taken = 0
        """calls that a worker took, ever: with one of them the others are not refused for waiting any more"""


class Permit:
    """One call. `wake` is called when it is granted, if it had to wait, and when `refusal` is set."""

    __slots__ = ("granted_at", "group", "refusal", "returns", "state", "stream", "wake")

    def __init__(self, group: CallGroup) -> None:
        self.group = group
        self.state = PermitState.WAITING
        self.granted_at = 0.0
        self.returns = 0
        """how often workers refused the call after it was granted"""
        self.stream: object = None
        """what the call is made with, from the moment it is being made"""
        self.refusal: Exception | None = None
        self.wake: Callable[[], None] | None = None

    @property
    def counted(self) -> bool:
        """Whether a worker's load includes the call already: the stream knows its instance from that moment on, and forgets it while it
        looks for another one.
        """
        return getattr(self.stream, "instance_id", 0) != 0
