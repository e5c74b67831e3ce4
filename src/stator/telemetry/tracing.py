"""Whether spans are exported, and what of the telemetry settings has no effect.

Only the command line calls `configure_tracing`. The exporter itself is in `stator.telemetry.otel`, which needs the extra `otel`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal, Protocol

from stator.config import Config, Setting
from stator.telemetry.logs import LogConfig, tell_configured
from stator.telemetry.request_lines import Completed, Note
from stator.telemetry.trace import TraceContext

__all__ = ["SpanSink", "TraceConfig", "active_sink", "configure_tracing", "without_effect"]

logger = logging.getLogger(__name__)


class TraceConfig(Config, frozen=True, kw_only=True):
    """Where the spans of requests go. What is not here (headers, certificates, batching) the OpenTelemetry SDK reads itself."""

    section: ClassVar[str] = "otel"

    export: Annotated[bool, Setting(doc="export a span for each request, by OTLP", dyn="OTEL_EXPORT_ENABLED")] = False
    endpoint: Annotated[
        str,
        Setting(doc="collector; empty: localhost, port 4318 (http) or 4317 (grpc)", dyn="OTEL_EXPORTER_OTLP_ENDPOINT"),
    ] = ""
    traces_endpoint: Annotated[
        str, Setting(doc="collector of spans, used as it is; empty: endpoint", dyn="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    ] = ""
    logs_endpoint: Annotated[
        str, Setting(doc="has no effect: log lines go to stderr alone", dyn="OTEL_EXPORTER_OTLP_LOGS_ENDPOINT")
    ] = ""
    protocol: Annotated[
        Literal["http/protobuf", "grpc"] | None,
        Setting(
            doc="how spans travel; none: http/protobuf (the reference: grpc)",
            dyn=("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"),
        ),
    ] = None
    service_name: Annotated[str, Setting(doc="name of this service in traces; empty: stator", dyn="OTEL_SERVICE_NAME")] = ""
    sample_ratio: Annotated[
        float | None,
        Setting(
            doc="share of the traces begun here that is exported; none: all. Continued ones follow their sender",
            dyn="OTEL_TRACES_SAMPLE_RATIO",
            ge=0,
            le=1,
        ),
    ] = None


class SpanSink(Protocol):
    """Who exports spans. Called on the event loop, so that nothing in it may wait."""

    def root(self, headers: Mapping[str, str]) -> TraceContext:
        """The first span of a new trace, sampled or not, for a request that arrived with `headers`."""
        ...

    def put(self, record: Completed | Note, offset: float) -> None:
        """Export a record as a span, if it has a trace that is sampled. `offset` makes wall time of its times."""
        ...

    def close(self) -> None:
        """Export what is left, within a few seconds."""
        ...


_active: SpanSink | None = None


def active_sink() -> SpanSink | None:
    """Who exports the spans of this process; None: nobody."""
    return _active


def configure_tracing(config: TraceConfig, logs: LogConfig, *, warn: bool = True) -> Callable[[], None]:
    """Export spans from now on if `config` says so. Returns what ends it; that waits a few seconds for the collector.

    `warn` of every setting that does nothing, unless another process does. Raises `ConfigError` for an endpoint that is none.
    """
    told = without_effect(config, logs) if warn else []
    for text in told:
        logger.warning("%s", text)
    if config.export and (sink := _open(config, warn=warn)) is not None:
        _use(sink)
        return lambda: _close(sink)
    return _nothing


def without_effect(config: TraceConfig, logs: LogConfig) -> list[str]:
    """What somebody set in vain, one sentence each."""
    found: list[str] = []
    if not config.export:
        given = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": config.endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": config.traces_endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": config.protocol,
            "OTEL_SERVICE_NAME": config.service_name,
            "OTEL_TRACES_SAMPLE_RATIO": config.sample_ratio,
        }
        found += [
            f"{name} has no effect: spans are exported with OTEL_EXPORT_ENABLED=true (STATOR_OTEL_EXPORT) only"
            for name, value in given.items()
            if value not in ("", None)
        ]
    elif config.endpoint and config.traces_endpoint:
        found.append("OTEL_EXPORTER_OTLP_ENDPOINT has no effect beside OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if config.logs_endpoint:
        found.append("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT has no effect: log lines go to stderr; let a collector read them there")
    if logs.log_span_events:
        needs = "" if logs.log_format == "json" else " (and would need DYN_LOGGING_JSONL)"
        found.append(
            f"DYN_LOGGING_SPAN_EVENTS has no effect{needs}: the line of a request tells the times of its phases itself"
        )
    if logs.log_config_path:
        found.append(
            "DYN_LOGGING_CONFIG_PATH has no effect: give levels by DYN_LOG or STATOR_LOG, or in the file of STATOR_CONFIG"
        )
    return found


def _open(config: TraceConfig, *, warn: bool) -> SpanSink | None:
    try:
        from stator.telemetry.otel import open_export  # needs an extra
    except ImportError as error:
        if warn:
            logger.warning(
                "OTEL_EXPORT_ENABLED has no effect: OpenTelemetry is not installed (%s); pip install 'stator[otel]'", error
            )
        return None
    return open_export(
        endpoint=config.endpoint,
        traces_endpoint=config.traces_endpoint,
        grpc=config.protocol == "grpc",
        service=config.service_name or "stator",
        ratio=1.0 if config.sample_ratio is None else config.sample_ratio,
    )


def _use(sink: SpanSink | None) -> None:
    global _active
    _active = sink
    tell_configured()


def _close(sink: SpanSink) -> None:
    if _active is sink:
        _use(None)
    sink.close()


def _nothing() -> None: ...
