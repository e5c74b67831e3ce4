"""What a worker and a client count of their requests (`spec/30 §6, §7, §8.3`), one method per event.

The token path calls `responded` once per flush with the bytes that left: nothing here runs per item, looks up a label or formats.
Gauges are context managers, so that they are back where they were whichever way a request ends.
"""

from collections.abc import Collection, Sequence
from enum import StrEnum

from stator.errors import UsageError
from stator.telemetry.hierarchy import MetricsLevel
from stator.telemetry.metric import Counter
from stator.telemetry.metric_set import MetricSet
from stator.telemetry.names import (
    FIRST_RESPONSE_BUCKETS,
    NETWORK_TRANSIT_BUCKETS,
    PERMIT_WAIT_BUCKETS,
    REQUEST_DURATION_BUCKETS,
    REQUEST_PLANE_BUCKETS,
    ROUNDTRIP_BUCKETS,
    ComponentName,
    Label,
    RequestPlaneName,
    TransportName,
    WorkHandlerName,
)

__all__ = ["RequestPlaneMetrics", "WorkError", "WorkHandlerMetrics", "WorkerProcessMetrics"]

QUEUE_CAPACITY = 40_000
POOL_CAPACITY = 10_000


class WorkError(StrEnum):
    """Why a request failed outside of its handler's generator (`spec/30 §6`)."""

    DESERIALIZATION = "deserialization"
    INVALID_MESSAGE = "invalid_message"
    RESPONSE_STREAM = "response_stream"
    GENERATE = "generate"
    PUBLISH_RESPONSE = "publish_response"
    PUBLISH_FINAL = "publish_final"


class WorkHandlerMetrics:
    """The families of one served endpoint, on a level made for this serving. Use it as:

        metrics.received(len(payload))
        with metrics.inflight:
            …
            metrics.responded(len(flushed_frames))
        metrics.finished([seconds])

    All show 0 from the start, except errors, which show up with the first one.
    """

    __slots__ = (
        "_cancellations",
        "_duration",
        "_errors",
        "_request_bytes",
        "_requests",
        "_response_bytes",
        "inflight",
    )

    def __init__(self, level: MetricsLevel, labels: Sequence[tuple[str, str]] = ()) -> None:
        """`labels` are constant ones of the worker's author.

        Raises `UsageError` if they, or the level's names, are not usable; the level is then of no use and to be removed.
        """
        try:
            self._requests = level.create_int_counter(
                ComponentName.REQUESTS_TOTAL, "Total number of requests processed by work handler", labels
            )
            self._duration = level.create_histogram(
                ComponentName.REQUEST_DURATION_SECONDS,
                "Time spent processing requests by work handler",
                labels,
                buckets=REQUEST_DURATION_BUCKETS,
            )
            self.inflight = level.create_int_gauge(
                ComponentName.INFLIGHT_REQUESTS, "Number of requests currently being processed by work handler", labels
            )
            self._request_bytes = level.create_int_counter(
                ComponentName.REQUEST_BYTES_TOTAL, "Total number of bytes received in requests by work handler", labels
            )
            self._response_bytes = level.create_int_counter(
                ComponentName.RESPONSE_BYTES_TOTAL, "Total number of bytes sent in responses by work handler", labels
            )
            self._errors = level.create_int_counter_vec(
                ComponentName.ERRORS_TOTAL,
                "Total number of errors in work handler processing",
                (Label.ERROR_TYPE,),
                labels,
            )
            self._cancellations = level.create_int_counter(
                ComponentName.CANCELLATION_TOTAL, "Total number of requests cancelled by work handler", labels
            )
        except UsageError as error:
            raise UsageError(f"Failed to create work handler metrics: {error}") from error

    @property
    def counters(self) -> dict[str, Counter]:
        """For who keeps plain numbers and adds them up before a scrape: `entered` and `bytes_in` are `received`, `ended_cancelled` is
        `cancelled`.
        """
        return {"entered": self._requests, "bytes_in": self._request_bytes, "ended_cancelled": self._cancellations}

    def received(self, bytes: int) -> None:
        """A request entered, before anything of it is parsed. `bytes`: its two-part payload."""
        self._requests.value += 1
        self._request_bytes.value += bytes

    def responded(self, bytes: int) -> None:
        """A flush left. `bytes`: its JSON frames, the final one included; not prologue, sentinel and framing."""
        self._response_bytes.value += bytes

    def finished(self, seconds: Collection[float]) -> None:
        """Requests ended, whichever way, each so long after it entered. Once for each `received`."""
        self._duration.observe_all(seconds)

    def failed(self, kind: WorkError) -> None:
        """A request failed. An error raised by the handler's generator is an item, and none of these."""
        self._errors.labels(kind.value).value += 1

    def cancelled(self) -> None:
        """The caller stopped or killed a request, or closed its response stream before the end. Once for each request."""
        self._cancellations.value += 1


class WorkerProcessMetrics:
    """What a worker counts as a whole: no labels, all 0 from the start. One per page; register it when the first endpoint is served.

    `queue_depth`, `active_tasks`, `engine_requests` and `queued_requests` are gauges to be entered for as long as a request is there.
    """

    __slots__ = (
        "_enqueue_rejected",
        "_first_response",
        "_permit_wait",
        "_pool_capacity",
        "_queue_capacity",
        "_rejections",
        "_transit",
        "active_tasks",
        "engine_requests",
        "queue_depth",
        "queued_requests",
    )

    def __init__(self, metrics: MetricSet) -> None:
        """Register in `metrics`, as a rule the runtime's level. Raises `UsageError` if it has them already."""
        name = WorkHandlerName
        self._transit = metrics.histogram(
            name.NETWORK_TRANSIT_SECONDS,
            "Frontend-to-backend network transit time (cross-process wall-clock, seconds)",
            NETWORK_TRANSIT_BUCKETS,
        )
        self._first_response = metrics.histogram(
            name.TIME_TO_FIRST_RESPONSE_SECONDS,
            "Backend processing time from handle_payload entry to prologue sent (seconds)",
            FIRST_RESPONSE_BUCKETS,
        )
        self.queue_depth = metrics.gauge(name.QUEUE_DEPTH, "Current items in the bounded work queue awaiting dispatcher pickup")
        self._queue_capacity = metrics.gauge(name.QUEUE_CAPACITY, "Configured capacity of the bounded work queue")
        self._enqueue_rejected = metrics.counter(
            name.ENQUEUE_REJECTED_TOTAL, "Times enqueuing work failed because the dispatcher channel was closed"
        )
        self._permit_wait = metrics.histogram(
            name.PERMIT_WAIT_SECONDS, "Time spent waiting for a worker-pool permit (seconds)", PERMIT_WAIT_BUCKETS
        )
        self.active_tasks = metrics.gauge(name.POOL_ACTIVE_TASKS, "Current number of active worker-pool tasks (permits in use)")
        self._pool_capacity = metrics.gauge(name.POOL_CAPACITY, "Configured worker-pool capacity (total permits)")
        self.engine_requests = metrics.gauge(
            name.ENGINE_REQUEST, "Current number of requests being handled by the engine (--engine-request-limit)"
        )
        self.queued_requests = metrics.gauge(
            name.REQUEST_QUEUE,
            "Current number of requests queued in Dynamo not yet in the engine (--dynamo-request-queue-limit)",
        )
        self._rejections = metrics.counter(
            name.REJECTION_REQUEST_TOTAL,
            "Requests rejected because the worker is at capacity (engine in-flight limit and Dynamo queue both full)",
        )

    def admits(self, *, pool: int = POOL_CAPACITY, queue: int = QUEUE_CAPACITY) -> None:
        """The TCP plane is served, with these limits. Without this call both show 0."""
        self._pool_capacity.set(pool)
        self._queue_capacity.set(queue)

    def arrived(self, *, sent_ns: int, received_ns: int) -> None:
        """A request that says when it was sent is here. Wall clocks in nanoseconds; a clock that is behind counts as 0."""
        self._transit.observe(max(0, received_ns - sent_ns) / 1e9)

    def first_response(self, seconds: Collection[float]) -> None:
        """Prologues were sent, each so long after its request entered; without those whose handler failed before."""
        self._first_response.observe_all(seconds)

    def waited(self, seconds: float) -> None:
        """A request got its slot after so long; not called if one was free at once."""
        self._permit_wait.observe(seconds)

    def enqueue_rejected(self) -> None:
        """A request came while the queue was closed."""
        self._enqueue_rejected.value += 1

    def rejected(self) -> None:
        """A request was refused because slots and queue are full."""
        self._rejections.value += 1


class RequestPlaneMetrics:
    """What a process counts of the requests it sends, its own internal ones included. Held by `inflight` while they are open."""

    __slots__ = (
        "_nats_errors",
        "_queue",
        "_roundtrip",
        "_send",
        "_tcp_errors",
        "_tcp_received",
        "_tcp_sent",
        "inflight",
    )

    def __init__(self, metrics: MetricSet) -> None:
        """Register in `metrics`, as a rule the frontend's. Raises `UsageError` if it has them already."""
        plane, transport = RequestPlaneName, TransportName
        self._queue = metrics.histogram(
            plane.QUEUE_SECONDS, "Time from generate() entry to send_request() (seconds)", REQUEST_PLANE_BUCKETS
        )
        self._send = metrics.histogram(
            plane.SEND_SECONDS, "Time for send_request() to complete (seconds)", REQUEST_PLANE_BUCKETS
        )
        self._roundtrip = metrics.histogram(
            plane.ROUNDTRIP_TTFT_SECONDS, "Time from send_request() to first response item (seconds)", ROUNDTRIP_BUCKETS
        )
        self.inflight = metrics.gauge(plane.INFLIGHT_REQUESTS, "Currently in-flight requests at AddressedPushRouter")
        self._tcp_sent = metrics.counter(transport.TCP_BYTES_SENT_TOTAL, "Total bytes sent by TCP request client")
        self._tcp_received = metrics.counter(transport.TCP_BYTES_RECEIVED_TOTAL, "Total bytes received by TCP request client")
        self._tcp_errors = metrics.counter(transport.TCP_ERRORS_TOTAL, "Total TCP request errors (send failure or timeout)")
        self._nats_errors = metrics.counters(
            transport.NATS_ERRORS_TOTAL, "Total NATS request errors", (Label.ERROR_TYPE,), limit=32
        )

    def queued(self, seconds: Collection[float]) -> None:
        """Requests were about to be sent, each so long after its call was made."""
        self._queue.observe_all(seconds)

    def sent(self, seconds: Collection[float]) -> None:
        """Requests were sent and acknowledged, each within so long."""
        self._send.observe_all(seconds)

    def first_item(self, seconds: Collection[float]) -> None:
        """The first items of answers came, each so long after its request was sent."""
        self._roundtrip.observe_all(seconds)

    def tcp_sent(self, bytes: int) -> None:
        """So many bytes of requests were sent over TCP."""
        self._tcp_sent.value += bytes

    def tcp_received(self, bytes: int) -> None:
        """So many bytes of acknowledgement bodies came over TCP; the reference's are empty."""
        self._tcp_received.value += bytes

    def tcp_failed(self, requests: int = 1) -> None:
        """So many requests over TCP could not be sent, or were not acknowledged in time."""
        self._tcp_errors.value += requests

    def nats_failed(self, kind: str) -> None:
        """A request over NATS failed; `kind` is e.g. `request_failed`."""
        self._nats_errors.labels(kind).value += 1
