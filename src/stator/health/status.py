"""What is known about the health of the process and of its endpoints. No I/O, no waiting."""

import enum
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from stator.clock import Clock
from stator.errors import UsageError

__all__ = ["Activity", "EndpointChange", "EndpointState", "Explanation", "Obstacle", "SystemHealth", "Target"]

logger = logging.getLogger(__name__)

Status = Literal["ready", "notready"]


class EndpointState(enum.Enum):
    """What is known of an endpoint. `STARTING` and `SICK` are both shown as `notready`; only `SICK` is a finding."""

    STARTING = "starting"
    """nothing was heard of it yet"""
    READY = "ready"
    SICK = "sick"

    @property
    def status(self) -> Status:
        """As the health page shows it."""
        return "ready" if self is EndpointState.READY else "notready"


class EndpointChange(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint's state became another one. `SICK`: withdraw its record; `READY`: restore it."""

    endpoint: str
    state: EndpointState
    previous: EndpointState
    reason: str


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint that can be probed. `payload` is the request a canary sends."""

    endpoint: str
    instance_id: int
    payload: Any


class Obstacle(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that keeps the process from being ready. `endpoint` is "" for the process itself; `seconds`: for how long."""

    endpoint: str
    reason: str
    seconds: float


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why the status is what it is. `rule` is the one that decided; `seconds`: for how long the status has been this."""

    status: Status
    seconds: float
    rule: Literal["listed endpoints", "canary targets", "process"]
    obstacles: tuple[Obstacle, ...]


class _Endpoint:
    __slots__ = ("reason", "since", "state")

    def __init__(self, state: EndpointState, reason: str, since: float) -> None:
        self.state = state
        self.reason = reason
        self.since = since


class Activity:
    """Where a served endpoint says that it answered: after each flush of items without error, and after a clean end.

    Error items must not be noted (`spec/25 §6`).
    """

    __slots__ = ("_health", "_now", "_sound", "endpoint", "last")

    def __init__(self, endpoint: str, health: "SystemHealth", now: Callable[[], float]) -> None:
        self.endpoint = endpoint
        self.last = float("-inf")
        """monotonic seconds of the latest answer"""
        self._health = health
        self._now = now
        self._sound = False

    def note(self) -> None:
        """The endpoint answered just now. Token path: a clock reading and a comparison, unless the endpoint was not ready."""
        self.last = self._now()
        if not self._sound:
            self._health.answered(self)

    def follow(self, state: EndpointState) -> None:
        """Told by `SystemHealth` about each state."""
        self._sound = state is EndpointState.READY


class SystemHealth:
    """The health of one process. Endpoints are known by their bare names, as in the reference.

    `canary` says whether targets are probed: then they begin as not ready, and endpoints without payload do not count at all.
    """

    def __init__(
        self, *, clock: Clock, starting_status: Status = "notready", listed: Sequence[str] = (), canary: bool = False
    ) -> None:
        self._now = clock.monotonic
        self._begin = self._now()
        self._canary = canary
        self._system: Status = starting_status
        self._system_reason = "starting status"
        self._shown_reason = ""
        self._system_since = self._begin
        self._listed = tuple(dict.fromkeys(listed))
        self._endpoints: dict[str, _Endpoint] = {}
        self._targets: dict[str, Target] = {}
        self._activities: dict[str, Activity] = {}
        self._subscribers: list[Callable[[EndpointChange], None]] = []
        for name in self._listed:
            self._endpoints[name] = self._expected()
        self._status: Status = self._decide()
        self._status_since = self._begin

    # -- what there is ----------------------------------------------------------------------------------------------------

    def add(self, endpoint: str, *, payload: Any = None, instance_id: int = 0) -> Target | None:
        """`endpoint` takes requests from now on. With a `payload` it is a target, which is returned.

        Adding a target's name again changes nothing: the first stays, with a warning (`spec/25 §6`).
        """
        if endpoint in self._targets:
            logger.warning("endpoint %s has a canary target already; the new one is ignored", endpoint)
            return self._targets[endpoint]
        target = None
        if payload is not None:
            target = self._targets[endpoint] = Target(endpoint=endpoint, instance_id=instance_id, payload=payload)
            if self._canary:
                self._activities[endpoint] = Activity(endpoint, self, self._now)
        if not self._canary:
            self._endpoints[endpoint] = _Endpoint(EndpointState.READY, "takes requests", self._now())
        elif target is not None:
            reason = "neither a canary nor a request was answered yet"
            self._endpoints[endpoint] = _Endpoint(EndpointState.STARTING, reason, self._now())
        elif endpoint in self._endpoints:
            self._endpoints[endpoint].reason = "it is listed and the canary is on, but it has no canary payload"
        self._refresh()
        return target

    def remove(self, endpoint: str) -> None:
        """`endpoint` is no longer served. A listed one stays, as not ready. Idempotent; subscribers are not told."""
        self._targets.pop(endpoint, None)
        self._activities.pop(endpoint, None)
        if endpoint in self._listed:
            self._endpoints[endpoint] = self._expected()
        else:
            self._endpoints.pop(endpoint, None)
        self._refresh()

    @property
    def targets(self) -> dict[str, Target]:
        """Endpoints that can be probed, by name. A copy."""
        return dict(self._targets)

    def activity(self, endpoint: str) -> Activity | None:
        """Where `endpoint` notes its answers; None if nobody asks (no payload, or no canary)."""
        return self._activities.get(endpoint)

    # -- what changes -----------------------------------------------------------------------------------------------------

    def set_system(self, ready: bool, reason: str = "") -> None:
        """The process's own word. Decides only when there are neither listed endpoints nor targets.

        Why it is not ready is shown on the health page, beside what the reference has there.
        """
        status: Status = "ready" if ready else "notready"
        if status != self._system:
            self._system_since = self._now()
        self._system, self._system_reason = status, reason or "set by the program"
        self._shown_reason = "" if ready else reason
        self._refresh()

    def set_endpoint(self, endpoint: str, state: EndpointState, reason: str) -> None:
        """The finding of a canary or of the program. `UsageError` for an endpoint that is not known here."""
        if endpoint not in self._endpoints:
            raise UsageError(
                f"no endpoint called {endpoint!r} reports health here; known: {', '.join(self._endpoints) or 'none'}"
            )
        self._put(endpoint, state, reason)
        self._refresh()

    def answered(self, activity: Activity) -> None:
        """A real request was answered: as good as a canary. Ignored when the endpoint is gone."""
        if self._activities.get(activity.endpoint) is activity:
            self.set_endpoint(activity.endpoint, EndpointState.READY, "answered a request")

    def subscribe(self, callback: Callable[[EndpointChange], None]) -> Callable[[], None]:
        """Call `callback` at each change of an endpoint's state, in the step that made it. The answer ends it (idempotent).

        Registering an endpoint is no change. What the callback raises is logged.
        """
        self._subscribers.append(callback)

        def end() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return end

    # -- what it means ----------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the process is healthy: the first rule of `spec/25 §4` that applies."""
        return self._status == "ready"

    @property
    def uptime(self) -> float:
        """Seconds since this object was made."""
        return self._now() - self._begin

    def state(self, endpoint: str) -> EndpointState | None:
        """What is known of `endpoint`; None if it does not report here."""
        entry = self._endpoints.get(endpoint)
        return entry.state if entry else None

    def explain(self) -> Explanation:
        """Which rule decided, what is in the way and since when."""
        now = self._now()
        rule, names = self._rule()
        entries = [(name, self._endpoints[name]) for name in names]
        obstacles = [
            Obstacle(endpoint=name, reason=entry.reason, seconds=now - entry.since)
            for name, entry in entries
            if entry.state is not EndpointState.READY
        ]
        if rule == "process" and self._system != "ready":
            reason = f"{self._system_reason}; no endpoint is listed or has a canary payload"
            obstacles.append(Obstacle(endpoint="", reason=reason, seconds=now - self._system_since))
        return Explanation(status=self._status, seconds=now - self._status_since, rule=rule, obstacles=tuple(obstacles))

    def body(self) -> bytes:
        """The health page as JSON, keys in the reference's order (`spec/25 §5`); endpoints in order of registration.

        Ours alone, at the end: `reason`, while the process is not ready and has said why.
        """
        secs, nanos = divmod(round(self.uptime * 1e9), 10**9)
        endpoints = {name: entry.state.status for name, entry in self._endpoints.items()}
        page: dict[str, Any] = {"status": self._status, "uptime": {"secs": secs, "nanos": nanos}, "endpoints": endpoints}
        if self._shown_reason and self._status != "ready":
            page["reason"] = self._shown_reason
        return msgspec.json.encode(page)

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _expected(self) -> _Endpoint:
        return _Endpoint(EndpointState.STARTING, "it is listed but not served", self._now())

    def _rule(self) -> tuple[Literal["listed endpoints", "canary targets", "process"], tuple[str, ...]]:
        if self._listed:
            return "listed endpoints", self._listed
        if self._targets:
            return "canary targets", tuple(self._targets)
        return "process", ()

    def _decide(self) -> Status:
        rule, names = self._rule()
        if rule == "process":
            return self._system
        return "ready" if all(self._endpoints[name].state is EndpointState.READY for name in names) else "notready"

    def _put(self, endpoint: str, state: EndpointState, reason: str) -> None:
        activity = self._activities.get(endpoint)
        if activity is not None:
            activity.follow(state)
        entry = self._endpoints[endpoint]
        previous = entry.state
        entry.reason = reason
        if state is not previous:
            entry.state = state
            entry.since = self._now()
            level = logging.WARNING if state is EndpointState.SICK else logging.INFO
            logger.log(level, "endpoint %s is %s: %s", endpoint, state.status, reason)
            self._tell(EndpointChange(endpoint=endpoint, state=state, previous=previous, reason=reason))

    def _tell(self, change: EndpointChange) -> None:
        for callback in tuple(self._subscribers):
            try:
                callback(change)
            except Exception:
                logger.exception("a subscriber to the health of endpoint %s failed", change.endpoint)

    def _refresh(self) -> None:
        status = self._decide()
        if status != self._status:
            self._status, self._status_since = status, self._now()
            logger.info("health is %s", status)
