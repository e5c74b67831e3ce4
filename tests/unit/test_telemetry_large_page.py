"""A page of a thousand series: exact to the last digit, and soon made."""

from random import Random
from time import perf_counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stator.telemetry import MetricsLevel

ENDPOINTS = 20
KINDS = 40
GAUGES = 10
SERIES = ENDPOINTS * (KINDS + GAUGES)
TIMES = (1e-9, 0.005, 0.0123456789, 0.3, 7.25, 10, 1e9)
LIMIT = 0.02
"""seconds a page may take"""

Numbers = dict[tuple[str, ...], float]


def labels_of(endpoint: int) -> tuple[str, ...]:
    return f"endpoint_{endpoint}", "backend", "load"


def thousand_series() -> tuple[MetricsLevel, Numbers]:
    """A root, and what its counters and gauges say by name, labels and kind; each endpoint has a histogram of `TIMES` besides."""
    random = Random(5)
    numbers: Numbers = {}
    root = MetricsLevel.runtime(worker_id=0xABCDEF)
    component = root.namespace("load").component("backend")
    for endpoint in range(ENDPOINTS):
        level = component.endpoint(f"endpoint_{endpoint}")
        requests = level.create_counter_vec("requests_total", "Requests", ["kind"])
        for kind in range(KINDS):
            numbers["dynamo_component_requests_total", *labels_of(endpoint), f'"{kind}"\\'] = number = random.randrange(2**53)
            requests.labels(f'"{kind}"\\').inc(number)
        for gauge in range(GAUGES):
            number = random.uniform(-1, 1) * 10 ** random.randint(-12, 15)
            numbers[f"dynamo_component_g{gauge}", *labels_of(endpoint), ""] = number
            level.create_gauge(f"g{gauge}", "A gauge").set(number)
        duration = level.create_histogram("duration_seconds", "Durations")
        for seconds in TIMES:
            duration.observe(seconds)
    return root, numbers


def test_every_number_of_a_thousand_series_is_exact() -> None:
    root, numbers = thousand_series()
    assert len(numbers) == SERIES
    found: Numbers = {}
    buckets: Numbers = {}
    for family in text_string_to_metric_families(root.exposition().decode()):
        for sample in family.samples:
            assert sample.labels["worker_id"] == "abcdef"
            names = tuple(sample.labels[f"dynamo_{name}"] for name in ("endpoint", "component", "namespace"))
            if family.type == "histogram":
                buckets[sample.name, *names, sample.labels.get("le", "")] = sample.value
            else:
                found[sample.name, *names, sample.labels.get("kind", "")] = sample.value
    assert found == numbers
    for endpoint in range(ENDPOINTS):
        ends = {le: value for (name, *rest, le), value in buckets.items() if le and tuple(rest) == labels_of(endpoint)}
        assert (ends["0.005"], ends["0.025"], ends["0.5"], ends["10"], ends["+Inf"]) == (2, 3, 4, 6, 7)
        assert buckets["dynamo_component_duration_seconds_sum", *labels_of(endpoint), ""] == sum(TIMES)
        assert buckets["dynamo_component_duration_seconds_count", *labels_of(endpoint), ""] == len(TIMES)


def test_a_page_changes_with_its_numbers_alone() -> None:
    root, _ = thousand_series()
    first = root.exposition()
    assert root.exposition() == first
    root.create_gauge("late", "A gauge").set(1)
    assert len(root.exposition().splitlines()) == len(first.splitlines()) + 3


@pytest.mark.load
def test_a_page_of_a_thousand_series_takes_at_most_twenty_milliseconds() -> None:
    root, _ = thousand_series()
    took: list[float] = []
    for _ in range(20):
        began = perf_counter()
        root.exposition()
        took.append(perf_counter() - began)
    assert sorted(took)[len(took) // 2] <= LIMIT
