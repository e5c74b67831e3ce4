"""How many retries are allowed."""

import pytest

from stator.errors import ConnectFailed, EngineError, Overloaded, StreamIncomplete, Timeout
from stator.routing import Attempts, RetryBudget


def spend_all(budget: RetryBudget, now: float) -> int:
    count = 0
    while budget.spend(now):
        count += 1
    return count


def test_it_starts_with_ten_seconds_of_the_rate() -> None:
    assert spend_all(RetryBudget(0.0), 0.0) == 100


def test_an_idle_client_earns_ten_a_second() -> None:
    budget = RetryBudget(0.0)
    spend_all(budget, 0.0)
    assert [spend_all(budget, float(second)) for second in range(1, 6)] == [pytest.approx(10, abs=1)] * 5


def test_requests_earn_a_fifth_each() -> None:
    budget = RetryBudget(0.0, rate=0.0)
    for n in range(1000):
        budget.count_request(n / 1000)
    assert spend_all(budget, 1.0) == pytest.approx(200, abs=10)
    assert spend_all(budget, 100.0) == 0


def test_savings_are_bounded_by_ten_seconds_earned() -> None:
    budget = RetryBudget(0.0)
    for n in range(100_000):
        budget.count_request(n / 1000)
    assert budget.balance(100.0) == pytest.approx(100 + 2000, rel=0.06)
    assert budget.balance(10_000.0) == pytest.approx(100)


def test_a_steady_client_may_retry_a_fifth_plus_ten_a_second() -> None:
    budget = RetryBudget(0.0)
    spend_all(budget, 0.0)
    allowed = 0
    for n in range(60_000):
        now = n / 1000
        budget.count_request(now)
        allowed += budget.spend(now)
    assert allowed == pytest.approx(60_000 * 0.2 + 60 * 10, rel=0.02)


def test_time_that_stands_still_earns_nothing() -> None:
    budget = RetryBudget(5.0)
    assert spend_all(budget, 4.0) == 100


def test_attempts_try_each_instance_once_and_remember() -> None:
    attempts = Attempts(RetryBudget(0.0))
    assert attempts.again(1, ConnectFailed("no"), 0.0)
    assert attempts.again(2, Timeout("late", phase="connect"), 0.0)
    assert attempts.tried == {1, 2}


def test_at_most_sixteen_attempts() -> None:
    attempts = Attempts(RetryBudget(0.0))
    assert [attempts.again(n, Overloaded("full"), 0.0) for n in range(1, 17)] == [True] * 15 + [False]


def test_what_cannot_be_retried_is_not() -> None:
    attempts = Attempts(RetryBudget(0.0))
    assert not attempts.again(1, StreamIncomplete("cut"), 0.0)
    assert not attempts.again(2, EngineError("ValueError: no"), 0.0)


def test_overload_and_uncharged_refusals_cost_nothing() -> None:
    budget = RetryBudget(0.0, ratio=0.0, rate=0.1)
    assert Attempts(budget).again(1, ConnectFailed("no"), 0.0)
    assert not Attempts(budget).again(1, ConnectFailed("no"), 0.0)
    assert Attempts(budget).again(1, Overloaded("full"), 0.0)
    assert Attempts(budget).again(1, ConnectFailed("draining"), 0.0, charged=False)
