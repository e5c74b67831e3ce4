"""What a process counts and says of the requests it serves: one place per event, nothing per item.

Names, labels and buckets of what the reference has are its own (`spec/30 §6, §7`); `stator_requests_*` is beside it and adds up:
received = ok + error + cancelled + refused, at any time when none is running.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

from stator.clock import Clock
from stator.health import canary_outcomes
from stator.protocol.ids import EndpointId
from stator.runtime.admission import Admission
from stator.security import Refusals
from stator.telemetry import (
    Counter,
    Family,
    MetricsLevel,
    RequestLog,
    RequestPlaneMetrics,
    WorkerProcessMetrics,
    WorkError,
    WorkHandlerMetrics,
)
from stator.transports.plane import Traffic

__all__ = ["EndpointMeter", "Outcome", "ProcessMeter"]

Outcome = Literal["ok", "error", "cancelled", "refused"]


_MOST_UNCOUNTED = 1024
"""requests whose times are kept before they are counted"""


class _Sending(Protocol):
    """A request being answered, as far as its bytes are concerned."""

    @property
    def sent_bytes(self) -> int: ...


class ProcessMeter:
    """What all endpoints of a process share. `admission` is shown in the reference's pool and queue gauges."""

    def __init__(self, root: MetricsLevel, admission: Admission, clock: Clock, *, instance: int = 0) -> None:
        self.root = root
        self.instance = instance
        self.log = RequestLog(clock)
        self.clock = clock
        self.admission = admission
        self._levels: dict[tuple[str, ...], MetricsLevel] = {(): root}
        self.traffic = Traffic()
        self.refusals = Refusals()
        self._refused = root.counters(
            "stator_connections_refused_total",
            "Connections not made because one side does not trust the other",
            ("side", "reason"),
        )
        root.on_update(self._show_refusals)
        self._worker: WorkerProcessMetrics | None = None
        self._calls: CallMeter | None = None
        self._received: Family[Counter] | None = None
        self._outcomes: Family[Counter] | None = None
        self._canaries: Family[Counter] | None = None

    def level(self, *names: str) -> MetricsLevel:
        """The level of a namespace, of a component in it, or of an endpoint of that: always the same one for the same names."""
        level = self._levels.get(names)
        if level is None:
            above = self.level(*names[:-1])
            below = (above.namespace, above.component, above.endpoint)[len(names) - 1]
            level = self._levels[names] = below(names[-1])
        return level

    @property
    def worker(self) -> WorkerProcessMetrics:
        """Registered when the first endpoint is served."""
        if self._worker is None:
            self._worker = worker = WorkerProcessMetrics(self.root)
            worker.admits(pool=self.admission.slots, queue=self.admission.room)
            self.root.on_update(self._show_admission)
        return self._worker

    @property
    def calls(self) -> "CallMeter":
        """What is counted of the requests this process sends; registered with its first client."""
        if self._calls is None:
            self._calls = CallMeter(self.root, self.traffic)
        return self._calls

    @property
    def canaries(self) -> Family[Counter]:
        """What the canaries found, by endpoint and outcome; registered with the first one."""
        if self._canaries is None:
            self._canaries = canary_outcomes(self.root)
        return self._canaries

    def _show_refusals(self) -> None:
        for labels, count in self.refusals.counts.items():
            self._refused.labels(*labels).value = count

    def _show_admission(self) -> None:
        """A gauge per request would be work for each of them; the admission knows the numbers."""
        worker, admission = self.worker, self.admission
        worker.active_tasks.set(admission.running)
        worker.queue_depth.set(admission.queued)
        worker.engine_requests.set(admission.running)
        worker.queued_requests.set(admission.queued)

    def received(self, endpoint: EndpointId) -> Counter:
        """Requests that arrived for `endpoint`, refused ones included."""
        if self._received is None:
            self._received = self.root.counters(
                "stator_requests_received_total", "Requests that arrived, refused ones included", ("endpoint",)
            )
        return self._received.labels(str(endpoint))

    def outcome(self, endpoint: EndpointId, outcome: Outcome) -> Counter:
        """Requests of `endpoint` that ended so."""
        if self._outcomes is None:
            self._outcomes = self.root.counters(
                "stator_requests_total", "Requests that ended, by outcome", ("endpoint", "outcome")
            )
        return self._outcomes.labels(str(endpoint), outcome)


class CallMeter:
    """What a process counts of the requests it sends: plain numbers too, that become metrics before each scrape."""

    __slots__ = ("_metrics", "_shown", "_traffic", "answered", "open", "queued", "sent")

    def __init__(self, root: MetricsLevel, traffic: Traffic) -> None:
        self.open = 0
        """attempts in flight"""
        self.queued: list[float] = []
        """seconds from the call to the sending of each attempt since the last `update`"""
        self.sent: list[float] = []
        """seconds until it was accepted"""
        self.answered: list[float] = []
        """seconds from its sending to the first item"""
        self._metrics = RequestPlaneMetrics(root)
        self._traffic = traffic
        self._shown = Traffic()
        root.on_update(self.update)

    def attempt(self, waited: float) -> None:
        """A request is about to be sent, so long after it was made."""
        self.queued.append(waited)
        if len(self.queued) >= _MOST_UNCOUNTED:
            self.update()

    def update(self) -> None:
        """Make metrics of the numbers."""
        metrics = self._metrics
        metrics.inflight.set(self.open)
        pairs = ((metrics.queued, self.queued), (metrics.sent, self.sent), (metrics.first_item, self.answered))
        for observe_all, values in pairs:
            observe_all(values)
            values.clear()
        now, shown = self._traffic, self._shown
        metrics.tcp_sent(now.sent - shown.sent)
        metrics.tcp_received(now.received - shown.received)
        metrics.tcp_failed(now.failed - shown.failed)
        self._shown = Traffic(sent=now.sent, received=now.received, failed=now.failed)


class EndpointMeter:
    """What one serving counts: plain numbers that the serving adds to, and that become metrics before each scrape (`update`)."""

    __slots__ = (
        "_arrived",
        "_bytes_shown",
        "_counters",
        "_handler",
        "_level",
        "_running",
        "_shown",
        "_worker",
        "bytes_ended",
        "bytes_in",
        "cancelled",
        "durations",
        "ended_cancelled",
        "endpoint",
        "entered",
        "error",
        "firsts",
        "instance",
        "log",
        "now",
        "ok",
        "received",
        "refused",
        "wall",
    )

    def __init__(
        self, process: ProcessMeter, endpoint: EndpointId, level: MetricsLevel, labels: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Raises `UsageError` if the names or `labels` cannot be used; `level` is then to be removed."""
        self.now: Callable[[], float] = process.clock.monotonic
        self.wall = process.clock.wall
        self.endpoint = endpoint
        self.instance = process.instance
        self.log = process.log
        self.received = 0
        """requests that arrived"""
        self.ok = 0
        self.error = 0
        self.cancelled = 0
        self.refused = 0
        self.entered = 0
        """requests that got to the handler, or could not be read"""
        self.bytes_in = 0
        """bytes of those"""
        self.bytes_ended = 0
        """bytes of answers that have ended"""
        self.ended_cancelled = 0
        """requests that got to the handler and were cancelled"""
        self.durations: list[float] = []
        """seconds from slot to end, of requests that ended since the last `update`"""
        self.firsts: list[float] = []
        """seconds from slot to prologue, likewise"""
        self._worker = process.worker
        self._handler = handler = WorkHandlerMetrics(level, labels)
        counters = {"received": process.received(endpoint)}
        counters |= {each: process.outcome(endpoint, each) for each in ("ok", "error", "cancelled", "refused")}
        self._counters = counters | handler.counters
        self._shown = dict.fromkeys(self._counters, 0)
        self._bytes_shown = 0
        self._level = level
        self._running: Callable[[], Iterable[_Sending]] = tuple
        level.on_update(self.update)

    @classmethod
    def unlisted(cls, endpoint: EndpointId, clock: Clock, admission: Admission) -> "EndpointMeter":
        """One of its own, on no page."""
        root = MetricsLevel.runtime()
        return cls(ProcessMeter(root, admission, clock), endpoint, root)

    def follow(self, running: Callable[[], Iterable[_Sending]]) -> None:
        """Who is being answered right now: the bytes of long answers are counted at each scrape."""
        self._running = running

    def update(self) -> None:
        """Make metrics of the numbers; called before each scrape, when many requests have ended, and at the end."""
        for name, counter in self._counters.items():
            now = getattr(self, name)
            counter.value += now - self._shown[name]
            self._shown[name] = now
        for observe_all, values in ((self._handler.finished, self.durations), (self._worker.first_response, self.firsts)):
            observe_all(values)
            values.clear()
        running = tuple(self._running())
        self._handler.inflight.set(len(running))
        total = self.bytes_ended + sum(each.sent_bytes for each in running)
        if total > self._bytes_shown:
            self._handler.responded(total - self._bytes_shown)
            self._bytes_shown = total

    def ended(self, seconds: float, bytes: int) -> None:
        """A request that got to the handler has ended."""
        self.bytes_ended += bytes
        self.durations.append(seconds)
        if len(self.durations) >= _MOST_UNCOUNTED:
            self.update()

    def sent(self, sent_ns: int) -> None:
        """A request says when it was sent."""
        self._worker.arrived(sent_ns=sent_ns, received_ns=int(self.wall() * 1e9))

    def waited(self, seconds: float) -> None:
        """A request got a slot after so long."""
        self._worker.waited(seconds)

    def rejected(self) -> None:
        """A request found slots and queue full."""
        self.refused += 1
        self._worker.rejected()

    def failed(self, kind: WorkError) -> None:
        """A request failed outside of its handler's generator."""
        self._handler.failed(kind)

    def malformed(self, size: int, kind: str) -> None:
        """A request could not be read."""
        self.received += 1
        self.error += 1
        self.entered += 1
        self.bytes_in += size
        self.failed(WorkError(kind))
        self.durations.append(0.0)

    def close(self) -> None:
        """Off the page; what all servings of the endpoint count together stays."""
        self.update()
        self._level.remove()
