"""What a process counts and says of the requests it serves: one place per event, nothing per item.

Names, labels and buckets of what the reference has are its own (`spec/30 §6, §7`); `stator_requests_*` is beside it and adds up:
received = ok + error + cancelled + refused, at any time when none is running.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

from stator.clock import Clock
from stator.protocol.ids import EndpointId
from stator.runtime.admission import Admission
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
        self._worker: WorkerProcessMetrics | None = None
        self._calls: RequestPlaneMetrics | None = None
        self._shown = Traffic()
        self._received: Family[Counter] | None = None
        self._outcomes: Family[Counter] | None = None

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
    def calls(self) -> RequestPlaneMetrics:
        """What is counted of the requests this process sends; registered with its first client."""
        if self._calls is None:
            self._calls = RequestPlaneMetrics(self.root)
            self.root.on_update(self._show_traffic)
        return self._calls

    def _show_traffic(self) -> None:
        calls, now, shown = self.calls, self.traffic, self._shown
        calls.tcp_sent(now.sent - shown.sent)
        calls.tcp_received(now.received - shown.received)
        calls.tcp_failed(now.failed - shown.failed)
        self._shown = Traffic(sent=now.sent, received=now.received, failed=now.failed)

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


class EndpointMeter:
    """What one serving counts."""

    def __init__(
        self, process: ProcessMeter, endpoint: EndpointId, level: MetricsLevel, labels: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Raises `UsageError` if the names or `labels` cannot be used; `level` is then to be removed."""
        self.now: Callable[[], float] = process.clock.monotonic
        self.endpoint = endpoint
        self.instance = process.instance
        self.log = process.log
        self.worker = process.worker
        self.handler = WorkHandlerMetrics(level, labels)
        self.received = process.received(endpoint)
        self.ok = process.outcome(endpoint, "ok")
        self.error = process.outcome(endpoint, "error")
        self.cancelled = process.outcome(endpoint, "cancelled")
        self.refused = process.outcome(endpoint, "refused")
        self._process = process
        self._level = level
        self._bytes_shown = 0
        self._bytes_ended = 0
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
        """Bring the bytes up to date; called before each scrape."""
        self._show(self._bytes_ended + sum(each.sent_bytes for each in self._running()))

    def sent(self, bytes: int) -> None:
        """An answer of so many bytes has ended."""
        self._bytes_ended += bytes

    def _show(self, total: int) -> None:
        if total > self._bytes_shown:
            self.handler.responded(total - self._bytes_shown)
            self._bytes_shown = total

    def arrived(self, sent_ns: int) -> None:
        """A request says when it was sent."""
        self.worker.arrived(sent_ns=sent_ns, received_ns=int(self._process.clock.wall() * 1e9))

    def malformed(self, size: int, kind: str) -> None:
        """A request could not be read."""
        handler = self.handler
        self.received.value += 1
        self.error.value += 1
        handler.received(size)
        handler.failed(WorkError(kind))
        handler.finished(0.0)

    def close(self) -> None:
        """Off the page."""
        self._level.remove()
