"""Log lines: readable or JSON, with levels per target. Only the command line calls `configure_logging`.

Everybody else writes `logging.getLogger(__name__)` and passes facts as `extra={"request_id": …}`; both formats show them as
fields. The formats and the level strings are the reference's (`spec/25 §7`), the target is the logger's name.
"""

import logging
import re
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO
from weakref import WeakMethod

import msgspec

from stator.config import Config, Secret, Setting
from stator.errors import ConfigError
from stator.settings import wants_color

__all__ = [
    "JsonFormatter",
    "LineHandler",
    "LogConfig",
    "TextFormatter",
    "configure_logging",
    "level_text",
    "on_configured",
    "parse_levels",
    "tell_configured",
    "text_field",
]

TRACE = 5
OFF = 100

_LEVELS = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": OFF,
}
_NOISY = ("aiohttp.access", "filelock", "httpcore", "httpx", "huggingface_hub", "urllib3")
"""libraries that log each request; at level error unless named"""

_LIMIT = 16 * 1024
"""longest message or field, in characters"""
_SHORTEST_SECRET = 6
"""shorter ones are not looked for in lines: the lines would become unreadable before the secret became safe"""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN_VALUE = re.compile(r"[^\s\"=]+")
_COLORS = {"TRACE": "35", "DEBUG": "34", "INFO": "32", "WARN": "33", "ERROR": "31"}


def _read_dyn_log(text: str) -> str:
    """`DYN_LOG`: a bare word that is no level is a target and silences everything else, as in the reference (`spec/25 §7`)."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    words = [part for part in parts if "=" not in part and part.lower() not in _LEVELS]
    rest = [part for part in parts if part not in words]
    text = ",".join((*(["off"] if words else []), *(f"{word}=trace" for word in words), *rest))
    try:
        parse_levels(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return text


class LogConfig(Config, frozen=True, kw_only=True):
    """What is logged, and how it looks. Lines go to stderr."""

    log: Annotated[
        str,
        Setting(
            doc="level, or list of target=level and one bare default: info,stator.transports=debug",
            dyn="DYN_LOG",
            dyn_read=_read_dyn_log,
        ),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        Setting(
            doc="readable lines or JSON lines",
            dyn="DYN_LOGGING_JSONL",
            dyn_read=lambda text: "json" if text.lower() in ("1", "true", "on", "yes") else "text",
        ),
    ] = "text"
    log_span_events: Annotated[bool, Setting(doc="has no effect, and says so", dyn="DYN_LOGGING_SPAN_EVENTS")] = False
    log_config_path: Annotated[Path | None, Setting(doc="has no effect, and says so", dyn="DYN_LOGGING_CONFIG_PATH")] = None
    log_local_time: Annotated[bool, Setting(doc="local time with offset instead of UTC", dyn="DYN_LOG_USE_LOCAL_TZ")] = False

    def check(self) -> None:
        parse_levels(self.log)


def parse_levels(text: str) -> dict[str, int]:
    """Read `info,stator.transports=debug`: target → level, the default under "". `ConfigError` names what is wrong.

    Targets may be written with `::`. Without a bare level the default is info.
    """
    levels = {"": logging.INFO}
    for part in filter(None, (part.strip() for part in text.split(","))):
        target, equals, level = part.rpartition("=")
        number = _LEVELS.get(level.strip().lower())
        if number is None or (equals and not target.strip()):
            raise ConfigError(f"log level {part!r}: expected a level or target=level; levels are {', '.join(_LEVELS)}")
        levels[target.strip().replace("::", ".")] = number
    return levels


def configure_logging(
    config: LogConfig, *, stream: TextIO | None = None, secrets: Iterable[Secret | None] = ()
) -> Callable[[], None]:
    """Send the log of the whole process to `stream` (stderr). Returns what undoes it.

    `secrets` are blacked out wherever they might turn up in a line, exceptions of libraries included.
    """
    out: TextIO = sys.stderr if stream is None else stream
    revealed = [secret.reveal() for secret in secrets if secret and len(secret.reveal()) >= _SHORTEST_SECRET]
    # Fields are quoted as JSON, in which a secret may look different.
    hidden = tuple(dict.fromkeys(form for text in revealed for form in (text, msgspec.json.encode(text).decode()[1:-1])))
    zone = None if config.log_local_time else UTC
    handler = LineHandler(out)
    handler.setFormatter(
        JsonFormatter(zone=zone, hidden=hidden)
        if config.log_format == "json"
        else TextFormatter(zone=zone, hidden=hidden, color=wants_color(out))
    )
    levels = dict.fromkeys(_NOISY, logging.ERROR) | parse_levels(config.log)
    root = logging.getLogger()
    before_handlers = list(root.handlers)
    before_levels = {target: logging.getLogger(target).level for target in levels}
    root.handlers[:] = [handler]
    for target, level in levels.items():
        logging.getLogger(target).setLevel(level)
    logging.captureWarnings(True)
    tell_configured()

    def undo() -> None:
        logging.captureWarnings(False)
        root.handlers[:] = before_handlers
        for target, level in before_levels.items():
            logging.getLogger(target).setLevel(level)
        tell_configured()

    return undo


_listeners: list[WeakMethod[Callable[[], None]]] = []


def on_configured(listener: Callable[[], None]) -> None:
    """Call the bound method `listener` whenever `configure_logging` changed what is logged, as long as its object lives."""
    _listeners.append(WeakMethod(listener))


def tell_configured() -> None:
    """Call the listeners of `on_configured`."""
    _listeners[:] = [one for one in _listeners if one() is not None]
    for one in _listeners:
        if (listener := one()) is not None:
            listener()


class LineHandler(logging.StreamHandler[TextIO]):
    """The handler of `configure_logging`. Who holds its lock may write whole lines to its stream."""


class _Formatter(logging.Formatter, ABC):
    """What both formats share. Formatting never raises: a value that cannot be shown is shown as its type."""

    def __init__(self, *, zone: tzinfo | None = UTC, hidden: tuple[str, ...] = ()) -> None:
        """`zone` None is the local one; `hidden` are texts that must not be shown."""
        super().__init__()
        self.zone = zone
        self.hidden = hidden

    def format(self, record: logging.LogRecord) -> str:
        return self.conceal(self.line(record))

    def conceal(self, line: str) -> str:
        """`line` with the secrets blacked out."""
        for secret in self.hidden:
            line = line.replace(secret, "***")
        return line

    @abstractmethod
    def line(self, record: logging.LogRecord) -> str:
        """What `record` says, secrets and all."""

    def time_of(self, record: logging.LogRecord) -> str:
        """Six digits of a second; `Z` or the offset."""
        moment = datetime.fromtimestamp(record.created, UTC)
        if self.zone is UTC:
            return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return moment.astimezone(self.zone).isoformat(timespec="microseconds")


class JsonFormatter(_Formatter):
    """One JSON object a line: time, level, file, line, target, message, then all other fields sorted by name.

    A record that names no file has neither `file` nor `line`.
    """

    def line(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": self.time_of(record),
            "level": level_text(record.levelno),
        }
        if record.pathname:
            fields |= {"file": record.pathname, "line": record.lineno}
        fields |= {"target": record.name, "message": _message(record)}
        extra = _extra(record)
        if trouble := _exception(record):
            extra["exception"] = trouble
        fields.update(sorted(extra.items()))
        return msgspec.json.encode(fields).decode()


class TextFormatter(_Formatter):
    """`<time>  INFO target: message key=value …`, coloured on a terminal; a traceback follows on lines of its own."""

    def __init__(self, *, zone: tzinfo | None = UTC, hidden: tuple[str, ...] = (), color: bool = False) -> None:
        super().__init__(zone=zone, hidden=hidden)
        self.color = color

    def head(self, time: str, level: int) -> str:
        """What a line begins with: the time and the level."""
        name = level_text(level)
        if self.color:
            return f"\x1b[2m{time}\x1b[0m \x1b[{_COLORS[name]}m{name:>5}\x1b[0m"
        return f"{time} {name:>5}"

    def line(self, record: logging.LogRecord) -> str:
        parts = [f"{self.head(self.time_of(record), record.levelno)} {record.name}: {_escaped(_message(record))}"]
        parts.extend(f"{key}={text_field(value)}" for key, value in _extra(record).items())
        line = " ".join(parts)
        trouble = _exception(record)
        return f"{line}\n{trouble}" if trouble else line


def level_text(level: int) -> str:
    """The reference's five words."""
    for name, number in (("ERROR", logging.ERROR), ("WARN", logging.WARNING), ("INFO", logging.INFO), ("DEBUG", logging.DEBUG)):
        if level >= number:
            return name
    return "TRACE"


def _message(record: logging.LogRecord) -> str:
    try:
        return _bounded(record.getMessage())
    except Exception as error:  # a wrong format string must not cost the line
        return _bounded(f"{record.msg} ({type(error).__name__} while formatting)")


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {key: _simple(value) for key, value in vars(record).items() if key not in _STANDARD}


def _simple(value: object) -> str | int | float | bool | None:
    """Numbers that JSON can hold keep their type, all else becomes text."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return value
    try:
        return _bounded(str(value))
    except Exception:
        return f"<{type(value).__name__}>"


def _bounded(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= _LIMIT else f"{text[:_LIMIT]}… ({len(text) - _LIMIT} more characters)"


def _exception(record: logging.LogRecord) -> str:
    if record.exc_info and record.exc_info[0] is not None:
        return _bounded("".join(traceback.format_exception(*record.exc_info)).rstrip())
    return _bounded(record.stack_info) if record.stack_info else ""


def _escaped(text: str) -> str:
    """One line, whatever a peer put into it."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def text_field(value: object) -> str:
    """A value as the text format shows it: quoted where a plain word would be misread."""
    if not isinstance(value, str):
        return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
    if _PLAIN_VALUE.fullmatch(value) and value.isprintable():
        return value
    return msgspec.json.encode(value).decode()
