"""The metric tree: what is counted, what is refused, and the page that comes out."""

import logging
from collections.abc import Callable

import pytest
from prometheus_client import REGISTRY
from prometheus_client import Counter as ForeignCounter
from prometheus_client.parser import text_string_to_metric_families

from stator.errors import UsageError
from stator.telemetry import MetricRegistry


def page(registry: MetricRegistry) -> str:
    return registry.exposition().decode()


def samples(registry: MetricRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(page(registry))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_levels_carry_their_labels_and_families_are_joined() -> None:
    root = MetricRegistry({"worker_id": "2f7d"})
    endpoint = root.child(dynamo_namespace="demo").child(dynamo_endpoint="generate")
    other = root.child(dynamo_namespace="demo").child(dynamo_endpoint="embed")
    for level, times in ((endpoint, 3), (other, 1)):
        level.counter("stator_requests_total", "Requests").inc(times)
    root.gauge("stator_uptime_seconds", "Uptime").set(1.5)
    above = {"dynamo_namespace": "demo", "worker_id": "2f7d"}
    expected = {("stator_requests_total", "generate"): 3, ("stator_requests_total", "embed"): 1}
    assert samples(root) == {
        **{
            (name, tuple(sorted({**above, "dynamo_endpoint": which}.items()))): value
            for (name, which), value in expected.items()
        },
        ("stator_uptime_seconds", (("worker_id", "2f7d"),)): 1.5,
    }
    assert page(root).count("# TYPE stator_requests_total counter") == 1
    assert page(root).index("stator_requests_total") < page(root).index("stator_uptime_seconds")


def test_a_histogram_is_cumulative_with_bounds_as_the_reference_prints_them() -> None:
    root = MetricRegistry()
    histogram = root.histogram("stator_wait_seconds", "Wait", (0.00001, 0.5, 1, 10))
    for value in (0.5, 0.6, 99):
        histogram.observe(value)
    histogram.observe(0.000001, times=4)
    assert page(root).splitlines() == [
        "# HELP stator_wait_seconds Wait",
        "# TYPE stator_wait_seconds histogram",
        'stator_wait_seconds_bucket{le="0.00001"} 4.0',
        'stator_wait_seconds_bucket{le="0.5"} 5.0',
        'stator_wait_seconds_bucket{le="1"} 6.0',
        'stator_wait_seconds_bucket{le="10"} 6.0',
        'stator_wait_seconds_bucket{le="+Inf"} 7.0',
        "stator_wait_seconds_sum 100.100004",
        "stator_wait_seconds_count 7.0",
    ]


def test_asking_again_gives_the_same_number() -> None:
    root = MetricRegistry()
    assert root.child(a="1") is root.child(a="1") is not root.child(a="2")
    assert root.counter("x_total", "X") is root.counter("x_total", "X")
    errors = root.counters("errors_total", "Errors", ["kind"])
    assert errors.labels("cut") is errors.labels("cut") is not errors.labels("late")
    gauge = root.gauge("depth", "Depth")
    gauge.inc(5)
    gauge.dec(2)
    assert samples(root)[("depth", ())] == 3


def test_a_family_without_series_is_absent() -> None:
    root = MetricRegistry()
    errors = root.counters("errors_total", "Errors", ["kind"])
    assert page(root) == ""
    errors.labels("cut").inc()
    assert samples(root) == {("errors_total", (("kind", "cut"),)): 1}
    errors.remove("cut")
    assert page(root) == ""


def test_series_beyond_the_limit_fall_into_one() -> None:
    root = MetricRegistry()
    errors = root.counters("errors_total", "Errors", ["kind"], limit=3)
    for n in range(100):
        errors.labels(f"k{n}").inc()
    assert len(errors.series()) == 4
    assert samples(root)[("errors_total", (("kind", "other"),))] == 97
    errors.labels("k0").inc()
    assert samples(root)[("errors_total", (("kind", "k0"),))] == 2


def test_a_reading_is_asked_at_each_scrape_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    root = MetricRegistry()
    numbers = iter([1, 2])
    root.reading("sent_total", "Sent", lambda: next(numbers), kind="counter")
    root.reading("broken", "Broken", lambda: 1 / 0)
    assert samples(root) == {("sent_total", ()): 1}
    assert samples(root) == {("sent_total", ()): 2}
    with caplog.at_level(logging.ERROR):
        assert page(root) == ""
    assert "metric broken cannot be read" in caplog.messages


def test_a_removed_level_leaves_the_page_and_a_new_one_starts_at_nought() -> None:
    root = MetricRegistry()
    level = root.child(endpoint="a")
    level.counter("x_total", "X").inc()
    level.child(part="b").counter("x_total", "X").inc()
    level.remove()
    level.remove()
    assert page(root) == ""
    root.child(endpoint="a").counter("x_total", "X")
    assert samples(root) == {("x_total", (("endpoint", "a"),)): 0}


def test_two_registries_and_the_global_one_do_not_mix() -> None:
    first, second = MetricRegistry(), MetricRegistry()
    first.counter("only_here_total", "X").inc()
    assert page(second) == ""
    assert REGISTRY.get_sample_value("only_here_total") is None


def test_a_foreign_collector_joins_the_page() -> None:
    root = MetricRegistry()
    ForeignCounter("engine_steps", "Steps", registry=root.prometheus).inc()
    assert samples(root)[("engine_steps_total", ())] == 1


def test_label_values_are_escaped() -> None:
    root = MetricRegistry({"model": 'a"b\\c\nd'})
    root.gauge("x", "X")
    assert samples(root) == {("x", (("model", 'a"b\\c\nd'),)): 0}


@pytest.mark.parametrize(
    ("declare", "text"),
    [
        (lambda r: r.counter("requests", "X"), "counters end in _total"),
        (lambda r: r.gauge("requests_total", "X"), "counters end in _total"),
        (lambda r: r.gauge("bad-name", "X"), "'bad-name' is not a metric name"),
        (lambda r: r.gauges("ok", "X", ["bad-label"]), "'bad-label' is not a label name"),
        (lambda r: r.gauges("ok", "X", ["le"]), "'le' is not a label name"),
        (lambda r: r.gauges("ok", "X", ["__ok"]), "is not a label name"),
        (lambda r: r.gauges("ok", "X", ["worker_id"]), "'worker_id' is set by a level above"),
        (lambda r: r.child(worker_id="2"), "'worker_id' is set by a level above"),
        (lambda r: r.histogram("ok", "X", (1, 1)), "must be finite and ascend"),
        (lambda r: r.histogram("ok", "X", ()), "must be finite and ascend"),
        (lambda r: r.histogram("ok", "X", (1, float("inf"))), "must be finite and ascend"),
        (lambda r: (r.gauge("ok", "X"), r.child(a="1").gauge("ok", "Y")), "declared differently elsewhere"),
        (lambda r: (r.gauge("ok", "X"), r.child(a="1").histogram("ok", "X", (1,))), "declared differently elsewhere"),
        (lambda r: (r.gauges("ok", "X", ["a"]), r.gauges("ok", "X", ["b"])), "with other labels"),
        (lambda r: (r.gauge("ok", "X"), r.reading("ok", "X", lambda: 1)), "exists at this level already"),
        (lambda r: r.gauges("ok", "X", ["a", "b"]).labels("1"), r"has the labels \('a', 'b'\), got 1 values"),
    ],
)
def test_wrong_declarations_are_refused(declare: Callable[[MetricRegistry], object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        declare(MetricRegistry({"worker_id": "1"}))
