"""Limits per minute, on a clock that stands still."""

import pytest

from stator.frontend.rate_headers import duration, rate_headers
from stator.frontend.token_bucket import TokenBucket


def test_a_minutes_worth_at_once_and_then_the_rate() -> None:
    bucket = TokenBucket(60, 100.0)
    assert all(bucket.take(1, 100.0) for _ in range(60))
    assert not bucket.take(1, 100.0)
    assert bucket.wait(1, 100.0) == pytest.approx(1.0)
    assert not bucket.take(1, 100.9)
    assert bucket.take(1, 101.0)
    assert bucket.until_full(101.0) == pytest.approx(60)


def test_it_never_holds_more_than_a_minutes_worth() -> None:
    bucket = TokenBucket(60, 0.0)
    assert bucket.level(10_000.0) == 60
    assert not bucket.take(61, 10_000.0)
    assert bucket.wait(61, 10_000.0) == float("inf")


def test_debts_are_paid_back_first() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.charge(90, 0.0)
    assert bucket.level(0.0) == -30
    assert not bucket.take(1, 29.0)
    assert bucket.wait(1, 0.0) == pytest.approx(31)
    assert bucket.take(1, 31.0)


def test_what_is_given_back_does_not_exceed_the_capacity() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.take(10, 0.0)
    bucket.give_back(10, 5.0)
    assert bucket.level(5.0) == 60


def test_less_than_one_per_minute_still_lets_one_through() -> None:
    bucket = TokenBucket(0.5, 0.0)
    assert bucket.take(1, 0.0)
    assert not bucket.take(1, 119.0)
    assert bucket.take(1, 120.0)


def test_another_limit_keeps_what_was_used_and_makes_no_debts() -> None:
    bucket = TokenBucket(100, 0.0)
    bucket.take(30, 0.0)
    bucket.relimit(200, 0.0)
    assert bucket.level(0.0) == 170
    bucket.relimit(20, 0.0)
    assert bucket.level(0.0) == 0
    bucket.charge(5, 0.0)
    bucket.relimit(10, 0.0)
    assert bucket.level(0.0) == -5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.0171, "18ms"),
        (0.9999, "1s"),
        (1.5, "1.5s"),
        (59.9, "59.9s"),
        (60.0, "1m0s"),
        (360.0, "6m0s"),
        (3661.25, "1h1m1.25s"),
    ],
)
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_headers() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.charge(10.5, 0.0)
    assert rate_headers("tokens", bucket, 0.0) == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "49",
        "x-ratelimit-reset-tokens": "10.5s",
    }
    bucket.charge(100, 0.0)
    assert rate_headers("tokens", bucket, 0.0)["x-ratelimit-remaining-tokens"] == "0"
