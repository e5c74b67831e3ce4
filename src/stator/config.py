"""What a config struct is: typed fields that know their unit, range and names, checked when the struct is built.

    class TcpConfig(Config, frozen=True, kw_only=True):
        section = "tcp"
        port: Annotated[int, Setting(doc="request port; 0: any free one", dyn="DYN_TCP_RPC_PORT", ge=0, le=65535)] = 0

declares the variable `STATOR_TCP_PORT`, the key `port` of the file's table `[tcp]` and the argument `port`. Nothing is
read here: `stator.settings.load` fills the structs. A field's type is one of str, int, float, bool, Path, Secret, a Literal
of strings, a `tuple[…, ...]` of those, or one of them `| None`.
"""

import hmac
import math
import re
import types
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from stator.errors import ConfigError

__all__ = ["Config", "Field", "Secret", "Setting", "fields_of", "parse_text"]

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(b|kib|mib|gib)?", re.IGNORECASE)
_SCALE = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Secret:
    """A string that does not show itself: not in `repr`, `str`, logs, pickles or copies. Only `reveal()` gives it away."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself; hand it to the one call that needs it."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)" if self._value else "Secret('')"

    def __str__(self) -> str:
        return "***"

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __reduce__(self) -> str:
        raise TypeError("a Secret is neither pickled nor copied")


_KINDS: dict[object, str] = {str: "str", int: "int", float: "float", bool: "bool", Path: "path", Secret: "secret"}


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What the type of a field cannot say.

    `unit` is "s" (seconds), "bytes" (texts may end in KiB, MiB, GiB) or anything worth showing. `ge`, `gt`, `le`, `lt` bound
    numbers, and each element of a tuple of numbers.

    `dyn` names the reference's variables for the same thing; the first one set wins. `dyn_read` turns their text into a value
    where the reference's spelling differs; it raises `ValueError` with a text for the user. `on_bad_dyn` is what a bad value
    does: "default" warns and goes on as if unset, "error" raises; "reference" raises in the blocks the reference validates
    as a whole (`spec/25 §1.1`) and warns elsewhere. An empty value counts as unset unless `dyn_empty` is "value".
    """

    doc: str
    unit: str = ""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    dyn: str | tuple[str, ...] = ()
    dyn_read: Callable[[str], object] | None = None
    on_bad_dyn: Literal["reference", "default", "error"] = "reference"
    dyn_empty: Literal["unset", "value"] = "unset"

    @property
    def dyn_names(self) -> tuple[str, ...]:
        """The reference's variables, most important first."""
        return (self.dyn,) if isinstance(self.dyn, str) else self.dyn


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One field of a config struct, as read from its annotation."""

    name: str
    section: str
    kind: str
    """"str", "int", "float", "bool", "path", "secret" or "choice"; of each element if `many`"""
    many: bool
    optional: bool
    choices: tuple[str, ...]
    default: Any
    """`msgspec.NODEFAULT` if a value must be given"""
    setting: Setting

    @property
    def variable(self) -> str:
        """`STATOR_<SECTION>_<FIELD>`, or `STATOR_<FIELD>` without a section."""
        return "_".join(("STATOR", *filter(None, (self.section,)), self.name)).upper()

    @property
    def key(self) -> str:
        """Where the file has it, as `table.key`."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def keys(self) -> tuple[str, ...]:
        """`key`, and for a secret the key of the file that may hold it."""
        return (self.key, f"{self.key}_file") if self.kind == "secret" else (self.key,)

    def expectation(self) -> str:
        """What a value must be, for people."""
        text = self._one()
        if self.many:
            text = f"a comma-separated list, each {text}"
        return f"{text}, or none" if self.optional else text

    def problem(self, value: object) -> str:
        """Why `value` is not allowed here; "" if it is."""
        if value is None and self.optional:
            return ""
        if self.many:
            fits = isinstance(value, tuple) and all(map(self._fits, cast(tuple[object, ...], value)))
        else:
            fits = self._fits(value)
        return "" if fits else f"expected {self.expectation()}"

    def shown(self, value: object) -> str:
        """`value` for messages; a secret stays one."""
        return "***" if self.kind == "secret" else repr(value)

    def _one(self) -> str:
        setting = self.setting
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        if self.kind not in ("int", "float"):
            return {"bool": "true or false", "path": "a path", "secret": "a secret text"}.get(self.kind, "a text")
        noun = "a whole number" if self.kind == "int" else "a number"
        if setting.unit:
            noun += f" of {'seconds' if setting.unit == 's' else setting.unit}"
        if setting.ge is not None and setting.le is not None:
            return f"{noun} from {self.number(setting.ge)} to {self.number(setting.le)}"
        signs = (("≥", setting.ge), (">", setting.gt), ("≤", setting.le), ("<", setting.lt))
        return " ".join((noun, " and ".join(f"{sign} {self.number(end)}" for sign, end in signs if end is not None))).rstrip()

    def number(self, value: float) -> str:
        """`value` for people: sizes in the largest unit that has it whole, no exponents."""
        if self.setting.unit == "bytes":
            for unit in ("GiB", "MiB", "KiB"):
                if value and value % _SCALE[unit.lower()] == 0:
                    return f"{int(value) // _SCALE[unit.lower()]} {unit}"
        return str(int(value)) if value == int(value) else str(value)

    def _fits(self, value: object) -> bool:
        match self.kind:
            case "str":
                return isinstance(value, str)
            case "bool":
                return isinstance(value, bool)
            case "path":
                return isinstance(value, Path)
            case "secret":
                return isinstance(value, Secret)
            case "choice":
                return value in self.choices
            case "int":
                return isinstance(value, int) and not isinstance(value, bool) and self._in_range(value)
            case _:
                return isinstance(value, int | float) and not isinstance(value, bool) and self._in_range(value)

    def _in_range(self, value: float) -> bool:
        setting = self.setting
        return (
            (abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value))
            and (setting.ge is None or value >= setting.ge)
            and (setting.gt is None or value > setting.gt)
            and (setting.le is None or value <= setting.le)
            and (setting.lt is None or value < setting.lt)
        )


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every config struct. `section` is the middle of the variable names and the file's table; structs may share it.

    Subclasses repeat `frozen=True, kw_only=True`. Building one raises `ConfigError` naming field, value and what is allowed.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in fields_of(type(self)):
            value = getattr(self, field.name)
            if problem := field.problem(value):
                raise ConfigError(f"{type(self).__name__}.{field.name} = {field.shown(value)}: {problem}")
        self.check()

    def check(self) -> None:
        """Rules between fields; override it and raise `ConfigError` naming the fields."""


@cache
def fields_of(config: type[Config]) -> tuple[Field, ...]:
    """The fields of `config` in order. `TypeError` for a field without `Setting` or of a type no setting can have."""
    hints = get_type_hints(config, include_extras=True)
    return tuple(_field(config, field.name, hints[field.name], field.default) for field in msgspec.structs.fields(config))


def _field(config: type[Config], name: str, hint: Any, default: object) -> Field:
    setting = None
    if get_origin(hint) is Annotated:
        setting = next((extra for extra in hint.__metadata__ if isinstance(extra, Setting)), None)
        hint = hint.__origin__
    if setting is None:
        raise TypeError(f"{config.__name__}.{name} needs Annotated[…, Setting(doc=…)]")
    hint, optional = _without_none(hint)
    many = get_origin(hint) is tuple and get_args(hint)[1:] == (...,)
    one: Any = get_args(hint)[0] if many else hint
    choices: tuple[object, ...] = get_args(one) if get_origin(one) is Literal else ()
    kind = "choice" if choices else _KINDS.get(one, "")
    if not kind or not all(isinstance(choice, str) for choice in choices):
        raise TypeError(f"{config.__name__}.{name}: {hint} is not a type a setting can have")
    return Field(
        name=name,
        section=config.section,
        kind=kind,
        many=many,
        optional=optional,
        choices=tuple(map(str, choices)),
        default=default,
        setting=setting,
    )


def _without_none(hint: Any) -> tuple[Any, bool]:
    """`T | None` as (T, True), any other type as (itself, False)."""
    parts = get_args(hint)
    if get_origin(hint) not in (Union, types.UnionType) or len(parts) != 2 or types.NoneType not in parts:
        return hint, False
    return next(part for part in parts if part is not types.NoneType), True


def parse_text(field: Field, text: str, *, plain: bool = False) -> object:
    """Read the value of `field` from text; `ValueError` if it has none. Ranges are not looked at (`Field.problem`).

    `plain` is the reference's way: no `none`, no byte suffix, and every word that does not say yes is false.
    """
    text = text.strip()
    if field.optional and field.kind != "str" and not plain and text.lower() == "none":
        return None
    if field.many:
        return tuple(_parse_one(field, part.strip(), plain=plain) for part in text.split(",") if part.strip())
    return _parse_one(field, text, plain=plain)


def _parse_one(field: Field, text: str, *, plain: bool) -> object:
    match field.kind:
        case "bool":
            return _parse_bool(text, plain=plain)
        case "int":
            return _parse_size(text) if field.setting.unit == "bytes" and not plain else int(text)
        case "float":
            return float(text)
        case "path":
            return Path(text)
        case "secret":
            return Secret(text)
        case _:
            return text


def _parse_bool(text: str, *, plain: bool) -> bool:
    word = text.lower()
    if word not in _TRUE | _FALSE and not plain:
        raise ValueError(f"{text!r} is neither true nor false")
    return word in _TRUE


def _parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number of bytes")
    size = Fraction(match[1]) * _SCALE[(match[2] or "").lower()]
    if size.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)
