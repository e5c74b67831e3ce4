"""Changing the file of API keys as people would, comments and order kept, so that a frontend never sees half of a change."""

import fcntl
import os
import stat
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from stator.errors import ConfigError, UsageError
from stator.frontend.key_file import TABLE_HEADER, KeyFileError, KeyRecord, parse_keys, read_keys

__all__ = ["add_key", "remove_key"]

_HEADER = "# API keys of Stator's frontends: docs/api-keys.md. They read it again when it changes.\n"
_ATTEMPTS = 250
_PAUSE = 0.02
"""seconds between two attempts to be the only one who changes the file"""

Value = str | int | bool | datetime | list[str]


def add_key(path: Path, fields: Mapping[str, Value]) -> KeyRecord:
    """Append a key with these fields, `name` and `hash` among them; the file is made if there is none. Blocks.

    Raises `UsageError` for a name that is taken or a field that is wrong, `KeyFileError` for a file that was wrong before.
    """
    with _editing(path) as write:
        text = path.read_text("utf-8") if path.exists() else _HEADER
        before = parse_keys(text, str(path))
        if any(record.name == fields["name"] for record in before):
            raise UsageError(f"{path} has a key called {fields['name']!r}; remove it first, or choose another name")
        lines = [f"{name} = {_toml(value)}" for name, value in fields.items()]
        separator = "\n" if text.endswith("\n") else "\n\n"
        table = "\n".join(("[[keys]]", *lines)) + "\n"
        try:
            (record,) = parse_keys(table, "the new key")
        except ConfigError as error:
            raise UsageError(error.message) from error
        text = f"{text}{separator}{table}"
        if not _reads_as(text, [*before, record]):
            raise UsageError(f"{path} is not written as tables [[keys]]; add the key by hand")
        write(text)
        return record


def remove_key(path: Path, name: str) -> None:
    """Take the key called `name` out, with what stands in its table. Blocks. Raises `UsageError` if there is none."""
    with _editing(path) as write:
        before = read_keys(path)
        number = next((number for number, record in enumerate(before) if record.name == name), None)
        if number is None:
            near = ", ".join(record.name for record in before[:10])
            raise UsageError(f"{path} has no key called {name!r}" + (f"; it has {near}" if near else ""))
        lines = path.read_text("utf-8").splitlines(keepends=True)
        headers = [place for place, line in enumerate(lines) if TABLE_HEADER.match(line)]
        end = _comment_before(lines, headers[number + 1]) if number + 1 < len(headers) else len(lines)
        begin = _comment_before(lines, headers[number]) if number < len(headers) else end
        text = "".join(lines[:begin] + lines[end:])
        text = text if text.strip() else _HEADER
        if not _reads_as(text, [record for record in before if record.name != name]):
            raise UsageError(f"{path} is not written as tables [[keys]]; remove the key by hand")
        write(text)


def _reads_as(text: str, records: list[KeyRecord]) -> bool:
    """Whether the edited text says what it should: it was edited by its lines, and might be laid out as nobody expects."""
    try:
        return parse_keys(text, "") == records
    except KeyFileError:
        return False


def _comment_before(lines: list[str], header: int) -> int:
    """Where the comment begins that stands directly above the table at `header`. What is at the top belongs to the whole file."""
    begin = header
    while begin > 0 and lines[begin - 1].lstrip().startswith("#"):
        begin -= 1
    return begin if begin > 0 else header


def _toml(value: Value) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return msgspec.json.encode(value).decode()  # of texts, numbers, booleans and lists, JSON is TOML


@contextmanager
def _editing(path: Path) -> Generator[Callable[[str], None]]:
    """One editor at a time. What is given to the function replaces the file in one step, readable by no more people than before."""
    path = path.resolve()  # of a link, what it points to is replaced
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be opened: {error.strerror}") from error
    try:
        _lock(directory, path)
        yield lambda text: _replace(path, text, directory)
    except OSError as error:
        raise ConfigError(f"{path} cannot be changed: {error.strerror or error}") from error
    finally:
        os.close(directory)


def _lock(directory: int, path: Path) -> None:
    for _ in range(_ATTEMPTS):
        try:
            return fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
    raise ConfigError(f"somebody else is changing {path}")


def _replace(path: Path, text: str, directory: int) -> None:
    """The new file is complete and on the disk before it has the name."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with suppress(FileNotFoundError):
        new.unlink()
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            with suppress(FileNotFoundError):
                old = path.stat()
                if (old.st_uid, old.st_gid) != (os.getuid(), os.getgid()):
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
                os.fchmod(file.fileno(), 0o600 | stat.S_IMODE(old.st_mode) & stat.S_IRGRP)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    os.fsync(directory)
