"""The page: which families, in which order, how numbers and labels are written."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from stator.errors import UsageError
from stator.telemetry import Gauge, Histogram, MetricSet
from stator.telemetry.exposition import join_texts, number_text
from stator.telemetry.metric import Family

pytestmark = pytest.mark.timeout(30)


def page(metrics: MetricSet) -> str:
    return metrics.exposition().decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_families_are_sorted_and_those_without_series_absent() -> None:
    metrics = MetricSet()
    metrics.gauge("b", "B")
    metrics.counter("a_total", "A")
    errors = metrics.counters("errors_total", "E", ("kind",))
    assert page(metrics) == "# HELP a_total A\n# TYPE a_total counter\na_total 0\n# HELP b B\n# TYPE b gauge\nb 0\n"
    errors.labels("cut").inc()
    assert page(metrics).endswith('# HELP errors_total E\n# TYPE errors_total counter\nerrors_total{kind="cut"} 1\n')
    errors.remove("cut")
    assert "errors" not in page(metrics)


def test_a_histogram_has_cumulated_buckets_then_sum_then_count() -> None:
    metrics = MetricSet()
    waits = metrics.histograms("wait", "", ("zone", "kind"), (0.00001, 0.05 + 0.1, 1))
    wait = waits.labels("z", "k")
    for value in (0.15, 1, 4.5):
        wait.observe(value)
    labels = 'kind="k",zone="z"'
    assert page(metrics).splitlines() == [
        "# TYPE wait histogram",
        f'wait_bucket{{{labels},le="0.00001"}} 0',
        f'wait_bucket{{{labels},le="0.15000000000000002"}} 1',
        f'wait_bucket{{{labels},le="1"}} 2',
        f'wait_bucket{{{labels},le="+Inf"}} 3',
        f"wait_sum{{{labels}}} 5.65",
        f"wait_count{{{labels}}} 3",
    ]


def test_series_of_one_set_are_sorted_by_label_values_and_sets_keep_their_order() -> None:
    """As captured: `publish_final` happened before `generate`."""
    first, second = MetricSet(), MetricSet()
    for metrics, kinds in ((first, ("publish_final", "generate")), (second, ("a",))):
        errors = metrics.counters("errors_total", "E", ("error_type",))
        for kind in kinds:
            errors.labels(kind).inc()
    root = MetricSet()
    root.attach(first)
    root.attach(second)
    assert [line for line in page(root).splitlines() if not line.startswith("#")] == [
        'errors_total{error_type="generate"} 1',
        'errors_total{error_type="publish_final"} 1',
        'errors_total{error_type="a"} 1',
    ]


def test_one_family_in_two_sets_has_one_head_and_the_first_of_two_equal_series(caplog: pytest.LogCaptureFixture) -> None:
    root, first, second = MetricSet(), MetricSet(), MetricSet()
    root.attach(first)
    root.attach(second)
    first.gauge("depth", "D").set(1)
    second.gauge("depth", "D").set(2)
    second.gauge("other", "O").set(3)
    for _ in range(3):
        assert page(root) == "# HELP depth D\n# TYPE depth gauge\ndepth 1\n# HELP other O\n# TYPE other gauge\nother 3\n"
    assert caplog.messages == ["Duplicate Prometheus series while merging registries; dropping later sample: depth"]
    second.gauges("rank", "R", ("dp_rank",)).labels("0")
    first.gauges("rank", "R", ("dp_rank",)).labels("0")
    page(root)
    assert caplog.messages[1:] == [
        'Duplicate Prometheus series while merging registries; dropping later sample: rank{dp_rank="0"}'
    ]
    root.detach(first)
    assert samples(page(root))[("depth", ())] == 2


@pytest.mark.parametrize("how", ["help", "type"])
def test_a_family_declared_in_two_ways_fails_the_page_and_is_named(how: str) -> None:
    root, second = MetricSet(), MetricSet()
    root.attach(second)
    root.gauge("fine", "F")
    absent = second.gauges("depth", "absent families do not count", ("x",))
    third = MetricSet()
    root.attach(third)
    root.gauge("depth", "D")
    if how == "help":
        third.gauge("depth", "other")
    else:
        third.counter("depth", "D")
    with pytest.raises(UsageError, match=r"Metric family 'depth' has inconsistent help/type across registries \(idx=2\)"):
        page(root)
    root.detach(third)
    assert ("depth", ()) in samples(page(root))
    absent.labels("1")
    with pytest.raises(UsageError, match=r"'depth' .* \(idx=1\)"):
        page(root)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (6.0, "6"),
        (1e-05, "0.00001"),
        (0.1 + 0.05, "0.15000000000000002"),
        (3.8590040979999998, "3.8590040979999998"),
        (0.05999999865889549, "0.05999999865889549"),
        (1e22, "1" + "0" * 22),
        (2**63, "9223372036854775808"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (math.nan, "NaN"),
        (True, "1"),
    ],
)
def test_numbers(number: float, text: str) -> None:
    assert number_text(number) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_reads_back_and_has_no_exponent(number: float) -> None:
    text = number_text(number)
    assert float(text) == number
    assert "e" not in text and not text.endswith(".0")
    assert Decimal(text) == Decimal(repr(number))


@given(st.lists(st.text(max_size=12), min_size=2, max_size=2), st.text(max_size=20))
def test_labels_and_help_survive_the_page(values: list[str], help: str) -> None:
    metrics = MetricSet()
    metrics.register("gauge", "x", help, Family("x", ("v",), Gauge, 10), (("c", values[0]),)).labels(values[1]).set(5)
    (family,) = text_string_to_metric_families(page(metrics))
    (sample,) = family.samples
    assert sample.labels == {"c": values[0], "v": values[1]}
    assert sample.value == 5
    assert len(page(metrics).split("\n")) == (4 if help else 3)
    if help == help.strip():
        assert family.documentation == help


def test_text_that_utf8_cannot_hold_does_not_break_the_page() -> None:
    metrics = MetricSet()
    metrics.gauges("x", "X", ("model",)).labels("a\ud800b")
    assert 'x{model="a?b"} 0' in page(metrics)


def test_texts_are_joined_with_a_newline_where_one_is_missing() -> None:
    assert join_texts(["", "a", "", "b\n", "c\n", ""]) == "a\nb\nc\n"
    assert join_texts([]) == ""


@pytest.mark.parametrize(
    ("name", "labels", "constant", "text"),
    [
        ("bad-name", (), (), "Error: 'bad-name' is not a valid metric name"),
        ("ok", ("bad-label",), (), "Error: 'bad-label' is not a valid label name"),
        ("ok", (), (("1x", ""),), "Error: '1x' is not a valid label name"),
        ("ok", ("le",), (), "Error: 'le' is not a valid label name"),
        ("ok", ("a", "a"), (), "has a label twice: a, a"),
        ("ok", ("a",), (("a", "1"),), "has a label twice: a, a"),
    ],
)
def test_wrong_names_are_refused(name: str, labels: tuple[str, ...], constant: tuple[tuple[str, str], ...], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        MetricSet().register("histogram", name, "", Family(name, labels, lambda: Histogram((1,)), 10), constant)


@pytest.mark.parametrize("bounds", [(), (1, 1), (2, 1), (1, math.inf), (math.nan,)])
def test_wrong_buckets_are_refused(bounds: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=r"metric x: bucket bounds .* must be finite and ascend"):
        MetricSet().histogram("x", "X", bounds)


def test_series_beyond_the_limit_fall_into_one() -> None:
    page = MetricSet()
    errors = page.counters("errors_total", "Errors", ("kind",), limit=3)
    for n in range(100):
        errors.labels(f"k{n}").inc()
    assert len(errors.series()) == 4
    assert 'errors_total{kind="other"} 97' in page.exposition().decode().splitlines()
    errors.labels("k0").inc()
    assert errors.labels("k0") is errors.labels("k0")
    assert 'errors_total{kind="k0"} 2' in page.exposition().decode().splitlines()
    errors.remove("k0")
    errors.remove("k0")
    assert 'kind="k0"' not in page.exposition().decode()


def test_a_series_needs_all_label_values() -> None:
    with pytest.raises(UsageError, match=r"has the labels \('a', 'b'\), got 1 values"):
        MetricSet().gauges("ok", "X", ("a", "b")).labels("1")


def test_two_sets_do_not_mix() -> None:
    first, second = MetricSet(), MetricSet()
    first.counter("only_here_total", "X").inc()
    assert second.exposition() == b""
    assert "only_here_total 1" in first.exposition().decode()
