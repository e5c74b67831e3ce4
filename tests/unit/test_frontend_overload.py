"""How fast places come free, and when a queue is no burst any more."""

import pytest

from stator.frontend.overload import Overload
from stator.frontend.service_rate import ServiceRate


def test_nothing_is_known_before_a_call_has_ended_or_while_none_runs() -> None:
    rate = ServiceRate()
    assert rate.interval(4, since=0.0, now=0.0) is None
    rate.ended(2.0, now=10.0)
    assert rate.known
    assert rate.interval(0, since=10.0, now=10.0) is None


def test_the_interval_is_the_mean_duration_over_the_number_that_runs() -> None:
    rate = ServiceRate()
    rate.ended(1.0, now=9.0)
    rate.ended(3.0, now=10.0)
    assert rate.interval(8, since=10.0, now=10.5) == pytest.approx(0.25)
    for _ in range(500):
        rate.ended(1.0, now=11.0)
    assert rate.interval(8, since=11.0, now=11.0) == pytest.approx(0.125, rel=0.01), "the latest count most"


def test_an_idle_time_tells_nothing_and_a_standstill_does() -> None:
    rate = ServiceRate()
    rate.ended(1.0, now=0.0)
    assert rate.interval(4, since=3600.0, now=3600.0) == pytest.approx(0.25), "nobody waited before"
    assert rate.interval(4, since=3600.0, now=3600.9) == pytest.approx(0.25)
    assert rate.interval(4, since=3600.0, now=3606.0) == pytest.approx(5.0), "5 s later than the next end was to be expected"


def test_calls_of_no_time_are_known_too() -> None:
    rate = ServiceRate()
    rate.ended(0.0, now=1.0)
    assert rate.interval(1, since=1.0, now=1.0) == 0.0


def look(overload: Overload, *seen: tuple[float, int], interval: float = 0.001) -> list[bool]:
    """What it says of so many that wait at such times."""
    return [overload.standing(waiting, now, interval) for now, waiting in seen]


def test_a_queue_that_grows_is_an_overload() -> None:
    overload = Overload(0.1)
    assert look(overload, (1.0, 5), (1.05, 9), (1.11, 12), (1.14, 14)) == [False] * 4, "that may be a burst"
    assert look(overload, (1.17, 15)) == [True]


def test_a_burst_that_becomes_shorter_is_none() -> None:
    overload = Overload(0.1)
    seen = [(1.0 + 0.06 * i, max(5, 60 - i)) for i in range(50)]
    assert not any(look(overload, *seen))
    assert look(overload, (4.1, 70)) == [True], "one that grows again is"


def test_a_queue_that_is_full_counts_those_that_were_refused() -> None:
    overload = Overload(0.1)
    look(overload, (1.0, 30), (1.11, 29))
    for _ in range(3):
        overload.refused()
    assert look(overload, (1.17, 28)) == [True]


def test_a_queue_that_was_short_begins_anew() -> None:
    overload = Overload(0.1)
    look(overload, (1.0, 5), (1.11, 6))
    overload.short()
    assert look(overload, (1.17, 7), (1.22, 8), (1.28, 9)) == [False] * 3


def test_few_places_tell_nothing() -> None:
    overload = Overload(0.1)
    assert look(overload, (1.0, 5), (4.9, 6), (5.0, 7), (6.9, 8), (7.1, 9), interval=0.5) == [False] * 4 + [True]


def test_it_lasts_until_nobody_was_refused_for_a_while() -> None:
    overload = Overload(0.1)
    overload.refused_for_it(2.0, 0.01)
    overload.short()
    assert look(overload, (2.3, 5), interval=0.01) == [True]
    overload.refused_for_it(2.3, 0.01)
    overload.short()
    assert look(overload, (2.6, 5), interval=0.01) == [True]
    overload.short()
    assert look(overload, (2.7, 5), interval=0.01) == [False]


def test_without_a_burst_time_queues_may_stand() -> None:
    overload = Overload(0.0)
    assert not any(look(overload, *[(1.0 + i, 5 + i) for i in range(100)]))
