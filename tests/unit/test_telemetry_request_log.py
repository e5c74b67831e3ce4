"""The request log: formats, levels, batches, secrets, and applications with logging of their own."""

import asyncio
import gc
import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from stator.config import Secret
from stator.protocol.ids import EndpointId
from stator.telemetry import LogConfig, RequestLog, TraceContext, configure_logging
from stator.telemetry import request_log as module
from stator.testing.manual_clock import ManualClock

ENDPOINT = EndpointId.parse("demo.my-backend.generate")
INSTANCE = 14451041136425923337
PARENT = "00-ab7f7246c9897a0428ab5624f80c0b20-ffdcef94bdb251be-01"


class Log:
    """A request log on a manual clock, and the lines it wrote."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.clock = ManualClock()
        self.undo: list[Any] = []
        self.log: RequestLog

    def configure(self, *secrets: Secret | None, **config: Any) -> RequestLog:
        self.undo.append(configure_logging(LogConfig(**config), stream=self.stream, secrets=secrets))
        self.log = RequestLog(self.clock)
        return self.log

    def complete(self, id: str = "r-1", outcome: Any = "ok", **more: Any) -> None:
        now = self.clock.monotonic()
        facts: dict[str, Any] = {"queued": now - 2, "first": now - 1.5, "items": 3, "bytes": 167} | more
        self.log.completed(id, ENDPOINT, INSTANCE, now - 2.5, ended=now, outcome=outcome, **facts)

    @property
    def lines(self) -> list[str]:
        self.log.flush()
        return self.stream.getvalue().splitlines()

    @property
    def json(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@pytest.fixture
def out() -> Iterator[Log]:
    found = Log()
    yield found
    for undo in reversed(found.undo):
        undo()


async def test_a_json_line_has_the_references_fields_in_its_order(out: Log) -> None:
    out.configure(log_format="json")
    out.complete()
    (line,) = out.lines
    assert line.partition(",")[2] == (
        '"level":"INFO","target":"stator.request","message":"request completed","component":"my-backend","duration_ms":2500.0,'
        '"endpoint":"generate","first_response_ms":1000.0,"instance_id":"14451041136425923337","items":3,"namespace":"demo",'
        '"outcome":"ok","queued_ms":500.0,"request_id":"r-1","response_bytes":167}'
    )
    names = list(json.loads(line))
    assert names[:4] == ["time", "level", "target", "message"]
    assert names[4:] == sorted(names[4:])


async def test_a_text_line_reads_like_all_others(out: Log) -> None:
    log = out.configure()
    out.complete("r 1", "error", error="timeout", first=0.0, items=0, bytes=0)
    log.flush()
    logging.getLogger("stator.request").info("other")
    mine, other = out.lines
    assert mine.partition("Z ")[2] == (
        ' INFO stator.request: request completed request_id="r 1" outcome=error error=timeout items=0 response_bytes=0'
        " queued_ms=500.000 duration_ms=2500.000 component=my-backend endpoint=generate namespace=demo"
        " instance_id=14451041136425923337"
    )
    assert mine.partition("Z ")[2][:21] == other.partition("Z ")[2][:21]


async def test_a_text_line_says_how_far_a_request_came(out: Log) -> None:
    log = out.configure()
    out.complete(queued=0.0, first=0.0)
    out.complete(first=0.0)
    out.complete()
    log.flush()
    refused, started, answered = out.lines
    assert ("queued_ms" in refused, "first_response_ms" in refused) == (False, False)
    assert ("queued_ms" in started, "first_response_ms" in started) == (True, False)
    assert ("queued_ms" in answered, "first_response_ms" in answered) == (True, True)


async def test_the_time_of_a_line_is_when_the_request_ended(out: Log) -> None:
    out.configure(log_format="json")
    out.complete()
    out.clock.advance(0.040)
    out.complete()
    first, second = (line["time"] for line in out.json)
    assert first < second
    assert len(first) == len("2026-11-21T04:14:05.957327Z")
    assert first.endswith("Z")


@pytest.mark.parametrize("form", ["json", "text"])
async def test_local_time_carries_its_offset(out: Log, form: str) -> None:
    out.configure(log_format=form, log_local_time=True)
    out.complete()
    assert out.lines[0].replace('{"time":"', "")[26] in "+-"


async def test_a_trace_is_continued_on_the_line(out: Log) -> None:
    out.configure(log_format="json")
    out.complete(headers={"traceparent": PARENT, "tracestate": "a=b", "x-request-id": "mine"})
    own = TraceContext(trace_id="1" * 32, span_id="2" * 16, parent_id="3" * 16)
    out.complete(headers={"traceparent": PARENT}, trace=own)
    out.complete(headers={"x-request-id": "only"})
    out.complete(headers={"traceparent": "nonsense"})
    made, given, named, none = out.json
    assert (made["trace_id"], made["parent_id"]) == ("ab7f7246c9897a0428ab5624f80c0b20", "ffdcef94bdb251be")
    assert made["span_id"] not in (made["parent_id"], "")
    assert (made["tracestate"], made["x_request_id"], made["trace_flags"]) == ("a=b", "mine", "01")
    assert made["span_name"] == "handle_payload"
    assert (given["trace_id"], given["span_id"], given["parent_id"]) == ("1" * 32, "2" * 16, "3" * 16)
    assert named["x_request_id"] == "only"
    assert "trace_id" not in named
    assert not {"trace_id", "span_id", "x_request_id"} & none.keys()


async def test_text_lines_name_the_trace_too(out: Log) -> None:
    out.configure()
    out.complete(headers={"traceparent": PARENT, "x-request-id": "mine"})
    assert " trace_id=ab7f7246c9897a0428ab5624f80c0b20 span_id=" in out.lines[0]
    assert out.lines[0].endswith(" parent_id=ffdcef94bdb251be x_request_id=mine")


@pytest.mark.parametrize(
    ("levels", "enabled", "debugging"),
    [
        ("info", True, False),
        ("warn", False, False),
        ("debug", True, True),
        ("warn,stator.request=info", True, False),
        ("debug,stator.request=warn", False, False),
        ("off,stator.request=debug", True, True),
    ],
)
def test_levels_decide_what_the_caller_does(out: Log, levels: str, enabled: bool, debugging: bool) -> None:
    log = out.configure(log=levels)
    assert (log.enabled, log.debugging) == (enabled, debugging)


def test_levels_are_followed_when_logging_is_set_up_later(out: Log) -> None:
    log = RequestLog(out.clock)
    assert not log.enabled  # a library that nobody asked to log does nothing
    undo = configure_logging(LogConfig(log="debug"), stream=out.stream)
    assert log.enabled and log.debugging
    undo()
    assert not log.enabled
    del log
    gc.collect()
    configure_logging(LogConfig(), stream=out.stream)()  # a log that is gone is not told


async def test_received_comes_before_completed_with_the_same_id(out: Log) -> None:
    log = out.configure(log="debug", log_format="json")
    log.received("r-9", ENDPOINT, INSTANCE)
    out.complete("r-9")
    first, second = out.json
    assert (first["level"], first["message"]) == ("DEBUG", "request received")
    assert (second["level"], second["message"]) == ("INFO", "request completed")
    assert {line["request_id"] for line in (first, second)} == {"r-9"}
    assert first["instance_id"] == second["instance_id"] == str(INSTANCE)


@pytest.mark.parametrize("form", ["json", "text"])
async def test_secrets_are_blacked_out(out: Log, form: str) -> None:
    out.configure(Secret('hush"hush'), log_format=form)
    out.complete('the hush"hush id')
    assert "hush" not in out.lines[0]
    assert "***" in out.lines[0]


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("id", ["a\nb", "x" * 5000, "\ud800", "naïve", "a=b", '"', "\x1b[31m", "\0" * 5000])
async def test_ids_from_outside_cannot_break_a_line(out: Log, form: str, id: str) -> None:
    out.configure(log_format=form)
    out.complete(id, headers={"traceparent": PARENT, "tracestate": "s" * 500, "x-request-id": "y" * 250})
    (line,) = out.lines
    assert len(line.encode()) < 4096
    assert "\x1b" not in line and "\n" not in line
    if form == "json":
        assert json.loads(line)["outcome"] == "ok"


async def test_lines_of_one_moment_are_written_at_once(out: Log) -> None:
    writes: list[str] = []
    out.stream.write = writes.append  # type: ignore[method-assign, assignment]
    out.configure()
    for number in range(100):
        out.complete(f"r-{number}")
    assert writes == []
    async with asyncio.timeout(5):
        while not writes:
            await asyncio.sleep(0)
    assert len(writes) == 1
    assert writes[0].count("\n") == 100


async def test_a_full_batch_does_not_wait_for_the_timer(out: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DELAY", 3600.0)
    out.configure()
    for number in range(module._BATCH + 1):
        out.complete(f"r-{number}")
    assert out.stream.getvalue() == ""
    await asyncio.sleep(0)
    assert out.stream.getvalue().count("\n") == module._BATCH + 1
    out.log.close()


async def test_a_burst_within_one_turn_is_bounded_and_complete(out: Log) -> None:
    out.configure()
    for number in range(2 * module._MOST + 5):
        out.complete(f"r-{number}")
        assert len(out.log._records) <= module._MOST
    assert len(out.lines) == 2 * module._MOST + 5
    assert out.log.dropped == 0


async def test_close_writes_all_and_later_lines_come_one_by_one(out: Log) -> None:
    log = out.configure()
    out.complete()
    log.close()
    assert out.stream.getvalue().count("\n") == 1
    assert not log.enabled
    out.complete()
    log.close()
    assert out.stream.getvalue().count("\n") == 2


def test_without_a_loop_lines_are_written_at_once(out: Log) -> None:
    out.configure()
    out.complete()
    assert out.stream.getvalue().count("\n") == 1


async def test_a_closed_stream_costs_lines_and_nothing_else(out: Log) -> None:
    log = out.configure()
    out.stream.close()
    out.complete()
    log.flush()
    assert log.dropped == 1


async def test_handlers_of_the_application_get_records(out: Log, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="stator.request")
    log = out.log = RequestLog(out.clock)
    assert log.enabled and log.debugging
    log.received("r-1", ENDPOINT, INSTANCE)
    out.complete(outcome="refused", error="overloaded", headers={"traceparent": PARENT})
    log.flush()
    received, completed = (vars(record) for record in caplog.records)
    assert (received["levelname"], received["msg"], received["request_id"]) == ("DEBUG", "request received", "r-1")
    assert completed["name"] == "stator.request"
    assert completed["created"] == pytest.approx(out.clock.wall())
    facts = {key: completed[key] for key in ("outcome", "error", "items", "duration_ms", "instance_id", "parent_id")}
    assert facts == {
        "outcome": "refused",
        "error": "overloaded",
        "items": 3,
        "duration_ms": 2500.0,
        "instance_id": str(INSTANCE),
        "parent_id": "ffdcef94bdb251be",
    }


async def test_a_second_handler_sees_what_the_first_one_writes(out: Log) -> None:
    log = out.configure(log_format="json")
    other = io.StringIO()
    extra = logging.StreamHandler(other)
    logging.getLogger("stator").addHandler(extra)
    try:
        out.complete()
        log.flush()
    finally:
        logging.getLogger("stator").removeHandler(extra)
    assert other.getvalue() == "request completed\n"
    (line,) = out.json
    assert list(line)[:4] == ["time", "level", "target", "message"]
    assert line["request_id"] == "r-1"


def test_lines_are_written_when_the_interpreter_ends() -> None:
    program = """
import asyncio
from stator.protocol.ids import EndpointId
from stator.tasks import SystemClock
from stator.telemetry import LogConfig, RequestLog, configure_logging
configure_logging(LogConfig())
async def main():
    global log
    log = RequestLog(SystemClock())
    log.completed("last", EndpointId.parse("a.b.c"), 1, 1.0, 1.0, 1.0, 2.0, 0, 0, "ok")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "request completed request_id=last outcome=ok" in done.stderr


@pytest.mark.load
async def test_the_caller_pays_less_than_one_and_a_half_microseconds(out: Log) -> None:
    log = out.configure()
    best = 1.0
    for _ in range(200):
        begin = time.perf_counter()
        for _ in range(150):
            if log.enabled:
                log.completed("3f660f63-b7a2-484a-8c4e-460845e9ddc3", ENDPOINT, INSTANCE, 1.0, 1.1, 1.2, 1.3, 3, 167, "ok")
        best = min(best, (time.perf_counter() - begin) / 150)
        log.flush()
    assert best < 1.5e-6
