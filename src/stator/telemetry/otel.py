"""Spans to an OpenTelemetry collector, by the official SDK: its batch processor queues, drops and sends in a thread of its own.

The event loop's part is to queue a record: what a span says is put together in that thread. Needs the extra `otel`.
"""

import importlib
import logging
import threading
from collections.abc import Mapping, Sequence
from random import Random, SystemRandom
from typing import Any, cast

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from stator.errors import ConfigError
from stator.telemetry.request_lines import Completed, Note, SpanFacts, as_span
from stator.telemetry.trace import TraceContext, request_id_of

__all__ = ["SpanExport", "open_export"]

logger = logging.getLogger(__name__)

_LAST_WORDS = 3.0
"""seconds that closing waits for the collector, beside a request that is on its way"""
_GRPC = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"


def open_export(*, endpoint: str, traces_endpoint: str, grpc: bool, service: str, ratio: float) -> "SpanExport | None":
    """Begin to export; None, with a warning, if the wanted protocol is not installed. Raises `ConfigError` for a bad endpoint.

    With neither endpoint it is the SDK's default. Over HTTP `endpoint` is completed by `/v1/traces`, `traces_endpoint` is not.
    """
    given = traces_endpoint or endpoint
    if given and not given.startswith(("http://", "https://")):
        raise ConfigError(f"OTEL_EXPORTER_OTLP_ENDPOINT={given!r}: expected http://host:port or https://host:port")
    if grpc:
        exporter = _grpc(given)
    elif traces_endpoint or not endpoint:
        exporter = OTLPSpanExporter(endpoint=traces_endpoint or None)
    else:
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    return None if exporter is None else SpanExport(exporter, service=service, ratio=ratio)


def _grpc(endpoint: str) -> SpanExporter | None:
    try:
        module: Any = importlib.import_module(_GRPC)
    except ImportError:
        logger.warning(
            "OTEL_EXPORTER_OTLP_PROTOCOL=grpc has no effect: no spans are exported; "
            "pip install opentelemetry-exporter-otlp-proto-grpc, or use http/protobuf"
        )
        return None
    return module.OTLPSpanExporter(endpoint=endpoint or None)


class SpanExport:
    """`stator.telemetry.tracing.SpanSink` on the SDK."""

    def __init__(
        self,
        exporter: SpanExporter,
        *,
        service: str,
        ratio: float = 1.0,
        random: Random | None = None,
        delay: float | None = None,
    ) -> None:
        """`ratio` of the traces that begin here are sampled. `delay` is the time between two exports, in seconds; None: the SDK's."""
        resource = Resource.create({"service.name": service})
        self._exporter = _Building(exporter, resource)
        self._processor = BatchSpanProcessor(self._exporter, schedule_delay_millis=None if delay is None else delay * 1e3)
        self._limit = int(ratio * 2**64)
        self._random = random or SystemRandom()

    def root(self, headers: Mapping[str, str]) -> TraceContext:
        """As the SDK's sampler by ratio: decided by the last 64 bits of the trace id, so that all who ask agree."""
        trace_id = f"{self._random.getrandbits(128) or 1:032x}"
        return TraceContext(
            trace_id=trace_id,
            span_id=f"{self._random.getrandbits(64) or 1:016x}",
            flags="01" if int(trace_id[16:], 16) < self._limit else "00",
            request_id=request_id_of(headers),
        )

    def put(self, record: Completed | Note, offset: float) -> None:
        trace = record[5] if len(record) == 8 else record[12]
        if trace is not None and int(trace.flags, 16) & 1:
            # The processor looks at nothing but `context`; what comes out at the other end is made into spans there.
            self._processor.on_end(cast("ReadableSpan", _Ended(record, offset)))

    def close(self) -> None:
        # The processor would go on trying for half a minute, whatever time it is given.
        limit = threading.Timer(_LAST_WORDS, self._exporter.shutdown)
        limit.start()
        try:
            self._processor.shutdown()
        finally:
            limit.cancel()


class _Ended:
    """A record on its way through the queue."""

    __slots__ = ("offset", "record")

    context = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

    def __init__(self, record: Completed | Note, offset: float) -> None:
        self.record = record
        self.offset = offset


class _Building(SpanExporter):
    """Makes spans of records, in the processor's thread, and hands them on."""

    def __init__(self, inner: SpanExporter, resource: Resource) -> None:
        self._inner = inner
        self._resource = resource
        self._closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._closed:
            return SpanExportResult.FAILURE
        found = [as_span(ended.record, ended.offset) for ended in cast("Sequence[_Ended]", spans)]
        return self._inner.export([self._built(facts) for facts in found if facts is not None])

    def _built(self, facts: SpanFacts) -> ReadableSpan:
        trace = facts.trace
        context = _context(trace, trace.span_id, is_remote=False)
        return ReadableSpan(
            name=facts.name,
            context=context,
            parent=_context(trace, trace.parent_id, is_remote=True) if trace.parent_id else None,
            resource=self._resource,
            attributes={f"stator.{name}": value for name, value in facts.attributes.items()},
            kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR, facts.failure) if facts.failure else Status(StatusCode.OK),
            start_time=int(facts.began * 1e9),
            end_time=int(facts.ended * 1e9),
        )

    def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)


def _context(trace: TraceContext, span_id: str, *, is_remote: bool) -> SpanContext:
    return SpanContext(
        int(trace.trace_id, 16),
        int(span_id, 16),
        is_remote=is_remote,
        trace_flags=TraceFlags(int(trace.flags, 16)),
        trace_state=TraceState.from_header([trace.state]) if trace.state else None,
    )
