"""Config structs: types, ranges, cross-field rules and secrets."""

import copy
import pickle
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from stator.config import Config, Secret, Setting, fields_of, parse_text
from stator.errors import ConfigError


class Sample(Config, frozen=True, kw_only=True):
    section = "sample"
    name: Annotated[str, Setting(doc="a name")] = "x"
    port: Annotated[int, Setting(doc="a port", ge=0, le=65535)] = 0
    wait: Annotated[float | None, Setting(doc="a wait", unit="s", gt=0)] = None
    limit: Annotated[int, Setting(doc="a limit", unit="bytes", ge=1)] = 1024
    on: Annotated[bool, Setting(doc="a switch")] = False
    mode: Annotated[Literal["json", "msgpack"], Setting(doc="a codec")] = "json"
    hosts: Annotated[tuple[str, ...], Setting(doc="hosts")] = ()
    ports: Annotated[tuple[int, ...], Setting(doc="ports", ge=1)] = ()
    root: Annotated[Path | None, Setting(doc="a path")] = None
    token: Annotated[Secret | None, Setting(doc="a token")] = None


FIELDS = {field.name: field for field in fields_of(Sample)}


def test_defaults_and_names() -> None:
    sample = Sample(wait=3, hosts=("a", "b"), root=Path("/x"))
    assert (sample.wait, sample.hosts, sample.mode) == (3, ("a", "b"), "json")
    assert FIELDS["port"].variable == "STATOR_SAMPLE_PORT"
    assert FIELDS["port"].key == "sample.port"
    assert FIELDS["token"].keys == ("sample.token", "sample.token_file")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"port": 70000}, "Sample.port = 70000: expected a whole number from 0 to 65535"),
        ({"port": True}, "Sample.port = True: expected a whole number from 0 to 65535"),
        ({"port": "80"}, "Sample.port = '80': expected a whole number from 0 to 65535"),
        ({"wait": 0.0}, "Sample.wait = 0.0: expected a number of seconds > 0, or none"),
        ({"wait": float("inf")}, "Sample.wait = inf: expected a number of seconds > 0, or none"),
        ({"wait": float("nan")}, "Sample.wait = nan: expected a number of seconds > 0, or none"),
        ({"limit": 0}, "Sample.limit = 0: expected a whole number of bytes ≥ 1"),
        ({"on": 1}, "Sample.on = 1: expected true or false"),
        ({"mode": "xml"}, "Sample.mode = 'xml': expected one of json, msgpack"),
        ({"hosts": "a,b"}, "Sample.hosts = 'a,b': expected a comma-separated list, each a text"),
        ({"ports": (1, 0)}, "Sample.ports = (1, 0): expected a comma-separated list, each a whole number ≥ 1"),
        ({"root": "/x"}, "Sample.root = '/x': expected a path, or none"),
        ({"token": "hunter22"}, "Sample.token = ***: expected a secret text, or none"),
        ({"name": None}, "Sample.name = None: expected a text"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(values: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sample(**values)  # type: ignore[arg-type] - wrong on purpose
    assert str(caught.value) == text


def test_cross_field_rules_run_when_the_struct_is_built() -> None:
    class Range(Config, frozen=True, kw_only=True):
        low: Annotated[int, Setting(doc="lower end")] = 0
        high: Annotated[int, Setting(doc="upper end")] = 1

        def check(self) -> None:
            if self.low > self.high:
                raise ConfigError(f"low = {self.low} is above high = {self.high}")

    with pytest.raises(ConfigError, match="low = 2 is above high = 1"):
        Range(low=2)


def test_a_field_without_setting_or_of_another_type_is_a_programming_error() -> None:
    class Plain(Config, frozen=True, kw_only=True):
        port: int = 0

    class Wrong(Config, frozen=True, kw_only=True):
        table: Annotated[dict[str, int] | None, Setting(doc="no")] = None

    with pytest.raises(TypeError, match=r"Plain\.port needs Annotated"):
        Plain()
    with pytest.raises(TypeError, match=r"Wrong\.table"):
        Wrong()


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("name", " a b ", "a b"),
        ("name", "none", "none"),
        ("port", "80", 80),
        ("wait", "1.5", 1.5),
        ("wait", "None", None),
        ("limit", "64KiB", 65536),
        ("limit", "1.5 MiB", 3 * 2**19),
        ("limit", "2gib", 2**31),
        ("limit", "17", 17),
        ("on", "Yes", True),
        ("on", "off", False),
        ("hosts", "a, b,,c", ("a", "b", "c")),
        ("ports", "1,2", (1, 2)),
        ("root", "/x/y", Path("/x/y")),
        ("token", "abc", Secret("abc")),
    ],
)
def test_texts_are_read_by_type(field: str, text: str, value: object) -> None:
    assert parse_text(FIELDS[field], text) == value


@pytest.mark.parametrize(
    ("field", "text"),
    [("port", "http"), ("wait", "soon"), ("limit", "3 parsecs"), ("limit", "0.3 KiB"), ("on", "maybe"), ("ports", "1,x")],
)
def test_texts_without_value_raise(field: str, text: str) -> None:
    with pytest.raises(ValueError):
        parse_text(FIELDS[field], text)


def test_plain_reading_is_the_references() -> None:
    assert parse_text(FIELDS["on"], "maybe", plain=True) is False
    assert parse_text(FIELDS["on"], "TRUE", plain=True) is True
    with pytest.raises(ValueError):
        parse_text(FIELDS["limit"], "1KiB", plain=True)


def test_a_secret_never_shows_itself() -> None:
    secret = Secret("swordfish")
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r}", "%s" % secret, repr(Sample(token=secret)), str([secret])]  # noqa: UP031
    assert not any("swordfish" in text for text in shown)
    for leak in (pickle.dumps, copy.copy, copy.deepcopy, msgspec.json.encode):
        with pytest.raises(TypeError):
            leak(secret)
    assert secret.reveal() == "swordfish"
    assert secret == Secret("swordfish") and secret != Secret("marlin") and secret != "swordfish"
    assert len({secret, Secret("swordfish")}) == 1
    assert secret and not Secret("")
