"""Settings and headers under any text: a value or a typed error, nothing else."""

from pathlib import Path
from random import Random
from typing import Annotated, Literal

from hypothesis import example, given
from hypothesis import strategies as st

from stator.config import Config, Secret, Setting, fields_of
from stator.errors import ConfigError
from stator.settings import check_names, load
from stator.telemetry import TraceContext, parse_levels, parse_traceparent


class Everything(Config, frozen=True, kw_only=True):
    section = "any"
    name: Annotated[str | None, Setting(doc="a text", dyn="DYN_SYSTEM_NAME")] = None
    count: Annotated[int, Setting(doc="a count", ge=0, dyn="DYN_RUNTIME_COUNT")] = 1
    wait: Annotated[float | None, Setting(doc="a wait", unit="s", gt=0, dyn="DYN_CANARY_WAIT_TIME")] = None
    size: Annotated[int, Setting(doc="a size", unit="bytes", ge=0, dyn="DYN_SIZE")] = 1
    on: Annotated[bool, Setting(doc="a switch", dyn="DYN_HEALTH_CHECK_ENABLED")] = False
    mode: Annotated[Literal["a", "b"], Setting(doc="a mode", dyn="DYN_MODE")] = "a"
    hosts: Annotated[tuple[str, ...], Setting(doc="hosts", dyn="DYN_SYSTEM_HOSTS")] = ()
    counts: Annotated[tuple[int, ...], Setting(doc="counts", ge=0, dyn="DYN_SYSTEM_COUNTS")] = ()
    root: Annotated[Path | None, Setting(doc="a path", dyn="DYN_ROOT")] = None
    key: Annotated[Secret | None, Setting(doc="a key", dyn="DYN_KEY")] = None


FIELDS = fields_of(Everything)
VARIABLES = [name for field in FIELDS for name in (field.variable, *field.setting.dyn_names)]
NUMBERISH = st.from_regex(r"[0-9]{0,400}(\.[0-9]{0,5})?\s?([kmgKMG]?i?[bB])?", fullmatch=True)
TEXTS = st.one_of(
    st.text(st.characters(exclude_characters="\0")), NUMBERISH, st.sampled_from(["none", "[1]", '["a"]', "1e999", "nan"])
)


@given(st.sampled_from(VARIABLES), TEXTS)
@example("STATOR_ANY_SIZE", "9" * 400 + ".5 GiB")
@example("STATOR_ANY_COUNT", "9" * 5000)
@example("DYN_SYSTEM_COUNTS", '{"a"=1}')
def test_any_value_is_read_or_refused_by_name(variable: str, text: str) -> None:
    try:
        loaded = load(Everything, env={variable: text})
    except ConfigError as error:
        assert str(error).startswith(f"{variable}=")
        return
    assert all(not field.problem(getattr(loaded, field.name)) for field in FIELDS)


@given(
    st.integers(min_value=0, max_value=2**33 - 1), st.sampled_from([("", 0), ("B", 0), ("KiB", 10), ("mib", 20), ("GiB", 30)])
)
def test_sizes_are_exact(number: int, unit: tuple[str, int]) -> None:
    assert load(Everything, env={"STATOR_ANY_SIZE": f"{number}{unit[0]}"}).size == number << unit[1]


@given(st.text(min_size=1))
def test_any_unknown_name_is_refused(name: str) -> None:
    try:
        check_names([Everything], {f"STATOR_ANY_{name}": "x"})
    except ConfigError as error:
        assert repr(f"STATOR_ANY_{name}") in str(error)
    else:
        assert f"STATOR_ANY_{name}" in {*VARIABLES, "STATOR_ANY_KEY_FILE"} or "_SERVICE_" in name or "PORT_" in name


@given(st.text())
def test_any_level_string_is_read_or_refused(text: str) -> None:
    try:
        assert "" in parse_levels(text)
    except ConfigError as error:
        assert "expected a level" in str(error)


@given(st.dictionaries(st.sampled_from(["traceparent", "tracestate", "x-request-id"]), st.text(max_size=600)), st.integers())
def test_any_headers_give_headers_that_are_valid(headers: dict[str, str], seed: int) -> None:
    span = TraceContext.receive(headers, Random(seed))
    out = span.headers()
    again = parse_traceparent(out["traceparent"])
    assert again is not None and again.trace_id == span.trace_id
    assert all(value.isascii() and value.isprintable() and len(value) <= 512 for value in out.values())


@given(st.integers(min_value=0, max_value=2**32), st.integers(min_value=0, max_value=2**32))
def test_a_trace_goes_on_through_any_number_of_hops(seed: int, other: int) -> None:
    first = TraceContext.new(Random(seed))
    second = TraceContext.receive(first.headers(), Random(other))
    assert (second.trace_id, second.parent_id, second.flags) == (first.trace_id, first.span_id, first.flags)
