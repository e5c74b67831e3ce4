"""Counts and times of requests, under the reference's names."""

from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stator.frontend.metrics import FrontendMetrics, RequestMeter
from stator.llm.card import RuntimeConfig, WorkerType
from stator.llm.openai import parse_chat, parse_completion
from stator.llm.prompt_timing import PromptTiming
from stator.llm.served import ServedModel
from stator.telemetry import MetricSet
from stator.testing.fake_models import FakeEngine, FakeModels
from stator.testing.frontend_kit import page_sample
from stator.testing.manual_clock import ManualClock

PROMPT = 12


class Timing:
    """As if a prompt had been prepared: 2 ms for the template, 3 ms for its tokens."""

    template: float | None = 0.002
    tokenize: float | None = 0.003


def echo() -> ServedModel:
    models = FakeModels()
    models.add("echo", FakeEngine())
    return models.models()[0]


def prepared(meter: RequestMeter, timing: Any = None) -> RequestMeter:
    meter.prompt(PROMPT, 0.006, timing or Timing())
    return meter


def started() -> tuple[FrontendMetrics, FrontendMetrics, RequestMeter]:
    metrics = FrontendMetrics(MetricSet(), ManualClock())
    return metrics, metrics, prepared(metrics.begin(model="m", endpoint="chat_completions", stream=True, now=100.0))


def value(metrics: FrontendMetrics, name: str, **labels: str) -> float:
    return page_sample(metrics.page.exposition().decode(), f"dynamo_frontend_{name}", **labels)


def test_first_flush_is_the_time_to_first_token() -> None:
    registry, _, meter = started()
    meter.flush(0, 100.1)
    assert value(registry, "queued_requests", model="m") == 1
    meter.flush(3, 100.5)
    assert value(registry, "queued_requests", model="m") == 0
    assert value(registry, "time_to_first_token_seconds_sum", model="m") == 0.5
    assert value(registry, "output_tokens_total", model="m") == 3
    assert value(registry, "inter_token_latency_seconds_count", model="m") == 2
    assert value(registry, "inter_token_latency_seconds_sum", model="m") == 0


def test_a_gap_is_shared_by_the_tokens_of_its_flush() -> None:
    registry, _, meter = started()
    meter.flush(1, 100.0)
    meter.flush(4, 100.4)
    meter.flush(1, 103.4)
    assert value(registry, "inter_token_latency_seconds_count", model="m") == 5
    assert abs(value(registry, "inter_token_latency_seconds_sum", model="m") - 3.4) < 1e-9
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
        meter = prepared(metrics.begin(model="m", endpoint="chat_completions", stream=True, now=100.0))
        meter.flush(1, 100.0)
        meter.end(error_type=reason, now=100.0)
    families = {family.name: family for family in text_string_to_metric_families(metrics.page.exposition().decode())}
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
    page = MetricSet()
    metrics = FrontendMetrics(page, ManualClock(), prefix="mine-own")
    prepared(metrics.begin(model="m", endpoint="completions", stream=False, now=0.0))
    text = page.exposition().decode()
    labels = {"model": "m", "endpoint": "completions", "request_type": "unary"}
    assert page_sample(text, "mine_own_requests_started_total", **labels) == 1
    assert "# TYPE mine_own_output_tokens_total counter" in text
    assert "# TYPE dynamo_frontend_stage_duration_seconds histogram" in text


def test_a_model_that_is_not_served_has_no_series_of_answers() -> None:
    metrics = FrontendMetrics(MetricSet(), ManualClock())
    metrics.begin(model="", endpoint="completions", stream=False, now=0.0).end(error_type="not_found", now=1.0)
    page = metrics.page.exposition().decode()
    assert page_sample(page, "dynamo_frontend_request_duration_seconds_count", model="unknown_model") == 1
    for family in ("input_sequence_tokens", "output_sequence_tokens", "output_tokens_total", "time_to_first_token_seconds"):
        assert f"dynamo_frontend_{family}" not in page


def test_a_request_that_failed_before_its_first_token_has_no_length() -> None:
    metrics, _, meter = started()
    meter.end(error_type="internal", now=101.0)
    assert value(metrics, "output_sequence_tokens_count", model="m") == 0
    assert value(metrics, "input_sequence_tokens_sum", model="m") == PROMPT


def test_preparing_is_a_stage_with_parts() -> None:
    metrics, _, meter = started()
    with meter.preparing():
        assert value(metrics, "stage_requests", stage="preprocess", phase="") == 1
    assert value(metrics, "stage_requests", stage="preprocess", phase="") == 0
    assert value(metrics, "stage_duration_seconds_sum", stage="preprocess") == 0.006
    assert value(metrics, "template_seconds_sum") == 0.002
    assert value(metrics, "tokenize_seconds_sum") == 0.003
    assert value(metrics, "tokenizer_latency_ms_sum", operation="tokenize") == pytest.approx(3)
    meter.detokenized(9, 0.0015)
    lines = metrics.page.exposition().decode().splitlines()  # counters without `_total`, which a parser would add
    assert "dynamo_frontend_detokenize_total_us 1500" in lines
    assert "dynamo_frontend_detokenize_token_count 9" in lines
    assert value(metrics, "tokenizer_latency_ms_sum", operation="detokenize") == pytest.approx(1.5)


def test_template_and_tokens_are_timed_apart() -> None:
    served = echo()
    readings = iter(range(100))

    def now() -> float:
        return float(next(readings))

    chat = PromptTiming(now)
    built = served.preprocessor.chat(parse_chat(b'{"model":"echo","messages":[{"role":"user","content":"hi"}]}'), chat)
    assert (
        built.token_ids
        == served.preprocessor.chat(parse_chat(b'{"model":"echo","messages":[{"role":"user","content":"hi"}]}')).token_ids
    )
    assert (chat.template, chat.tokenize) == (1.0, 1.0)
    text = PromptTiming(now)
    served.preprocessor.completion(parse_completion(b'{"model":"echo","prompt":"hi"}'), "hi", text)
    assert (text.template, text.tokenize) == (None, 1.0)
    ready = PromptTiming(now)
    served.preprocessor.completion(parse_completion(b'{"model":"echo","prompt":[1,2]}'), [1, 2], ready)
    assert (ready.template, ready.tokenize) == (None, None)


def test_each_worker_shows_what_it_did_last_until_it_is_gone() -> None:
    metrics, _, meter = started()
    meter.answered(2**63 + 5, WorkerType.AGGREGATED, 0.25)
    meter.flush(1, 100.5)
    meter.flush(2, 101.5)
    meter.end(error_type="", now=102.0)
    labels = {"worker_id": str(2**63 + 5), "dp_rank": "none", "worker_type": "decode"}
    assert value(metrics, "worker_last_time_to_first_token_seconds", **labels) == 0.5
    assert value(metrics, "worker_last_input_sequence_tokens", **labels) == PROMPT
    assert value(metrics, "worker_last_inter_token_latency_seconds", **labels) == 0.5
    assert value(metrics, "stage_duration_seconds_sum", stage="transport_roundtrip") == 0.25
    metrics.follow(list)
    assert "worker_last" not in metrics.page.exposition().decode()


def test_cards_are_on_the_page() -> None:
    metrics = FrontendMetrics(MetricSet(), ManualClock())
    served = echo()
    card = msgspec.structs.replace(served.card, runtime_config=RuntimeConfig(context_length=99, max_num_seqs=7))
    models = [msgspec.structs.replace(served, card=card)]
    metrics.follow(lambda: models)
    assert value(metrics, "model_context_length", model="echo") == 99
    assert value(metrics, "model_kv_cache_block_size", model="echo") == card.kv_cache_block_size
    assert value(metrics, "model_max_num_seqs", model="echo") == 7
    assert "model_total_kv_blocks" not in metrics.page.exposition().decode()
    models.clear()
    assert value(metrics, "model_context_length", model="echo") == 99


def test_the_log_gets_a_summary() -> None:
    _, metrics, meter = started()
    assert meter.summary(100.25) == {"input_tokens": PROMPT, "output_tokens": 0, "duration_ms": 250.0}
    meter.flush(1, 100.5)
    meter.flush(2, 101.5)
    expected = {"input_tokens": PROMPT, "output_tokens": 3, "ttft_ms": 500.0, "avg_itl_ms": 500.0, "duration_ms": 2000.0}
    assert meter.summary(102.0) == expected
    bare = metrics.begin(model="", endpoint="completions", stream=False, now=0.0)
    assert bare.summary(1.0) == {"output_tokens": 0, "duration_ms": 1000.0}
