"""Spans at a collector: what arrives over OTLP/HTTP when requests end, and that a collector that is gone harms nobody."""

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from stator.protocol.ids import EndpointId
from stator.tasks import SystemClock
from stator.telemetry import LogConfig, RequestLog, TraceConfig, configure_logging, configure_tracing, continue_trace
from stator.testing.fake_models import EngineCall, FakeEngine, FakeModels
from stator.testing.frontend_kit import RawClient, chat_body, frontend

pytestmark = pytest.mark.timeout(60)

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{PARENT}-01"
ENDPOINT = EndpointId.parse("demo.backend.generate")


class Collector:
    """An OTLP/HTTP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.spans: list[Any] = []
        self.services: set[str] = set()
        keep = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                keep.take(self.path, body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def take(self, path: str, body: bytes) -> None:
        self.paths.append(path)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {one.value.string_value for one in resource.resource.attributes if one.key == "service.name"}
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.close()


def attributes(span: Any) -> dict[str, Any]:
    values = {one.key: one.value for one in span.attributes}
    return {name: getattr(value, value.WhichOneof("value")) for name, value in values.items()}


async def begin(config: TraceConfig, logs: LogConfig) -> Callable[[], None]:
    """As the command line does it, before there is a loop: a thread is started."""
    return await asyncio.to_thread(configure_tracing, config, logs)


async def end(undo: Callable[[], None]) -> None:
    """Export what is left; that waits for the collector."""
    await asyncio.to_thread(undo)


async def test_frontend_and_worker_are_spans_of_one_trace(collector: Collector) -> None:
    undo = await begin(TraceConfig(export=True, endpoint=collector.url, service_name="mine"), LogConfig())
    models = FakeModels()
    engine = models.add("echo", FakeEngine())
    try:
        async with frontend(models) as running, RawClient(running.port) as raw:
            await raw.request("POST", "/v1/chat/completions", chat_body("abc"), traceparent=HEADER, x_request_id="mine")
            await raw.answer()
            await raw.request("POST", "/v1/chat/completions", chat_body("abc", model="nobody"))
            await raw.answer()
            await running.until_logged()
        worker = RequestLog(SystemClock())
        now = time.monotonic()
        worker.completed("r-1", ENDPOINT, 7, now - 0.25, now - 0.2, now - 0.1, now, 3, 167, "ok", "", engine.calls[0].headers)
        worker.flush()
    finally:
        await end(undo)
    assert set(collector.paths) == {"/v1/traces"}
    assert collector.services == {"mine"}
    by_name = {(span.name, span.trace_id.hex() == TRACE): span for span in collector.spans}
    assert len(collector.spans) == len(by_name) == 3
    http, failed, handled = by_name["http-request", True], by_name["http-request", False], by_name["handle_payload", True]
    assert http.parent_span_id.hex() == PARENT
    assert handled.parent_span_id == http.span_id
    assert attributes(http) | {"stator.model": "echo", "stator.x_request_id": "mine", "stator.status": 200} == attributes(http)
    facts = {"stator.request_id": "r-1", "stator.endpoint": "generate", "stator.items": 3, "stator.outcome": "ok"}
    assert attributes(handled) | facts == attributes(handled)
    assert handled.end_time_unix_nano - handled.start_time_unix_nano == pytest.approx(0.25e9, rel=0.01)
    assert abs(handled.end_time_unix_nano / 1e9 - time.time()) < 30
    assert failed.parent_span_id == b""
    assert (failed.status.code, failed.status.message) == (2, "model_not_found")
    assert http.status.code == handled.status.code == 1


async def test_an_endpoint_for_traces_is_used_as_it_is(collector: Collector) -> None:
    undo = await begin(TraceConfig(export=True, traces_endpoint=f"{collector.url}/own/path"), LogConfig())
    log = RequestLog(SystemClock())
    log.completed("r-1", ENDPOINT, 7, 1.0, 1.0, 0.0, 2.0, 0, 0, "refused", "overloaded")
    log.flush()
    await end(undo)
    assert collector.paths == ["/own/path"]
    assert collector.services == {"stator"}
    assert collector.spans[0].status.message == "overloaded"


async def test_what_a_sender_did_not_sample_is_not_exported_and_the_ratio_is_kept(collector: Collector) -> None:
    undo = await begin(TraceConfig(export=True, endpoint=collector.url, sample_ratio=0.25), LogConfig())
    log = RequestLog(SystemClock())
    assert log.enabled and log.tracing
    for _ in range(20):
        log.completed("no", ENDPOINT, 7, 1.0, 1.0, 0.0, 2.0, 0, 0, "ok", "", {"traceparent": HEADER[:-1] + "0"})
        log.completed("yes", ENDPOINT, 7, 1.0, 1.0, 0.0, 2.0, 0, 0, "ok", "", {"traceparent": HEADER})
    for _ in range(1000):
        log.completed("some", ENDPOINT, 7, 1.0, 1.0, 0.0, 2.0, 0, 0, "ok")
    log.flush()
    await end(undo)
    assert not log.enabled  # it was for the spans alone
    counted = [attributes(span)["stator.request_id"] for span in collector.spans]
    assert (counted.count("no"), counted.count("yes")) == (0, 20)
    assert 150 < counted.count("some") < 350


async def test_line_and_span_of_a_request_have_the_same_ids(collector: Collector) -> None:
    out = io.StringIO()
    quiet = configure_logging(LogConfig(log_format="json"), stream=out)
    undo = await begin(TraceConfig(export=True, endpoint=collector.url), LogConfig())
    log = RequestLog(SystemClock())
    try:
        for headers in ({}, {"traceparent": HEADER}):
            log.completed("r", ENDPOINT, 7, 1.0, 1.0, 0.0, 2.0, 0, 0, "ok", "", headers)
        log.flush()
    finally:
        quiet()
        await end(undo)
    lines = {(line["trace_id"], line["span_id"]) for line in map(json.loads, out.getvalue().splitlines()) if "trace_id" in line}
    assert lines == {(span.trace_id.hex(), span.span_id.hex()) for span in collector.spans}
    assert len(lines) == 2


async def test_a_collector_that_is_gone_stops_nobody(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    url = collector.url
    collector.server.socket.close()
    undo = await begin(TraceConfig(export=True, endpoint=url), LogConfig())
    log = RequestLog(SystemClock())
    started = time.monotonic()
    for _ in range(20):
        for _ in range(500):
            log.completed("r", ENDPOINT, 7, 1.0, 1.0, 0.0, 2.0, 0, 0, "ok")
        log.flush()
        await asyncio.sleep(0)
    assert time.monotonic() - started < 5
    started = time.monotonic()
    await end(undo)
    assert time.monotonic() - started < 10


class TracedEngine:
    """What a frontend with JSON lines sent to the worker, and what it wrote."""

    def __init__(self) -> None:
        self.models = FakeModels()
        self.engine = self.models.add("echo", FakeEngine())

    async def ask(self, **headers: str) -> tuple[EngineCall, list[dict[str, Any]]]:
        out = io.StringIO()
        undo = configure_logging(LogConfig(log_format="json"), stream=out)
        try:
            async with frontend(self.models) as running, RawClient(running.port) as raw:
                await raw.request("POST", "/v1/chat/completions", chat_body("abc"), **headers)
                await raw.answer()
                await running.until_logged()
        finally:
            undo()
        lines = [json.loads(line) for line in out.getvalue().splitlines()]
        return self.engine.calls[-1], [line for line in lines if line["target"] == "stator.request"]


async def test_json_lines_begin_a_trace_where_there_is_none() -> None:
    call, (line,) = await TracedEngine().ask()
    below = continue_trace(call.headers)
    assert below is not None
    assert (line["trace_id"], line["span_id"], line["span_name"]) == (below.trace_id, below.parent_id, "http-request")
    assert "parent_id" not in line


async def test_a_given_trace_goes_on() -> None:
    call, (line,) = await TracedEngine().ask(traceparent=HEADER, tracestate="a=1", x_request_id="mine")
    below = continue_trace(call.headers)
    assert below is not None
    assert (line["trace_id"], line["parent_id"], line["span_id"]) == (TRACE, PARENT, below.parent_id)
    assert call.headers["tracestate"] == line["tracestate"] == "a=1"
    assert call.headers["x-request-id"] == line["x_request_id"] == line["request_id"] == "mine"


async def test_without_json_lines_and_export_no_trace_is_begun() -> None:
    models = FakeModels()
    engine = models.add("echo", FakeEngine())
    async with frontend(models) as running, RawClient(running.port) as raw:
        await raw.request("POST", "/v1/chat/completions", chat_body("abc"))
        await raw.answer()
    assert engine.calls[0].headers == {}
