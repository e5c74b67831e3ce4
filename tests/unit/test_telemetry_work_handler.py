"""What a worker and a client count: a page that the reference showed, byte by byte, and the page after each event."""

from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stator.errors import UsageError
from stator.telemetry import (
    MetricSet,
    MetricsLevel,
    RequestPlaneMetrics,
    WorkerProcessMetrics,
    WorkError,
    WorkHandlerMetrics,
)

pytestmark = pytest.mark.timeout(30)

LABELS = 'dynamo_component="backend",dynamo_endpoint="generate",dynamo_namespace="demo",model="m1",worker_id="7611310a8a77bb3d"'
DURATION = "0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 20 30 60 120 300 600"
TRANSIT = "0.0001 0.0005 0.001 0.005 0.01 0.05 0.1 0.5 1"
PERMIT = "0.0001 0.001 0.01 0.05 0.1 0.5 1 5 10 30 60"
FIRST = "0.001 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30 60"
ROUNDTRIP = "0.001 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5"


def plain(name: str, kind: str, help: str, labels: str, value: str = "0") -> str:
    shown = f"{{{labels}}}" if labels else ""
    return f"# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{shown} {value}\n"


def histogram(name: str, help: str, labels: str, bounds: str) -> str:
    shown, inner = (f"{{{labels}}}", f"{labels},") if labels else ("", "")
    buckets = "".join(f'{name}_bucket{{{inner}le="{bound}"}} 0\n' for bound in (*bounds.split(), "+Inf"))
    return f"# HELP {name} {help}\n# TYPE {name} histogram\n{buckets}{name}_sum{shown} 0\n{name}_count{shown} 0\n"


CAPTURED = "".join(
    (
        plain("dynamo_component_cancellation_total", "counter", "Total number of requests cancelled by work handler", LABELS),
        plain(
            "dynamo_component_inflight_requests",
            "gauge",
            "Number of requests currently being processed by work handler",
            LABELS,
        ),
        plain(
            "dynamo_component_request_bytes_total",
            "counter",
            "Total number of bytes received in requests by work handler",
            LABELS,
        ),
        histogram(
            "dynamo_component_request_duration_seconds", "Time spent processing requests by work handler", LABELS, DURATION
        ),
        plain("dynamo_component_requests_total", "counter", "Total number of requests processed by work handler", LABELS),
        plain(
            "dynamo_component_response_bytes_total",
            "counter",
            "Total number of bytes sent in responses by work handler",
            LABELS,
        ),
        plain(
            "dynamo_component_uptime_seconds",
            "gauge",
            "Total uptime of the DistributedRuntime in seconds",
            'worker_id="7611310a8a77bb3d"',
            "1.055097025",
        ),
        plain(
            "dynamo_engine_request",
            "gauge",
            "Current number of requests being handled by the engine (--engine-request-limit)",
            "",
        ),
        plain(
            "dynamo_rejection_request_total",
            "counter",
            "Requests rejected because the worker is at capacity (engine in-flight limit and Dynamo queue both full)",
            "",
        ),
        plain(
            "dynamo_request_queue",
            "gauge",
            "Current number of requests queued in Dynamo not yet in the engine (--dynamo-request-queue-limit)",
            "",
        ),
        plain(
            "dynamo_work_handler_enqueue_rejected_total",
            "counter",
            "Times enqueuing work failed because the dispatcher channel was closed",
            "",
        ),
        histogram(
            "dynamo_work_handler_network_transit_seconds",
            "Frontend-to-backend network transit time (cross-process wall-clock, seconds)",
            "",
            TRANSIT,
        ),
        histogram(
            "dynamo_work_handler_permit_wait_seconds", "Time spent waiting for a worker-pool permit (seconds)", "", PERMIT
        ),
        plain(
            "dynamo_work_handler_pool_active_tasks",
            "gauge",
            "Current number of active worker-pool tasks (permits in use)",
            "",
        ),
        plain("dynamo_work_handler_pool_capacity", "gauge", "Configured worker-pool capacity (total permits)", "", "10000"),
        plain("dynamo_work_handler_queue_capacity", "gauge", "Configured capacity of the bounded work queue", "", "40000"),
        plain(
            "dynamo_work_handler_queue_depth",
            "gauge",
            "Current items in the bounded work queue awaiting dispatcher pickup",
            "",
        ),
        histogram(
            "dynamo_work_handler_time_to_first_response_seconds",
            "Backend processing time from handle_payload entry to prologue sent (seconds)",
            "",
            FIRST,
        ),
    )
)
"""of a worker of the reference that served demo.backend.generate and was not called yet (without its executor's own gauges)"""


def endpoint(root: MetricsLevel, name: str = "generate") -> MetricsLevel:
    return root.namespace("demo").component("backend").endpoint(name)


def samples(metrics: MetricSet) -> dict[str, float]:
    """By name, with `error_type` if there is one; buckets left out."""
    return {
        sample.name + "".join(f"/{sample.labels[label]}" for label in ("error_type",) if label in sample.labels): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def changes(metrics: MetricSet, event: Callable[[], object]) -> dict[str, float]:
    """Which samples `event` changed, and by how much."""
    before = samples(metrics)
    event()
    return {name: value - before.get(name, 0) for name, value in samples(metrics).items() if value != before.get(name)}


def test_the_page_of_a_worker_is_the_one_of_the_reference() -> None:
    root = MetricsLevel.runtime(worker_id=0x7611310A8A77BB3D)
    WorkHandlerMetrics(endpoint(root), [("model", "m1")])
    WorkerProcessMetrics(root).admits()
    root.create_gauge("uptime_seconds", "Total uptime of the DistributedRuntime in seconds").set(1.055097025)
    assert root.exposition().decode() == CAPTURED


def test_a_request_that_went_well() -> None:
    level = endpoint(MetricsLevel.runtime(worker_id=1))
    metrics = WorkHandlerMetrics(level)
    frames = [b'{"data":{"data":{"i":%d}},"complete_final":false}' % n for n in range(3)] + [b'{"complete_final":true}']
    inside: list[float] = []

    def request() -> None:
        metrics.received(373)
        with metrics.inflight:
            inside.append(metrics.inflight.value)
            for flush in (frames[:2], frames[2:]):
                metrics.responded(sum(map(len, flush)))
        metrics.finished((0.25,))

    before = samples(level)
    assert before.keys() - {"dynamo_component_errors_total"} == before.keys() and set(before.values()) == {0}
    assert changes(level, request) == {
        "dynamo_component_requests_total": 1,
        "dynamo_component_request_bytes_total": 373,
        "dynamo_component_response_bytes_total": 167,
        "dynamo_component_request_duration_seconds_sum": 0.25,
        "dynamo_component_request_duration_seconds_count": 1,
    }
    assert inside == [1]


@pytest.mark.parametrize("kind", list(WorkError))
def test_a_failure_is_counted_by_its_kind(kind: WorkError) -> None:
    level = endpoint(MetricsLevel.runtime())
    metrics = WorkHandlerMetrics(level)
    assert "errors_total" not in level.exposition().decode()
    assert changes(level, lambda: metrics.failed(kind)) == {f"dynamo_component_errors_total/{kind.value}": 1}
    assert changes(level, metrics.cancelled) == {"dynamo_component_cancellation_total": 1}


def test_the_gauge_is_back_at_zero_after_a_failure() -> None:
    metrics = WorkHandlerMetrics(endpoint(MetricsLevel.runtime()))
    with pytest.raises(ValueError, match="boom"), metrics.inflight:
        raise ValueError("boom")
    assert metrics.inflight.value == 0


def test_two_endpoints_of_a_component_are_two_series_of_one_family() -> None:
    component = MetricsLevel.runtime(worker_id=1).namespace("demo").component("backend")
    for name in ("generate", "embed"):
        WorkHandlerMetrics(component.endpoint(name)).received(1)
    page = component.exposition().decode()
    assert page.count("# HELP dynamo_component_requests_total ") == page.count("# TYPE dynamo_component_requests_total ") == 1
    family = {f.name: f for f in text_string_to_metric_families(page)}["dynamo_component_requests"]
    assert [sample.labels["dynamo_endpoint"] for sample in family.samples] == ["generate", "embed"]


def test_serving_an_endpoint_twice_shows_the_first_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    component = MetricsLevel.runtime(worker_id=1).namespace("demo").component("backend")
    first, second = (WorkHandlerMetrics(component.endpoint("generate")) for _ in range(2))
    first.received(10)
    second.received(20)
    for _ in range(2):
        assert samples(component)["dynamo_component_request_bytes_total"] == 10
    (message,) = caplog.messages
    assert message.startswith("Duplicate Prometheus series while merging registries; dropping later sample: dynamo_component_")
    assert message.endswith(" and 1 more")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([("a", "1"), ("a", "2")], "Duplicate label key 'a' found in labels"),
        ([("worker_id", "1")], "Label 'worker_id' is automatically added"),
        ([("bad-label", "1")], "Error: 'bad-label' is not a valid label name"),
        ([("error_type", "1")], "has a label twice"),
    ],
)
def test_wrong_labels_fail_the_serving(labels: list[tuple[str, str]], reason: str) -> None:
    with pytest.raises(UsageError, match=f"Failed to create work handler metrics: .*{reason}"):
        WorkHandlerMetrics(endpoint(MetricsLevel.runtime()), labels)


def test_events_of_a_worker_process() -> None:
    metrics = MetricSet()
    process = WorkerProcessMetrics(metrics)
    assert set(samples(metrics).values()) == {0}
    work = "dynamo_work_handler_"
    assert changes(metrics, lambda: process.admits(pool=2, queue=1)) == {
        f"{work}pool_capacity": 2,
        f"{work}queue_capacity": 1,
    }
    assert changes(metrics, lambda: process.arrived(sent_ns=10**18, received_ns=10**18 + 250_000_000)) == {
        f"{work}network_transit_seconds_sum": 0.25,
        f"{work}network_transit_seconds_count": 1,
    }
    assert changes(metrics, lambda: process.arrived(sent_ns=2, received_ns=1)) == {f"{work}network_transit_seconds_count": 1}
    assert changes(metrics, lambda: process.first_response((0.5,))) == {
        f"{work}time_to_first_response_seconds_sum": 0.5,
        f"{work}time_to_first_response_seconds_count": 1,
    }
    assert changes(metrics, lambda: process.waited(0.5)) == {
        f"{work}permit_wait_seconds_sum": 0.5,
        f"{work}permit_wait_seconds_count": 1,
    }
    assert changes(metrics, process.enqueue_rejected) == {f"{work}enqueue_rejected_total": 1}
    assert changes(metrics, process.rejected) == {"dynamo_rejection_request_total": 1}
    before = samples(metrics)
    with process.queue_depth, process.active_tasks, process.engine_requests, process.queued_requests:
        within = {name for name, value in samples(metrics).items() if value == before[name] + 1}
    assert within == {f"{work}queue_depth", f"{work}pool_active_tasks", "dynamo_engine_request", "dynamo_request_queue"}
    assert samples(metrics) == before


def test_events_of_a_client_process() -> None:
    metrics = MetricSet()
    plane = RequestPlaneMetrics(metrics)
    assert set(samples(metrics).values()) == {0}
    for event, name in (
        (plane.queued, "queue_seconds"),
        (plane.sent, "send_seconds"),
        (plane.first_item, "roundtrip_ttft_seconds"),
    ):
        full = f"dynamo_request_plane_{name}"
        assert changes(metrics, lambda event=event: event((0.5, 0.25))) == {f"{full}_sum": 0.75, f"{full}_count": 2}
    assert changes(metrics, lambda: plane.tcp_sent(100)) == {"dynamo_transport_tcp_bytes_sent_total": 100}
    assert changes(metrics, lambda: plane.tcp_received(7)) == {"dynamo_transport_tcp_bytes_received_total": 7}
    assert changes(metrics, plane.tcp_failed) == {"dynamo_transport_tcp_errors_total": 1}
    assert "nats" not in metrics.exposition().decode()
    assert changes(metrics, lambda: plane.nats_failed("request_failed")) == {
        "dynamo_transport_nats_errors_total/request_failed": 1
    }
    with plane.inflight:
        assert samples(metrics)["dynamo_request_plane_inflight_requests"] == 1
    assert samples(metrics)["dynamo_request_plane_inflight_requests"] == 0
    page = metrics.exposition().decode()
    for name, bounds in (("queue_seconds", TRANSIT), ("send_seconds", TRANSIT), ("roundtrip_ttft_seconds", ROUNDTRIP)):
        prefix = f'dynamo_request_plane_{name}_bucket{{le="'
        shown = [line.removeprefix(prefix).partition('"')[0] for line in page.splitlines() if line.startswith(prefix)]
        assert shown == [*bounds.split(), "+Inf"]


def test_statics_are_registered_once() -> None:
    for statics in (WorkerProcessMetrics, RequestPlaneMetrics):
        metrics = MetricSet()
        statics(metrics)
        with pytest.raises(UsageError, match="Failed to register metric"):
            statics(metrics)
