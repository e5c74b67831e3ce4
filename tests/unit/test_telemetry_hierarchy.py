"""Levels, their labels, what may be created on them, and callbacks."""

import logging
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Counter as ForeignCounter
from prometheus_client.parser import text_string_to_metric_families

from stator.errors import UsageError
from stator.telemetry import Gauge, IntCounter, IntGauge, MetricSet, MetricsLevel

pytestmark = pytest.mark.timeout(30)

WORKER = 10597004269669717547


def endpoint(root: MetricsLevel, name: str = "generate") -> MetricsLevel:
    return root.namespace("demo").component("backend").endpoint(name)


def lines(metrics: MetricSet) -> list[str]:
    return [line for line in metrics.exposition().decode().splitlines() if not line.startswith("#")]


def test_each_level_adds_its_label() -> None:
    root = MetricsLevel.runtime(worker_id=WORKER)
    namespace = root.namespace("my-ns")
    component = namespace.component("9comp")
    last = component.endpoint("ep:x")
    for name, level in (("a", root), ("b", namespace), ("c", component), ("d", last)):
        level.create_gauge(name, "x")
    worker = 'worker_id="93101f3ce8f6162b"'
    assert lines(root) == [
        f"dynamo_component_a{{{worker}}} 0",
        f'dynamo_component_b{{dynamo_namespace="my_ns",{worker}}} 0',
        f'dynamo_component_c{{dynamo_component="_9comp",dynamo_namespace="my_ns",{worker}}} 0',
        f'dynamo_component_d{{dynamo_component="_9comp",dynamo_endpoint="ep_x",dynamo_namespace="my_ns",{worker}}} 0',
    ]
    assert lines(component) == lines(root)[2:]
    assert MetricsLevel.runtime(worker_id=13366794063150353).auto_labels() == {"worker_id": "2f7d0743eb7d11"}


def test_empty_names_give_no_label() -> None:
    root = MetricsLevel.runtime()
    root.namespace("").component("c").create_counter("x", "x")
    assert lines(root) == ['dynamo_component_x{dynamo_component="c"} 0']


def test_a_nested_namespace_keeps_the_outer_label() -> None:
    inner = MetricsLevel.runtime(worker_id=1).namespace("outer").namespace("inner")
    assert inner.component("c").auto_labels() == {"dynamo_namespace": "outer", "dynamo_component": "c", "worker_id": "1"}


@pytest.mark.parametrize(
    "down",
    [
        lambda root: root.component("c"),
        lambda root: root.endpoint("e"),
        lambda root: root.namespace("n").endpoint("e"),
        lambda root: root.namespace("n").component("c").namespace("n"),
        lambda root: root.namespace("n").component("c").component("c"),
        lambda root: endpoint(root).endpoint("e"),
    ],
)
def test_levels_have_one_order(down: Callable[[MetricsLevel], object]) -> None:
    with pytest.raises(UsageError, match="go down one step at a time"):
        down(MetricsLevel.runtime())


def test_all_kinds_are_on_the_page_and_a_vec_only_with_a_series() -> None:
    level = MetricsLevel.runtime()
    labels = [("model", 'a"b\\c\nd'), ("empty", "")]
    level.create_counter("c_total", "x", labels).inc(0.5)
    level.create_int_counter("ic_total", "x", labels).inc(2)
    level.create_gauge("g", "x", labels).set(-1.5)
    level.create_int_gauge("ig", "x", labels).set(3)
    level.create_histogram("h", "x", labels).observe(0.02)
    level.create_histogram("hb", "x", labels, buckets=[1, 2])
    families = [
        level.create_counter_vec("cv_total", "x", ["kind"], labels),
        level.create_int_counter_vec("icv_total", "x", ["kind"], labels),
        level.create_gauge_vec("gv", "x", ["kind"], labels),
        level.create_int_gauge_vec("igv", "x", ["kind"], labels),
    ]
    assert "kind" not in level.exposition().decode()
    for family in families:
        family.labels("k").inc(4)
    found = {
        sample.name.removeprefix("dynamo_component_"): sample.value
        for family in text_string_to_metric_families(level.exposition().decode())
        for sample in family.samples
        if sample.labels.pop("le", "0.025") in ("0.025", "2")
        and (sample.labels.pop("kind", "k"), sample.labels) == ("k", dict(labels))
    }
    numbers = {"c_total": 0.5, "ic_total": 2, "g": -1.5, "ig": 3, "cv_total": 4, "icv_total": 4, "gv": 4, "igv": 4}
    histograms = {"h_bucket": 1, "h_sum": 0.02, "h_count": 1, "hb_bucket": 0, "hb_sum": 0, "hb_count": 0}
    assert found == numbers | histograms
    types = [line.rpartition(" ")[2] for line in level.exposition().decode().splitlines() if line.startswith("# TYPE")]
    assert sorted(types) == ["counter"] * 4 + ["gauge"] * 4 + ["histogram"] * 2


X = [("a", "1")]


@pytest.mark.parametrize(
    ("create", "text"),
    [
        (lambda level: level.create_counter("", "x", [*X, *X]), "Duplicate label key 'a' found in labels"),
        (lambda level: level.create_counter("@", "x", [("worker_id", "1")]), "'@' cannot be a metric name"),
        (
            lambda level: level.create_counter_vec("x", "x", ["worker_id"], [("dynamo_namespace", "1")]),
            "Label 'dynamo_namespace' is automatically added by auto-label injection and cannot be manually set",
        ),
        (
            lambda level: level.create_counter("x", "x", [("worker_id", "1")]),
            "Label 'worker_id' is automatically added by auto-label injection and cannot be manually set",
        ),
        (
            lambda level: level.create_counter_vec("x", "x", ["worker_id"], [("bad-label", "1")]),
            "Variable label name 'worker_id' conflicts with auto-injected const label and cannot be used",
        ),
        (lambda level: level.create_counter("x", "x", [("bad-label", "1")]), "Error: 'bad-label' is not a valid label name"),
        (lambda level: level.create_gauge_vec("x", "x", ["bad-label"]), "Error: 'bad-label' is not a valid label name"),
        (lambda level: level.create("gauge", "x", "x", buckets=[1]), "buckets belong to a histogram, not to gauge"),
        (lambda level: level.create("int_gauge_vec", "x", "x"), "int_gauge_vec needs label names"),
        (lambda level: level.create_counter_vec("x", "x", []), "counter_vec needs label names"),
        (
            lambda level: level.create("histogram", "x", "x", label_names=["a"]),
            "label names belong to a vec, not to histogram",
        ),
        (lambda level: level.create_histogram("x", "x", buckets=[2, 1]), "must be finite and ascend"),
        (lambda level: level.create_counter_vec("x", "x", ["a"], X), "has a label twice"),
    ],
)
def test_wrong_metrics_are_refused_and_leave_nothing(create: Callable[[MetricsLevel], object], text: str) -> None:
    level = endpoint(MetricsLevel.runtime(worker_id=1))
    with pytest.raises(UsageError, match=text):
        create(level)
    level.create_counter("x", "x")
    assert len(lines(level)) == 1


def test_a_name_that_cannot_be_a_label_fails_when_a_metric_is_created() -> None:
    level = MetricsLevel.runtime().namespace("@#$%")
    with pytest.raises(UsageError, match="'@#\\$%' cannot be a label value"):
        level.create_counter("x", "x")


def test_the_same_metric_twice_at_one_level_is_an_error_and_at_two_levels_is_not() -> None:
    root = MetricsLevel.runtime(worker_id=1)
    level = endpoint(root)
    level.create_counter("x", "x", X)
    for again in (lambda: level.create_counter("x", "x", X), lambda: level.create_counter_vec("x", "x", ["kind"], X)):
        with pytest.raises(UsageError, match="Failed to register metric: 'dynamo_component_x' with these labels"):
            again()
    level.create_counter("x", "x", [("a", "2")])
    for other in (
        lambda: level.create_counter("x", "y", [("a", "3")]),
        lambda: level.create_gauge("x", "x", [("a", "3")]),
        lambda: level.create_counter("x", "x", [("b", "3")]),
    ):
        with pytest.raises(UsageError, match=r"Failed to register metric: .* has other help, type or label names"):
            other()
    endpoint(root, "other").create_counter("x", "x", X)
    assert len(lines(root)) == 3


def test_int_metrics_take_whole_numbers() -> None:
    level = MetricsLevel.runtime()
    counter, gauge = level.create_int_counter("c_total", "x"), level.create_int_gauge("g", "x")
    assert isinstance(counter, IntCounter) and isinstance(gauge, IntGauge)
    for wrong in (
        lambda: counter.inc(0.5),
        lambda: counter.inc(-1),
        lambda: gauge.set(1.5),
        lambda: gauge.inc(0.5),
        lambda: gauge.dec(0.5),
    ):
        with pytest.raises(UsageError, match="whole numbers"):
            wrong()
    gauge.set(5)
    gauge.inc(2)
    gauge.dec()
    counter.inc()
    assert (counter.value, gauge.value) == (1, 6)


def test_a_gauge_that_is_entered_is_back_where_it_was() -> None:
    gauge = Gauge()
    with gauge:
        with pytest.raises(ValueError, match="boom"), gauge:
            assert gauge.value == 2
            raise ValueError("boom")
        assert gauge.value == 1
    assert gauge.value == 0


def test_a_child_is_attached_once_and_can_be_taken_away() -> None:
    root, child = MetricSet(), MetricSet()
    child.counter("x_total", "X")
    calls: list[int] = []
    child.on_update(lambda: calls.append(1))
    for _ in range(2):
        root.attach(child)
    child.attach(root)
    other = MetricSet()
    other.attach(child)
    root.attach(other)
    assert lines(root) == ["x_total 0"]
    assert calls == [1]
    root.detach(child)
    root.detach(other)
    root.detach(other)
    assert lines(root) == []


def test_a_removed_level_takes_what_is_below_along(caplog: pytest.LogCaptureFixture) -> None:
    root = MetricsLevel.runtime()
    component = root.namespace("n").component("c")
    first, second = component.endpoint("e"), component.endpoint("e")
    for value, level in ((1, first), (2, second)):
        level.create_gauge("x", "x").set(value)
    labels = '{dynamo_component="c",dynamo_endpoint="e",dynamo_namespace="n"}'
    assert lines(root) == [f"dynamo_component_x{labels} 1"]
    assert len(caplog.messages) == 1
    first.remove()
    first.remove()
    assert lines(root) == [f"dynamo_component_x{labels} 2"]
    component.remove()
    root.remove()
    assert lines(root) == []


def test_updates_run_before_the_page_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    root = MetricsLevel.runtime()
    uptime = root.create_gauge("uptime_seconds", "x")
    lower = endpoint(root)

    def fail() -> None:
        raise ValueError("no clock")

    root.on_update(fail)
    undo = lower.on_update(lambda: uptime.set(uptime.value + 1))
    with caplog.at_level(logging.ERROR):
        assert lines(root) == ["dynamo_component_uptime_seconds 1"]
    assert caplog.messages == ["update callback raised"]
    undo()
    undo()
    assert lines(root) == ["dynamo_component_uptime_seconds 1"]


def test_texts_are_appended_as_they_are_and_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    root = MetricsLevel.runtime()
    lower = endpoint(root)
    root.create_counter("requests_total", "X")
    again = "# HELP dynamo_component_requests_total again\ndynamo_component_requests_total 7"

    def fail() -> str:
        raise ValueError("engine is gone")

    undo = lower.on_exposition(lambda: again)
    root.on_exposition(fail)
    root.on_exposition(lambda: b"bytes")  # type: ignore[arg-type,return-value]  # what users do
    root.on_exposition(lambda: "")
    root.on_exposition(lambda: "no_newline 1")
    own = "# HELP dynamo_component_requests_total X\n# TYPE dynamo_component_requests_total counter\n"
    own += "dynamo_component_requests_total 0\n"
    with caplog.at_level(logging.ERROR):
        assert root.exposition().decode() == f"{own}no_newline 1\n{again}"
    assert caplog.messages == ["expfmt callback raised"] * 2
    undo()
    assert root.exposition().decode() == f"{own}no_newline 1"


def test_the_metrics_of_an_engine_join_the_page() -> None:
    foreign = CollectorRegistry()
    ForeignCounter("engine_steps", "Steps", registry=foreign).inc()
    root = MetricsLevel.runtime()
    endpoint(root).on_exposition(lambda: generate_latest(foreign).decode())
    root.create_gauge("x", "X")
    families = {family.name: family for family in text_string_to_metric_families(root.exposition().decode())}
    assert families.keys() >= {"dynamo_component_x", "engine_steps"}
    assert families["engine_steps"].samples[0].value == 1


def test_a_metric_without_variable_labels_is_on_the_page_at_once() -> None:
    level = MetricsLevel.runtime()
    level.create("gauge", "x", "X")
    assert lines(level) == ["dynamo_component_x 0"]
