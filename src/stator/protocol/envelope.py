"""The request as every plane carries it; planes differ only in how they write it down."""

from typing import Any, Literal

import msgspec

__all__ = ["Codec", "IncomingRequest", "RequestEnvelope"]

Codec = Literal["json", "msgpack"]


class RequestEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """What a client sends: made once per request, sent again unchanged on a retry.

    `payload` is the encoded request value (JSON). `metadata` and `headers` are small string maps; `headers` holds trace context
    (`traceparent`, `tracestate`, `x-request-id`; `spec/10 §9`). `deadline` is the time left in seconds when the envelope was made.
    """

    id: str
    payload: bytes
    metadata: dict[str, str] = {}
    headers: dict[str, str] = {}
    deadline: float | None = None


class IncomingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker's plane hands up: the envelope with its payload decoded to plain values."""

    id: str
    body: Any
    metadata: dict[str, str] = {}
    headers: dict[str, str] = {}
    deadline: float | None = None
