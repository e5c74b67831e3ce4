"""A histogram is told many values at once as it would be one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.telemetry.metric import Histogram

BOUNDS = (0.0, 0.005, 0.01, 0.5, 1.0, 10.0)
values = st.lists(st.one_of(st.sampled_from(BOUNDS), st.floats(min_value=-1, max_value=100)), max_size=50)


@given(values, values)
def test_many_values_at_once_are_noted_like_each_alone(first: list[float], second: list[float]) -> None:
    together, alone = Histogram(BOUNDS), Histogram(BOUNDS)
    for some in (first, second):
        before = list(some)
        together.observe_all(some)
        assert some == before
        for value in some:
            alone.observe(value)
    assert together.counts == alone.counts
    assert together.total == pytest.approx(alone.total)
