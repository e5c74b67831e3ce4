"""The request as every plane carries it; planes differ only in how they write it down."""

from typing import Any, Literal

import msgspec

__all__ = ["Codec", "IncomingRequest", "RequestEnvelope"]

Codec = Literal["json", "msgpack"]


class RequestEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """What a client sends: made once per request, sent again unchanged on a retry.

    `payload` is the encoded request value (JSON). `metadata` and `headers` are small string maps; `headers` holds trace context
    (`traceparent`, `tracestate`, `x-request-id`; `spec/10 §9`). `deadline` is the time left in seconds when the envelope was made.
    A request that `streams_in` has no payload: its inputs follow one by one.
    """

    id: str
    payload: bytes
    metadata: dict[str, str] = {}
    headers: dict[str, str] = {}
    deadline: float | None = None
    streams_in: bool = False


class IncomingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker's plane hands up: the envelope with its payload decoded to plain values.

    One that `streams_in` has an async iterator of its inputs for a body (`stator.transports.inputs.InputStream`).
    `size` is the number of bytes it came in; `sent_ns` the caller's wall clock when it was sent, in nanoseconds, or 0.
    """

    id: str
    body: Any
    metadata: dict[str, str] = {}
    headers: dict[str, str] = {}
    deadline: float | None = None
    size: int = 0
    sent_ns: int = 0
    streams_in: bool = False
