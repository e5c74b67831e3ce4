"""Counts and times of requests, under the reference's names."""

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from stator.frontend.metrics import FrontendMetrics, RequestMeter
from stator.telemetry import MetricRegistry


def started() -> tuple[CollectorRegistry, FrontendMetrics, RequestMeter]:
    metrics = FrontendMetrics(MetricRegistry())
    return metrics.registry.prometheus, metrics, metrics.begin(model="m", endpoint="chat_completions", stream=True, now=100.0)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"dynamo_frontend_{name}", labels)


def test_first_flush_is_the_time_to_first_token() -> None:
    registry, _, meter = started()
    meter.flush(0, 100.1)
    assert value(registry, "queued_requests", model="m") == 1
    meter.flush(3, 100.5)
    assert value(registry, "queued_requests", model="m") == 0
    assert value(registry, "time_to_first_token_seconds_sum", model="m") == 0.5
    assert value(registry, "output_tokens_total", model="m") == 3
    assert value(registry, "inter_token_latency_seconds_count", model="m") == 0


def test_a_gap_is_shared_by_the_tokens_of_its_flush() -> None:
    registry, _, meter = started()
    meter.flush(1, 100.0)
    meter.flush(4, 100.4)
    meter.flush(1, 103.4)
    assert value(registry, "inter_token_latency_seconds_count", model="m") == 5
    assert abs((value(registry, "inter_token_latency_seconds_sum", model="m") or 0) - 3.4) < 1e-9
    assert value(registry, "inter_token_latency_seconds_bucket", model="m", le="0.084") == 0
    assert value(registry, "inter_token_latency_seconds_bucket", model="m", le="0.16") == 4
    assert value(registry, "inter_token_latency_seconds_bucket", model="m", le="2") == 4
    assert value(registry, "inter_token_latency_seconds_bucket", model="m", le="+Inf") == 5


def test_every_end_is_counted_by_reason() -> None:
    registry, metrics, meter = started()
    meter.end(error_type="", now=101.0)
    labels = {"model": "m", "endpoint": "chat_completions", "request_type": "stream"}
    assert value(registry, "requests_total", status="success", error_type="", **labels) == 1
    assert value(registry, "requests_started_total", **labels) == 1
    for reason in ("cancelled", "overload", "internal"):
        metrics.begin(model="m", endpoint="chat_completions", stream=True, now=0.0).end(error_type=reason, now=1.0)
        assert value(registry, "requests_total", status="error", error_type=reason, **labels) == 1
    assert value(registry, "model_cancellation_total", **labels) == 1
    assert value(registry, "model_rejection_total", model="m", endpoint="chat_completions") == 1
    assert value(registry, "disconnected_clients") == 1
    for gauge in ("active_requests", "inflight_requests", "queued_requests"):
        assert value(registry, gauge, model="m") == 0
    assert value(registry, "request_duration_seconds_count", model="m") == 4


def test_names_and_buckets_of_the_reference() -> None:
    _, metrics, _ = started()
    for reason in ("", "cancelled", "overload"):
        meter = metrics.begin(model="m", endpoint="chat_completions", stream=True, now=100.0)
        meter.flush(1, 100.0)
        meter.end(error_type=reason, now=100.0)
    families = {family.name: family for family in text_string_to_metric_families(metrics.registry.exposition().decode())}
    prefix = "dynamo_frontend_"
    wanted = {
        "requests_started": "counter",
        "requests": "counter",
        "output_tokens": "counter",
        "model_cancellation": "counter",
        "model_rejection": "counter",
        "active_requests": "gauge",
        "inflight_requests": "gauge",
        "queued_requests": "gauge",
        "disconnected_clients": "gauge",
        "request_duration_seconds": "histogram",
        "input_sequence_tokens": "histogram",
        "cached_tokens": "histogram",
        "output_sequence_tokens": "histogram",
        "time_to_first_token_seconds": "histogram",
        "inter_token_latency_seconds": "histogram",
        "stage_duration_seconds": "histogram",
    }
    assert {name: families[prefix + name].type for name in wanted} == wanted
    buckets = {
        name: [float(s.labels["le"]) for s in families[prefix + name].samples if s.name.endswith("_bucket")][:-1]
        for name in ("inter_token_latency_seconds", "request_duration_seconds", "time_to_first_token_seconds")
    }
    assert buckets["inter_token_latency_seconds"] == [
        0,
        0.0019,
        0.0035,
        0.0067,
        0.013,
        0.024,
        0.045,
        0.084,
        0.16,
        0.3,
        0.56,
        1.1,
        2,
    ]
    assert buckets["request_duration_seconds"] == [0, 2, 4, 8, 16, 32, 64, 130, 260, 510]
    assert len(buckets["time_to_first_token_seconds"]) == 18


def test_the_prefix_can_be_replaced() -> None:
    registry = MetricRegistry()
    FrontendMetrics(registry, prefix="mine").begin(model="", endpoint="completions", stream=False, now=0.0)
    labels = {"model": "unknown_model", "endpoint": "completions", "request_type": "unary"}
    assert registry.prometheus.get_sample_value("mine_requests_started_total", labels) == 1
    assert registry.prometheus.get_sample_value("mine_output_tokens_total", {"model": "unknown_model"}) == 0
