"""The file of API keys: TOML, one `[[keys]]` table per key (`docs/api-keys.md`).

TOML because operators write it, with comments, beside the settings file of the same language; its parser is part of Python and says in
which line it stumbled. Messages name file, line and field, and never a value that might be a key in the wrong place.
"""

import os
import re
import stat
import tomllib
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, time
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import msgspec

from stator.errors import ConfigError
from stator.frontend.permit import Priority
from stator.security.key_hashes import KEY_PREFIX, parse_hash

__all__ = ["TABLE_HEADER", "KeyFileError", "KeyRecord", "parse_keys", "permission_problem", "read_keys"]

_MOST_BYTES = 8 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_MOST = 2**53
"""largest limit: a float holds it exactly"""
TABLE_HEADER = re.compile(r"[ \t]*\[\[[ \t]*([\"']?)keys\1[ \t]*\]\]")
_TOO_OPEN = stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP
_PRIORITIES = {priority.label: priority for priority in Priority}


class KeyFileError(ConfigError):
    """The file cannot be read, or something in it is wrong; the message names file and line."""


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says of one key. None: not limited."""

    name: str
    """the tenant; stands in logs, metrics and messages"""
    digest: bytes
    expires: float | None = None
    """seconds since the epoch; the key is good until then"""
    models: tuple[str, ...] | None = None
    """names, or beginnings of names that end in `*`"""
    priorities: tuple[Priority, ...] | None = None
    """classes its requests may have; the first is that of requests that say nothing"""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    admin: bool = False
    """whether it opens the operators' routes on other machines"""

    def __repr__(self) -> str:
        return f"KeyRecord({self.name!r})"

    def allows(self, model: str) -> bool:
        """Whether requests for `model` are allowed."""
        if self.models is None:
            return True
        return any(model.startswith(each[:-1]) if each.endswith("*") else model == each for each in self.models)


def read_keys(path: Path) -> list[KeyRecord]:
    """The keys in the file at `path`. Blocks. Raises `KeyFileError`."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"the file of API keys {path} cannot be read: {error.strerror or error}") from error
    if len(data) > _MOST_BYTES:
        raise KeyFileError(f"{path} is larger than {_MOST_BYTES} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise KeyFileError(f"{path}, line {line}: the text is not UTF-8") from None
    return parse_keys(text, str(path))


def parse_keys(text: str, source: str) -> list[KeyRecord]:
    """The keys in `text`, in order; `source` is what messages call it. Raises `KeyFileError`.

    A text without anything in it is an error: so looks a file that is about to be written. One with a comment and no keys is not.
    """
    if not text.strip():
        raise KeyFileError(f"{source}, line 1: the file is empty; without any keys it needs a comment at least")
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the text of tomllib's own has the line, and no values
        reason = error if isinstance(error, tomllib.TOMLDecodeError) else "a number too long, or too many brackets"
        lines = text.count("\n") + 1
        raise KeyFileError(f"{source} ({lines} lines) is not valid TOML: {reason}") from None
    where = _Lines(text, source)
    for name in document:
        if name != "keys":
            raise where.error(None, name, f"nothing here is called {_shown(name)}; keys stand in tables [[keys]]")
    tables = document.get("keys", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in cast("list[object]", tables)):
        raise where.error(None, "keys", "keys are written as tables [[keys]]")
    records: list[KeyRecord] = []
    seen: dict[object, int] = {}
    for number, table in enumerate(cast("list[dict[str, Any]]", tables)):
        record = _record(table, number, where)
        for field, value in (("name", record.name), ("hash", record.digest)):
            if value in seen:
                raise where.error(number, field, f"the same {field} as key {seen[value] + 1} has")
            seen[value] = number
        records.append(record)
    return records


def permission_problem(path: Path) -> str:
    """What is wrong with who may read and write the file, for the log; "" if nothing is. Blocks."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return ""
    if not mode & _TOO_OPEN:
        return ""
    return f"{path} has mode {mode:04o}: others may read or change who has access; chmod 600 it (640 for a group)"


class _Lines:
    """Where things stand in the text, for messages."""

    def __init__(self, text: str, source: str) -> None:
        self._lines = text.splitlines()
        self._source = source
        self._headers = [number for number, line in enumerate(self._lines) if TABLE_HEADER.match(line)]

    def error(self, table: int | None, field: str, problem: str) -> KeyFileError:
        """`problem` with `field` of the table number `table` (None: of the whole file)."""
        begin, end = 0, len(self._lines)
        if table is not None and table < len(self._headers):
            begin, *rest = self._headers[table : table + 2]
            end = rest[0] if rest else end
        assignment = re.compile(rf"""[ \t]*(\[+[ \t]*)?["']?{re.escape(field)}["']?[ \t]*[.=\]]""")
        found = next((number for number in range(begin, end) if assignment.match(self._lines[number])), begin)
        return KeyFileError(f"{self._source}, line {found + 1}: {problem}")


def _record(table: dict[str, Any], number: int, where: _Lines) -> KeyRecord:
    name = table.get("name")
    which = f"key {name!r}" if isinstance(name, str) and _is_name(name) else f"key {number + 1}"
    values: dict[str, Any] = {}
    for field, value in table.items():
        read = _FIELDS.get(field)
        if read is None:
            near = get_close_matches(field, _FIELDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (known: {', '.join(_FIELDS)})"
            raise where.error(number, field, f"{which}: no field is called {_shown(field)}{hint}")
        try:
            values["digest" if field == "hash" else field] = read(value)
        except ValueError as error:
            raise where.error(number, field, f"{which}: {field}: {error}") from None
    for field in ("name", "hash"):
        if field not in table:
            raise where.error(number, "keys", f"{which} has no {field}")
    return KeyRecord(**values)


def _shown(word: str) -> str:
    """A name from the file for messages, unless it looks like a key."""
    return "(what looks like a key)" if word.startswith(KEY_PREFIX) else repr(word[:40])


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and not text.startswith(KEY_PREFIX)


def _read_name(value: object) -> str:
    if not isinstance(value, str) or not _is_name(value):
        raise ValueError(f"expected up to 64 letters, digits and ._@- that do not begin like a key ({KEY_PREFIX})")
    return value


def _read_hash(value: object) -> bytes:
    return parse_hash(value if isinstance(value, str) else "")


def _read_instant(value: object) -> float:
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("the time needs a zone, as in 2030-01-01T00:00:00Z")
        return value.timestamp()
    if isinstance(value, date):
        return datetime.combine(value, time(), UTC).timestamp()
    raise ValueError("expected a date or a time without quotation marks, as in 2030-01-01T00:00:00Z")


def _read_models(value: object) -> tuple[str, ...]:
    names = _texts(value, "names of models, or beginnings of names with * at the end")
    if any(not name or "*" in name[:-1] for name in names):
        raise ValueError("a name is empty, or has a * elsewhere than at its end")
    return names


def _read_priorities(value: object) -> tuple[Priority, ...]:
    names = _texts(value, f"priorities ({', '.join(_PRIORITIES)})")
    if not all(name in _PRIORITIES for name in names):
        raise ValueError(f"expected some of {', '.join(_PRIORITIES)}")
    return tuple(_PRIORITIES[name] for name in names)


def _texts(value: object, what: str) -> tuple[str, ...]:
    values = cast("Sequence[object]", value) if isinstance(value, list) else ()
    if not values or not all(isinstance(each, str) for each in values):
        raise ValueError(f"expected a list of {what}, not empty; without the line all are allowed")
    return cast("tuple[str, ...]", tuple(values))


def _read_limit(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
        raise ValueError("expected a whole number from 1; without the line there is no limit")
    return value


def _read_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


_FIELDS: dict[str, Callable[[object], object]] = {
    "name": _read_name,
    "hash": _read_hash,
    "expires": _read_instant,
    "models": _read_models,
    "priorities": _read_priorities,
    "requests_per_minute": _read_limit,
    "tokens_per_minute": _read_limit,
    "concurrent_requests": _read_limit,
    "admin": _read_flag,
}
