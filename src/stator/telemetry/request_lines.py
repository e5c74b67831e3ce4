"""What a line about a request says, as JSON and as text (`spec/25 §7`). Pure: records in, lines out.

Where such a line is written is no place in a source file: it has neither `file` nor `line`.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, tzinfo
from typing import Any, cast

import msgspec

from stator.protocol.ids import EndpointId
from stator.telemetry.logs import JsonFormatter, TextFormatter, level_text, text_field
from stator.telemetry.trace import TraceContext, continue_trace, request_id_of

__all__ = ["TARGET", "Completed", "Lines", "Note", "SpanFacts", "as_log_record", "as_span"]

TARGET = "stator.request"
"""the target of all of them"""

Completed = tuple[
    str, EndpointId, int, float, float, float, float, int, int, str, str, Mapping[str, str], TraceContext | None
]  # fmt: skip
"""id, endpoint, instance, began, queued, first, ended, items, bytes, outcome, error, headers, trace; see `RequestLog.completed`"""
Note = tuple[float, int, str, dict[str, Any], Mapping[str, str], TraceContext | None, str, float]
"""moment, level, message, fields, headers, trace, span, began: any other line; see `RequestLog.write`"""

_LONGEST = 200
"""characters of a text from outside, so that a line fits into what a pipe takes at once"""
_PLAIN = re.compile(r"[\w.:/+-]{1,200}", re.ASCII).fullmatch
"""what needs neither quotes nor clipping"""
_MESSAGE = "request completed"
_HEAD = "%s%s%06d%s%s%s outcome=%s%s items=%d response_bytes=%d"
_TAIL = " duration_ms=%.3f%s%s\n"
_ANSWERED = f"{_HEAD} queued_ms=%.3f first_response_ms=%.3f{_TAIL}"
_STARTED = f"{_HEAD} queued_ms=%.3f{_TAIL}"
_REFUSED = f"{_HEAD}{_TAIL}"
"""a worker writes one line per request: a format for all of it takes half as long as its parts"""
_SPAN = "handle_payload"


class CompletedLine(msgspec.Struct, omit_defaults=True):
    """One completed request. The order is that of JSON: what every line has, then the rest sorted by name."""

    time: str = ""
    level: str = ""
    target: str = ""
    message: str = ""
    component: str = ""
    duration_ms: float | None = None
    endpoint: str = ""
    error: str = ""
    first_response_ms: float | None = None
    instance_id: str = ""
    items: int | None = None
    namespace: str = ""
    outcome: str = ""
    parent_id: str = ""
    queued_ms: float | None = None
    request_id: str = ""
    response_bytes: int | None = None
    span_id: str = ""
    span_name: str = ""
    trace_flags: str = ""
    trace_id: str = ""
    tracestate: str = ""
    x_request_id: str = ""


_JSON_ONLY = ("span_name", "trace_flags", "tracestate")
"""what a reader of text has no use for"""


class Lines:
    """Renders records for one formatter. `offset` is what makes wall time of a monotonic reading, in seconds."""

    def __init__(self, formatter: JsonFormatter | TextFormatter) -> None:
        self._formatter = formatter
        self._stamps = _Stamps(formatter.zone)
        self._encoder = msgspec.json.Encoder()
        self._head = ("", "")
        if isinstance(formatter, TextFormatter):
            before, _, after = formatter.head("\0", logging.INFO).partition("\0")
            self._head = (before, f"{after} {TARGET}: {_MESSAGE} request_id=")
        self._places: dict[tuple[EndpointId, int], tuple[str, str, str, str, str]] = {}

    def render(self, records: Iterable[Completed | Note], offset: float) -> bytes:
        """Complete lines in UTF-8."""
        if isinstance(self._formatter, JsonFormatter):
            lines = self._encoder.encode_lines([self._as_json(record, offset) for record in records])
        else:
            lines = "".join([self._as_text(record, offset, self._formatter) for record in records]).encode()
        return self._formatter.conceal(lines.decode()).encode() if self._formatter.hidden else lines

    def _as_json(self, record: Completed | Note, offset: float) -> CompletedLine | dict[str, Any]:
        if len(record) == 8:
            moment, level, message = record[:3]
            head = {"time": self._stamps(moment + offset), "level": level_text(level), "target": TARGET, "message": message}
            return head | dict(sorted(_note_fields(record).items()))
        id, endpoint, instance, began, queued, first, ended, items, size, outcome, error, headers, trace = record
        namespace, component, name, number, _ = self._place(endpoint, instance)
        line = CompletedLine(
            self._stamps(ended + offset),
            "INFO",
            TARGET,
            _MESSAGE,
            component,
            _ms(began, ended),
            name,
            clipped(error),
            _ms(began, first) if first else None,
            number,
            items,
            namespace,
            outcome,
            "",
            _ms(began, queued) if queued else None,
            id if _PLAIN(id) else clipped(id),
            size,
        )
        if headers or trace is not None:
            for field, value in trace_fields(headers, trace, _SPAN).items():
                setattr(line, field, value)
        return line

    def _as_text(self, record: Completed | Note, offset: float, formatter: TextFormatter) -> str:
        if len(record) == 8:
            moment, level, message = record[:3]
            more = "".join([f" {key}={_shown(value)}" for key, value in _note_fields(record).items() if key not in _JSON_ONLY])
            return f"{formatter.head(self._stamps(moment + offset), level)} {TARGET}: {message}{more}\n"
        id, endpoint, instance, began, queued, first, ended, items, size, outcome, error, headers, trace = record
        before, after = self._head
        shown = id if _PLAIN(id) else text_field(clipped(id))
        more = f" error={text_field(clipped(error))}" if error else ""
        form, times = _REFUSED, ()
        if queued and first:
            form, times = _ANSWERED, ((queued - began) * 1e3, (first - began) * 1e3)
        elif queued:
            form, times = _STARTED, ((queued - began) * 1e3,)
        traced = ""
        if headers or trace is not None:
            found = trace_fields(headers, trace, _SPAN)
            traced = "".join([f" {key}={text_field(value)}" for key, value in found.items() if key not in _JSON_ONLY])
        second, micros, zone = self._stamps.parts(ended + offset)
        place = self._place(endpoint, instance)[4]
        duration = (ended - began) * 1e3
        return form % (before, second, micros, zone, after, shown, outcome, more, items, size, *times, duration, place, traced)

    def _place(self, endpoint: EndpointId, instance: int) -> tuple[str, str, str, str, str]:
        """Namespace, component, name, instance, and all of them as text. A process serves few."""
        place = self._places.get((endpoint, instance))
        if place is None:
            if len(self._places) > 1000:
                self._places.clear()
            namespace, component, name = map(clipped, endpoint.segments)
            shown = "".join(
                f" {key}={text_field(value)}"
                for key, value in (("component", component), ("endpoint", name), ("namespace", namespace))
            )
            place = (namespace, component, name, str(instance), f"{shown} instance_id={instance}")
            self._places[endpoint, instance] = place
        return place


def trace_fields(headers: Mapping[str, str], trace: TraceContext | None, span: str) -> dict[str, str]:
    """Which trace a line belongs to, as the span of that name; empty if there is none."""
    found: dict[str, str] = {}
    if trace is None:
        trace = continue_trace(headers)
    if trace is not None:
        found = {"span_name": span, "trace_id": trace.trace_id, "span_id": trace.span_id}
        found |= {"parent_id": trace.parent_id} if trace.parent_id else {}
        found["trace_flags"] = trace.flags
        found |= {"tracestate": clipped(trace.state)} if trace.state else {}
    if request_id := (trace.request_id if trace is not None else request_id_of(headers)):
        found["x_request_id"] = clipped(request_id)
    return found


def as_log_record(record: Completed | Note, offset: float) -> logging.LogRecord:
    """The same for handlers of the application's own."""
    if len(record) == 8:
        moment, level, message = record[:3]
        fields = _note_fields(record)
    else:
        moment, level, message = record[6], logging.INFO, _MESSAGE
        fields = _completed_fields(record) | trace_fields(record[11], record[12], _SPAN)
    made = logging.LogRecord(TARGET, level, "", 0, message, None, None)
    made.created = moment + offset
    made.msecs = made.created % 1 * 1000
    vars(made).update(fields)
    return made


class SpanFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One span of a trace. Times are wall time in seconds."""

    name: str
    trace: TraceContext
    began: float
    ended: float
    attributes: dict[str, str | int | float | bool]
    failure: str
    """code of what went wrong, or \"\""""


def as_span(record: Completed | Note, offset: float) -> SpanFacts | None:
    """The same as a span; None if it is none, or has no trace."""
    if len(record) == 8:
        ended, _, _, fields, _, trace, name, began = record
        if not began:
            return None
    else:
        began, ended, trace, name, fields = record[3], record[6], record[12], _SPAN, _completed_fields(record)
    if trace is None:
        return None
    if trace.request_id:
        fields = {**fields, "x_request_id": trace.request_id}
    failure = fields.get("error") or ("" if fields.get("outcome") in ("ok", None) else fields["outcome"])
    return SpanFacts(
        name=name, trace=trace, began=began + offset, ended=ended + offset, attributes=fields, failure=str(failure)
    )


def _completed_fields(record: Completed) -> dict[str, Any]:
    """The most telling first."""
    id, endpoint, instance, began, queued, first, ended, items, size, outcome, error, _, _ = record
    namespace, component, name = endpoint.segments
    fields: dict[str, Any] = {"request_id": clipped(id), "outcome": outcome}
    fields |= {"error": clipped(error)} if error else {}
    fields |= {"items": items, "response_bytes": size}
    fields |= {"queued_ms": _ms(began, queued)} if queued else {}
    fields |= {"first_response_ms": _ms(began, first)} if first else {}
    fields |= {"duration_ms": _ms(began, ended), "component": component, "endpoint": name, "namespace": namespace}
    return fields | {"instance_id": str(instance)}


def _note_fields(record: Note) -> dict[str, Any]:
    fields, headers, trace, span = record[3:7]
    for key, value in fields.items():
        if isinstance(value, str) and not _PLAIN(value):
            fields = fields | {key: clipped(value)}
    return fields | trace_fields(headers, trace, span) if headers or trace is not None else fields


def _shown(value: object) -> str:
    """As `text_field`, the usual things first."""
    kind = type(value)
    if kind is int or kind is float or (kind is str and _PLAIN(cast("str", value))):
        return str(value)
    return text_field(value)


def clipped(text: str) -> str:
    """A text from outside, cut where it is longer than a line should carry; what does not print is escaped."""
    if len(text) <= _LONGEST and text.isascii() and text.isprintable():
        return text
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_LONGEST])
    return shown if len(shown) <= _LONGEST and len(text) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


class _Stamps:
    """Wall times as log lines show them; the second is formatted once."""

    __slots__ = ("_after", "_before", "_second", "_zone")

    def __init__(self, zone: tzinfo | None) -> None:
        self._zone = zone
        self._second = -1
        self._before = self._after = ""

    def __call__(self, moment: float) -> str:
        before, micros, after = self.parts(moment)
        return f"{before}{micros:06d}{after}"

    def parts(self, moment: float) -> tuple[str, int, str]:
        """What is before the digits of the microseconds, these, and what is behind them."""
        second = int(moment)
        if second != self._second:
            self._second = second
            at = datetime.fromtimestamp(second, UTC)
            if self._zone is UTC:
                self._before, self._after = at.strftime("%Y-%m-%dT%H:%M:%S."), "Z"
            else:
                text = at.astimezone(self._zone).isoformat(timespec="seconds")
                self._before, self._after = f"{text[:19]}.", text[19:]
        return self._before, int((moment - second) * 1e6), self._after


def _ms(begin: float, end: float) -> float:
    """Milliseconds from `begin` to `end`, to the microsecond."""
    return int((end - begin) * 1e6 + 0.5) / 1e3
