"""Names of the metrics that dashboards know, their buckets, and how free text becomes a name (`spec/30 §2.2, §6-§9`).

Names of the component family are suffixes: a level puts `dynamo_component_` before them. All others are whole names.
"""

import re
from enum import StrEnum

from stator.errors import UsageError

__all__ = [
    "AUTO_LABELS",
    "COMPONENT_PREFIX",
    "FIRST_RESPONSE_BUCKETS",
    "FRONTEND_PREFIX",
    "NETWORK_TRANSIT_BUCKETS",
    "PERMIT_WAIT_BUCKETS",
    "REQUEST_DURATION_BUCKETS",
    "REQUEST_PLANE_BUCKETS",
    "ROUNDTRIP_BUCKETS",
    "ComponentName",
    "Label",
    "RequestPlaneName",
    "TransportName",
    "WorkHandlerName",
    "component_metric_name",
    "frontend_prefix",
    "sanitize_label",
    "sanitize_name",
]

COMPONENT_PREFIX = "dynamo_component"
FRONTEND_PREFIX = "dynamo_frontend"

REQUEST_DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
"""seconds from entry of a request to its end"""
NETWORK_TRANSIT_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1)
"""seconds on the way from client to worker"""
FIRST_RESPONSE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""seconds from entry to the prologue"""
PERMIT_WAIT_BUCKETS = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)
"""seconds of waiting for a slot"""
REQUEST_PLANE_BUCKETS = NETWORK_TRANSIT_BUCKETS
"""seconds in the client until a request is sent, and until it is acknowledged"""
ROUNDTRIP_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""seconds from sending a request to its first item"""


class Label(StrEnum):
    """Label names that several families share."""

    NAMESPACE = "dynamo_namespace"
    COMPONENT = "dynamo_component"
    ENDPOINT = "dynamo_endpoint"
    WORKER_ID = "worker_id"
    DP_RANK = "dp_rank"
    MODEL = "model"
    MODEL_NAME = "model_name"
    WORKER_TYPE = "worker_type"
    ROUTER_ID = "router_id"
    ERROR_TYPE = "error_type"


AUTO_LABELS: tuple[str, ...] = (Label.NAMESPACE, Label.COMPONENT, Label.ENDPOINT, Label.WORKER_ID)
"""what a level adds to its metrics; nobody else may set them"""


class ComponentName(StrEnum):
    """Suffixes after `dynamo_component_`: of an endpoint's work handler, of an engine, of a KV publisher, of the runtime."""

    REQUESTS_TOTAL = "requests_total"
    INFLIGHT_REQUESTS = "inflight_requests"
    REQUEST_BYTES_TOTAL = "request_bytes_total"
    RESPONSE_BYTES_TOTAL = "response_bytes_total"
    REQUEST_DURATION_SECONDS = "request_duration_seconds"
    ERRORS_TOTAL = "errors_total"
    CANCELLATION_TOTAL = "cancellation_total"
    UPTIME_SECONDS = "uptime_seconds"
    MODEL_LOAD_TIME_SECONDS = "model_load_time_seconds"
    CLEANUP_TIME_SECONDS = "cleanup_time_seconds"
    DRAIN_TIME_SECONDS = "drain_time_seconds"
    TOTAL_BLOCKS = "total_blocks"
    GPU_CACHE_USAGE_PERCENT = "gpu_cache_usage_percent"
    KV_CACHE_HIT_RATE = "kv_cache_hit_rate"
    KV_PUBLISHER_ENGINES_DROPPED_EVENTS_TOTAL = "kv_publisher_engines_dropped_events_total"
    KV_PUBLISHER_ZMQ_EVENTS_TOTAL = "kv_publisher_zmq_events_total"
    KV_PUBLISHER_ZMQ_FILTERED_EVENTS_TOTAL = "kv_publisher_zmq_filtered_events_total"
    KV_PUBLISHER_ZMQ_CONVERSION_ISSUES_TOTAL = "kv_publisher_zmq_conversion_issues_total"
    KV_PUBLISHER_ZMQ_SUSPICIOUS_EVENTS_TOTAL = "kv_publisher_zmq_suspicious_events_total"


class WorkHandlerName(StrEnum):
    """Of a worker process as a whole, without labels (`spec/30 §7`)."""

    NETWORK_TRANSIT_SECONDS = "dynamo_work_handler_network_transit_seconds"
    TIME_TO_FIRST_RESPONSE_SECONDS = "dynamo_work_handler_time_to_first_response_seconds"
    QUEUE_DEPTH = "dynamo_work_handler_queue_depth"
    QUEUE_CAPACITY = "dynamo_work_handler_queue_capacity"
    ENQUEUE_REJECTED_TOTAL = "dynamo_work_handler_enqueue_rejected_total"
    PERMIT_WAIT_SECONDS = "dynamo_work_handler_permit_wait_seconds"
    POOL_ACTIVE_TASKS = "dynamo_work_handler_pool_active_tasks"
    POOL_CAPACITY = "dynamo_work_handler_pool_capacity"
    ENGINE_REQUEST = "dynamo_engine_request"
    REQUEST_QUEUE = "dynamo_request_queue"
    REJECTION_REQUEST_TOTAL = "dynamo_rejection_request_total"


class RequestPlaneName(StrEnum):
    """Of a process that sends requests (`spec/30 §8.3`)."""

    QUEUE_SECONDS = "dynamo_request_plane_queue_seconds"
    SEND_SECONDS = "dynamo_request_plane_send_seconds"
    ROUNDTRIP_TTFT_SECONDS = "dynamo_request_plane_roundtrip_ttft_seconds"
    INFLIGHT_REQUESTS = "dynamo_request_plane_inflight_requests"


class TransportName(StrEnum):
    """Of the carriers below the request plane, on the sending side (`spec/30 §8.3`)."""

    TCP_BYTES_SENT_TOTAL = "dynamo_transport_tcp_bytes_sent_total"
    TCP_BYTES_RECEIVED_TOTAL = "dynamo_transport_tcp_bytes_received_total"
    TCP_ERRORS_TOTAL = "dynamo_transport_tcp_errors_total"
    NATS_ERRORS_TOTAL = "dynamo_transport_nats_errors_total"


_NOT_IN_NAME = re.compile(r"[^a-zA-Z0-9_:]")
_NOT_IN_LABEL = re.compile(r"[^a-zA-Z0-9_]")
_BEGIN = re.compile(r"[a-zA-Z_]")
_LETTER = re.compile(r"[a-zA-Z]")


def sanitize_name(raw: str) -> str:
    """`raw` as part of a metric name. Raises `UsageError` if nothing of it is left."""
    return _not_blank(_prefixed(_NOT_IN_NAME.sub("_", raw), _BEGIN), raw, "metric name")


def sanitize_label(raw: str) -> str:
    """`raw` as the value of one of the three name labels. Raises `UsageError` if nothing of it is left.

    Two leading underscores are dropped, once: `--x` becomes `x`.
    """
    text = _prefixed(_NOT_IN_LABEL.sub("_", raw), _BEGIN)
    if text.startswith("__"):
        text = _prefixed(text[2:], _LETTER)
    return _not_blank(text, raw, "label value")


def component_metric_name(raw: str) -> str:
    """The whole name of a metric that a level creates as `raw`. Raises as `sanitize_name`."""
    return f"{COMPONENT_PREFIX}_{sanitize_name(raw)}"


def frontend_prefix(raw: str) -> str:
    """`raw` as prefix of the frontend's metrics; the usual one if nothing of it is left."""
    try:
        return sanitize_name(raw)
    except UsageError:
        return FRONTEND_PREFIX


def _prefixed(text: str, begin: re.Pattern[str]) -> str:
    return text if begin.match(text) else f"_{text}"


def _not_blank(text: str, raw: str, what: str) -> str:
    if not text.strip("_"):
        raise UsageError(f"{raw!r} cannot be a {what}: use at least one letter or digit")
    return text
