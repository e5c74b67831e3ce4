"""The headers of a request frame (`spec/10 §1.2, §9`): for logs and traces; a request is complete without them."""

import math

from stator.protocol.envelope import RequestEnvelope

__all__ = ["TRACE_HEADERS", "read_deadline", "read_sent_ns", "request_headers"]

TRACE_HEADERS = ("traceparent", "tracestate", "x-request-id")
"""What travels from the caller's context into the handler's."""

_SENT = "x-frontend-send-ts-ns"
_DEADLINE = "x-stator-deadline"
"""Seconds left when the request was sent; ours, unknown to the reference."""


def request_headers(path: str, envelope: RequestEnvelope, *, wall: float) -> dict[str, str]:
    """The headers of a request sent at `wall`, in seconds since the epoch."""
    headers = {"x-endpoint-path": path, "request-id": envelope.id, _SENT: str(int(wall * 1e9))}
    for name in TRACE_HEADERS:
        if name in envelope.headers:
            headers[name] = envelope.headers[name]
    if envelope.deadline is not None:
        headers[_DEADLINE] = f"{envelope.deadline:.3f}"
    return headers


def read_deadline(headers: dict[str, str]) -> float | None:
    """Seconds the caller will still wait, or None when it does not say."""
    text = headers.get(_DEADLINE)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def read_sent_ns(headers: dict[str, str]) -> int:
    """The sender's wall clock in nanoseconds since the epoch, 0 when it does not say."""
    text = headers.get(_SENT, "")
    return int(text) if len(text) < 20 and text.isascii() and text.isdigit() else 0
