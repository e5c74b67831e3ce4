"""What a process says about itself: metrics, log lines, trace context. Rooms declare their own names; none is known here."""

from stator.telemetry.exposition import CONTENT_TYPE
from stator.telemetry.hierarchy import IntCounter, IntGauge, MetricsLevel
from stator.telemetry.logs import LogConfig, configure_logging, parse_levels
from stator.telemetry.loop_delay import LoopDelay
from stator.telemetry.metric import Counter, Family, Gauge, Histogram
from stator.telemetry.metric_set import MetricSet
from stator.telemetry.request_log import Outcome, RequestLog
from stator.telemetry.trace import TraceContext, continue_trace, outgoing_headers, parse_traceparent, request_id_of
from stator.telemetry.tracing import TraceConfig, configure_tracing
from stator.telemetry.work_handler import RequestPlaneMetrics, WorkerProcessMetrics, WorkError, WorkHandlerMetrics

__all__ = [
    "CONTENT_TYPE",
    "Counter",
    "Family",
    "Gauge",
    "Histogram",
    "IntCounter",
    "IntGauge",
    "LogConfig",
    "LoopDelay",
    "MetricSet",
    "MetricsLevel",
    "Outcome",
    "RequestLog",
    "RequestPlaneMetrics",
    "TraceConfig",
    "TraceContext",
    "WorkError",
    "WorkHandlerMetrics",
    "WorkerProcessMetrics",
    "configure_logging",
    "configure_tracing",
    "continue_trace",
    "outgoing_headers",
    "parse_levels",
    "parse_traceparent",
    "request_id_of",
]
