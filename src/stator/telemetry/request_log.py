"""One line for each request, at the price of a tuple.

A call of `logging` costs 10 µs and a write of its own; at ten thousand requests a second that is a tenth of a core. Here the caller
leaves a tuple, and the lines of up to 50 ms are rendered together and written at once, with the handler, format, levels and secrets
that `configure_logging` set up. Where the application has logging of its own, its handlers get the records one by one.

What a killed process (SIGKILL) had not written yet, at most 50 ms of lines, is lost.
"""

import asyncio
import atexit
import logging
from collections.abc import Mapping
from random import SystemRandom
from typing import Any, Literal

from stator.clock import Clock
from stator.protocol.ids import EndpointId
from stator.telemetry.line_output import LineOutput
from stator.telemetry.logs import JsonFormatter, LineHandler, TextFormatter, on_configured
from stator.telemetry.request_lines import TARGET, Completed, Lines, Note, as_log_record
from stator.telemetry.trace import TraceContext, continue_trace, request_id_of
from stator.telemetry.tracing import SpanSink, active_sink

__all__ = ["Outcome", "RequestLog"]

Outcome = Literal["ok", "error", "cancelled", "refused"]

_DELAY = 0.05
"""seconds that a line waits for others"""
_BATCH = 160
"""records that are written without waiting: about 64 KiB"""
_MOST = 2048
"""records that are rendered at once by whoever adds one more: a burst within one turn of the loop"""
_LAST_WORDS = 1.0
"""seconds that closing waits for a stream that takes nothing"""
_NOTHING: dict[str, str] = {}
_RANDOM = SystemRandom()

logger = logging.getLogger(TARGET)


class RequestLog:
    """The request lines of one event loop; all calls come from its thread.

    Look at `enabled` before `completed`, and at `debugging` before `received`: attributes that follow the levels set by
    `configure_logging` at once, and other changes of levels with the next flush or `refresh`.
    """

    __slots__ = (
        "__weakref__",
        "_clock",
        "_closed",
        "_formatter",
        "_lines",
        "_loop",
        "_output",
        "_records",
        "_soon",
        "_timer",
        "debugging",
        "enabled",
        "tracing",
    )

    def __init__(self, clock: Clock) -> None:
        """`clock` gives the readings that the callers hand in, and wall time for the lines."""
        self._clock = clock
        self._records: list[Completed | Note] = []
        self._output = LineOutput()
        self._formatter: logging.Formatter | None = None
        self._lines: Lines
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._soon = False
        self._closed = False
        self.enabled = False
        """whether anybody wants completed requests: lines, or spans"""
        self.debugging = False
        """whether anybody wants arriving requests"""
        self.tracing = False
        """whether a trace is begun for requests without one: where lines are JSON (`spec/25 §7.2`), or spans are exported"""
        self.refresh()
        on_configured(self.refresh)

    @property
    def dropped(self) -> int:
        """Lines lost because the stream took nothing for too long, or failed."""
        return self._output.dropped

    def refresh(self) -> None:
        """Look at levels, format and export again."""
        wanted, exporting = not self._closed, active_sink() is not None
        self.enabled = wanted and (exporting or logger.isEnabledFor(logging.INFO))
        self.debugging = wanted and logger.isEnabledFor(logging.DEBUG)
        handler = _only_handler()
        self.tracing = wanted and (exporting or (handler is not None and isinstance(handler.formatter, JsonFormatter)))

    def trace_of(self, headers: Mapping[str, str]) -> TraceContext | None:
        """The span of a request that came from outside with `headers`: in its sender's trace, in a new one where traces are
        wanted, or None.
        """
        trace = continue_trace(headers)
        if trace is not None or not self.tracing:
            return trace
        sink = active_sink()
        return TraceContext.new(_RANDOM, request_id=request_id_of(headers)) if sink is None else sink.root(headers)

    def completed(
        self,
        id: str,
        endpoint: EndpointId,
        instance: int,
        began: float,
        queued: float,
        first: float,
        ended: float,
        items: int,
        bytes: int,
        outcome: Outcome,
        error: str = "",
        headers: Mapping[str, str] = _NOTHING,
        trace: TraceContext | None = None,
    ) -> None:
        """A request ended, whichever way; once for each.

        Times are readings of the clock: `began` when it arrived, `queued` when its turn came (0.0: never), `first` when the first
        response left (0.0: none did), `ended` now. `bytes` are those of its items; `error` is the code of what went wrong.
        `trace` is the request's own span; without it one is made below the sender's that `headers` name.
        """
        self._records.append(
            (id, endpoint, instance, began, queued, first, ended, items, bytes, outcome, error, headers, trace)
        )
        if self._timer is None:
            self._arm()
        elif len(self._records) >= _BATCH:
            self._hurry()

    def received(
        self,
        id: str,
        endpoint: EndpointId,
        instance: int,
        headers: Mapping[str, str] = _NOTHING,
        trace: TraceContext | None = None,
    ) -> None:
        """A request arrived; for debugging."""
        namespace, component, name = endpoint.segments
        fields = {"request_id": id, "component": component, "endpoint": name, "namespace": namespace}
        fields["instance_id"] = str(instance)
        self.write("request received", fields, level=logging.DEBUG, headers=headers, trace=trace, span="handle_payload")

    def write(
        self,
        message: str,
        fields: dict[str, Any],
        *,
        level: int = logging.INFO,
        headers: Mapping[str, str] = _NOTHING,
        trace: TraceContext | None = None,
        span: str = "",
        began: float = 0.0,
    ) -> None:
        """Any other line, now. `fields` are numbers, truth values and texts, the most telling first; they belong to the line.

        `span` is the name of the span that it is about; exported is that of a line that says when it `began`.
        """
        self._records.append((self._clock.monotonic(), level, message, fields, headers, trace, span, began))
        if self._timer is None:
            self._arm()
        elif len(self._records) >= _BATCH:
            self._hurry()

    def flush(self) -> None:
        """Write what there is, as far as the stream takes it now. Never raises."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._soon = False
        self._write(0.0)
        if len(self._output) and not self._closed:
            self._arm()
        self.refresh()

    def close(self) -> None:
        """Write everything; a stream that takes nothing is given a second. Later lines are written one by one. Idempotent."""
        self._closed = True
        atexit.unregister(self.close)
        self.flush()
        until = self._clock.monotonic() + _LAST_WORDS
        while len(self._output) and self._clock.monotonic() < until:
            self._write(_DELAY)
        self._output.close()

    def _arm(self) -> None:
        """The first line of a batch."""
        if self._closed:
            self.flush()
            return
        try:
            loop = self._loop
            if loop is None:
                loop = self._loop = asyncio.get_running_loop()
                atexit.register(self.close)
            self._timer = loop.call_later(_DELAY, self.flush)
        except RuntimeError:  # no loop, or none any more
            self._loop = None
            self.flush()

    def _hurry(self) -> None:
        """A batch is full: at the end of this turn of the loop, or now if the turn goes on and on."""
        if len(self._records) >= _MOST or self._loop is None:
            self.flush()
        elif not self._soon:
            self._soon = True
            self._loop.call_soon(self.flush)

    def _write(self, patience: float) -> None:
        records, self._records = self._records, []
        offset = self._clock.wall() - self._clock.monotonic()
        if records:
            if (sink := active_sink()) is not None:
                records = _exported(records, sink, offset)
            if not logger.isEnabledFor(logging.INFO):  # it was the spans that somebody wanted
                records = []
        handler = _only_handler()
        if handler is None:
            self._hand_over(records, offset)
            return
        try:
            if self._output.unreported and not len(self._output):
                lost, self._output.unreported = self._output.unreported, 0
                text = "request lines were dropped: nobody reads the log"
                now = self._clock.monotonic()
                records.append((now, logging.WARNING, text, {"dropped": lost}, _NOTHING, None, "", 0.0))
            if records:
                self._output.put(self._render(handler, records, offset))
            self._output.write(handler, patience)
        except Exception:  # saying so would need the same handler
            self._output.lost(len(records))

    def _render(self, handler: LineHandler, records: list[Completed | Note], offset: float) -> bytes:
        formatter = handler.formatter
        if formatter is not self._formatter:
            assert isinstance(formatter, JsonFormatter | TextFormatter)
            self._formatter, self._lines = formatter, Lines(formatter)
        return self._lines.render(records, offset)

    def _hand_over(self, records: list[Completed | Note], offset: float) -> None:
        """The application's own handlers."""
        for record in records:
            made = as_log_record(record, offset)
            if logger.isEnabledFor(made.levelno):
                logger.handle(made)


def _exported(records: list[Completed | Note], sink: SpanSink, offset: float) -> list[Completed | Note]:
    """The records, each completed request with a trace, after their spans went to `sink`."""
    found: list[Completed | Note] = []
    for record in records:
        if len(record) == 13 and record[12] is None:
            record = (*record[:12], continue_trace(record[11]) or sink.root(record[11]))
        sink.put(record, offset)
        found.append(record)
    return found


def _only_handler() -> LineHandler | None:
    """The handler of `configure_logging` if it is the only one that lines of ours reach, and takes them all; else None."""
    at: logging.Logger | None = logger
    found: list[logging.Handler] = []
    while at is not None:
        found += at.handlers
        at = at.parent if at.propagate else None
    if len(found) != 1 or logger.filters or logger.disabled:
        return None
    handler = found[0]
    if not isinstance(handler, LineHandler) or handler.filters or handler.level > logging.DEBUG:
        return None
    return handler if isinstance(handler.formatter, JsonFormatter | TextFormatter) else None
