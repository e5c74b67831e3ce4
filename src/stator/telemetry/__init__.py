"""What a process says about itself: metrics, log lines, trace context. Rooms declare their own names; none is known here."""

from stator.telemetry.logs import LogConfig, configure_logging, parse_levels
from stator.telemetry.metric import Counter, Family, Gauge, Histogram
from stator.telemetry.registry import CONTENT_TYPE, MetricRegistry
from stator.telemetry.trace import TraceContext, parse_traceparent

__all__ = [
    "CONTENT_TYPE",
    "Counter",
    "Family",
    "Gauge",
    "Histogram",
    "LogConfig",
    "MetricRegistry",
    "TraceContext",
    "configure_logging",
    "parse_levels",
    "parse_traceparent",
]
