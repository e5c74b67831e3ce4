"""How free text becomes a metric name or a label value."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.errors import UsageError
from stator.telemetry.names import component_metric_name, frontend_prefix, sanitize_label, sanitize_name

pytestmark = pytest.mark.timeout(30)

TEXTS = st.one_of(st.text(max_size=20), st.text("_-:9aZ", max_size=8))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("my-ns", "my_ns"),
        ("123ns", "_123ns"),
        ("9comp", "_9comp"),
        ("ep:x", "ep_x"),
        ("--x", "x"),
        ("__y", "y"),
        ("__9", "_9"),
        ("_y", "_y"),
        ("___y", "__y"),
        ("Bad", "Bad"),
        ("schön", "sch_n"),
    ],
)
def test_label_values(raw: str, shown: str) -> None:
    assert sanitize_label(raw) == shown


@pytest.mark.parametrize(("raw", "shown"), [("123metric", "_123metric"), ("a:b-c", "a:b_c"), (":a", "_:a"), ("__x", "__x")])
def test_metric_names(raw: str, shown: str) -> None:
    assert sanitize_name(raw) == shown
    assert component_metric_name(raw) == f"dynamo_component_{shown}"


@pytest.mark.parametrize("raw", ["", "@#$%", "____", "-", "é"])
def test_what_leaves_nothing_is_refused(raw: str) -> None:
    for sanitize, what in ((sanitize_label, "label value"), (sanitize_name, "metric name")):
        with pytest.raises(UsageError, match=f"cannot be a {what}"):
            sanitize(raw)


def test_a_frontend_prefix_falls_back() -> None:
    assert frontend_prefix("my-fe") == "my_fe"
    assert frontend_prefix("") == frontend_prefix("%%") == "dynamo_frontend"


@given(TEXTS)
def test_a_sanitised_name_is_a_name_and_stays_as_it_is(raw: str) -> None:
    try:
        name = sanitize_name(raw)
    except UsageError:
        assert not re.search("[a-zA-Z0-9:]", raw)
        return
    assert re.fullmatch("[a-zA-Z_][a-zA-Z0-9_:]*", name)
    assert sanitize_name(name) == name


@given(TEXTS)
def test_a_sanitised_label_value_begins_like_a_name(raw: str) -> None:
    try:
        value = sanitize_label(raw)
    except UsageError:
        assert not re.search("[a-zA-Z0-9]", raw)
        return
    assert re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", value)
    assert re.sub("[^a-zA-Z0-9]", "", value) == re.sub("[^a-zA-Z0-9]", "", raw)
