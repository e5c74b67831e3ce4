"""Whatever is asked and when: never more than the limit and one burst in any span of time."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.frontend.errors import Rejected
from stator.frontend.key_account import Grant, KeyAccount
from stator.frontend.key_file import KeyRecord
from stator.frontend.key_metrics import KeyMetrics
from stator.frontend.token_bucket import TokenBucket
from stator.telemetry import MetricSet

pytestmark = pytest.mark.timeout(120)

gaps = st.floats(min_value=0.0, max_value=200.0, allow_nan=False)
EPSILON = 1e-6


def worst_excess(given_away: list[tuple[float, float]], rate: float) -> float:
    """The largest of: what was given in a span, less `rate` times the span; over all spans that begin and end with a gift."""
    worst = running = 0.0
    before = None
    for at, amount in given_away:
        refilled = 0.0 if before is None else (at - before) * rate
        running = max(running - refilled, 0.0) + amount
        worst, before = max(worst, running), at
    return worst


@given(
    per_minute=st.integers(1, 10_000),
    steps=st.lists(st.tuples(gaps, st.floats(min_value=0.1, max_value=500.0)), max_size=60),
)
@settings(max_examples=200, deadline=None)
def test_no_span_gets_more_than_its_share_and_one_burst(per_minute: int, steps: list[tuple[float, float]]) -> None:
    now = 1000.0
    bucket = TokenBucket(per_minute, now)
    taken: list[tuple[float, float]] = []
    for gap, amount in steps:
        now += gap
        if bucket.take(amount, now):
            taken.append((now, amount))
        else:
            assert bucket.level(now) < amount
    assert worst_excess(taken, per_minute / 60) <= bucket.capacity * (1 + EPSILON) + EPSILON


@given(
    per_minute=st.integers(1, 10_000),
    steps=st.lists(st.tuples(gaps, st.floats(min_value=0.1, max_value=2000.0)), min_size=1, max_size=60),
)
@settings(max_examples=200, deadline=None)
def test_debts_are_paid_before_anything_is_taken(per_minute: int, steps: list[tuple[float, float]]) -> None:
    """Charged whenever the level is above nothing, it gives away one charge more than a bucket that refuses."""
    now = 1000.0
    bucket = TokenBucket(per_minute, now)
    charged: list[tuple[float, float]] = []
    for gap, amount in steps:
        now += gap
        if bucket.level(now) > 0:
            bucket.charge(amount, now)
            charged.append((now, amount))
    largest = max(amount for _, amount in steps)
    assert worst_excess(charged, per_minute / 60) <= (bucket.capacity + largest) * (1 + EPSILON)


@given(
    per_minute=st.integers(1, 5000),
    amount=st.floats(min_value=0.5, max_value=5000.0),
    used=st.floats(min_value=0.0, max_value=20_000.0),
)
@settings(max_examples=200, deadline=None)
def test_after_the_wait_it_is_there(per_minute: int, amount: float, used: float) -> None:
    bucket = TokenBucket(per_minute, 0.0)
    bucket.charge(used, 0.0)
    wait = bucket.wait(amount, 0.0)
    if wait == float("inf"):
        assert amount > bucket.capacity
        return
    assert wait < 1e-3 or not bucket.take(amount, wait * 0.99)
    assert bucket.take(amount, wait + 0.001)


@given(
    limits=st.lists(st.integers(1, 10_000), min_size=2, max_size=10),
    steps=st.lists(st.tuples(gaps, st.floats(min_value=0.1, max_value=50.0)), min_size=1, max_size=10),
)
@settings(max_examples=200, deadline=None)
def test_changing_the_limit_gives_no_more_than_the_larger_one(limits: list[int], steps: list[tuple[float, float]]) -> None:
    now = 0.0
    bucket = TokenBucket(limits[0], now)
    taken: list[tuple[float, float]] = []
    for (gap, amount), limit in zip(steps, limits[1:] * len(steps), strict=False):
        now += gap
        if bucket.take(amount, now):
            taken.append((now, amount))
        bucket.relimit(limit, now)
        assert bucket.level(now) <= bucket.capacity
    top = max(limits)
    # A limit that goes up and down again may add its difference each time.
    ups = sum(max(0, after - before) for before, after in pairwise(limits[1:] * len(steps)))
    assert worst_excess(taken, top / 60) <= (top + ups) * (1 + EPSILON)


_calls = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), gaps, st.integers(0, 300)),
        st.tuples(st.just("generate"), gaps, st.integers(1, 50)),
        st.tuples(st.just("end"), gaps, st.integers(0, 1)),
    ),
    max_size=80,
)


@given(calls=_calls, rpm=st.integers(1, 50), tpm=st.integers(1, 2000), concurrent=st.integers(1, 4), shares=st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_an_account_keeps_all_its_limits(
    calls: list[tuple[str, float, int]], rpm: int, tpm: int, concurrent: int, shares: int
) -> None:
    record = KeyRecord(
        name="a", digest=bytes(32), requests_per_minute=rpm, tokens_per_minute=tpm, concurrent_requests=concurrent
    )
    now = 0.0
    account = KeyAccount(record, shares=shares, counters=KeyMetrics(MetricSet()).of("a"), now=now)
    running: list[Grant] = []
    begun: list[tuple[float, float]] = []
    prompts: list[tuple[float, float]] = []
    for what, gap, number in calls:
        now += gap
        if what == "begin":
            try:
                grant = account.begin(now)
            except Rejected as error:
                assert error.failure.status == 429
                continue
            running.append(grant)
            begun.append((now, 1.0))
            try:
                grant.prompt(number, now)
            except Rejected:
                continue
            prompts.append((now, number))
        elif running and what == "generate":
            running[-1].generated(number, now)
        elif running:
            running.pop().end(now, for_nothing=False)
        assert account.running == len(running) <= max(1, concurrent // shares)
    assert worst_excess(begun, rpm / shares / 60) <= max(1.0, rpm / shares) + EPSILON
    assert worst_excess(prompts, tpm / shares / 60) <= max(1.0, tpm / shares) + EPSILON
