"""The budget of bytes that all streams of a process share."""

import pytest

from stator.errors import Overloaded
from stator.protocol.native.budget import ByteBudget

KIB = 1024


def test_windows_shrink_as_the_budget_fills() -> None:
    budget = ByteBudget(total=4096 * KIB, most=256 * KIB, least=16 * KIB)
    windows = [budget.window() for _ in range(300)]
    assert windows[0] == 256 * KIB
    assert set(windows) == {256 * KIB, 64 * KIB, 16 * KIB}
    assert windows == sorted(windows, reverse=True)


@pytest.mark.parametrize("streams", [1, 100, 5000])
def test_what_is_out_is_the_total_and_a_least_window_for_each(streams: int) -> None:
    budget = ByteBudget(total=1024 * KIB, most=256 * KIB, least=16 * KIB)
    windows = [budget.window() for _ in range(streams)]
    assert budget.out == sum(windows) <= 1024 * KIB + 16 * KIB * streams
    for window in windows:
        budget.give(window)
    assert budget.out == 0
    assert budget.window() == 256 * KIB


def test_no_window_is_smaller_than_the_least() -> None:
    assert ByteBudget(total=2**20, most=20_000, least=16 * KIB).window() == 20_000
    budget = ByteBudget(total=2**20, most=1000, least=16 * KIB)
    assert budget.window() == 16 * KIB


def test_requests_are_refused_when_there_is_no_space() -> None:
    budget = ByteBudget(total=100)
    budget.take(60)
    with pytest.raises(Overloaded, match="60 of 100 bytes are in use"):
        budget.take(41)
    assert budget.out == 60
    budget.take(40)
    budget.give(100)
    assert budget.out == 0


def test_windows_count_against_requests() -> None:
    budget = ByteBudget(total=300 * KIB, most=256 * KIB)
    budget.window()
    with pytest.raises(Overloaded):
        budget.take(100 * KIB)
