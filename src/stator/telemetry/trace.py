"""W3C trace context: which trace a request belongs to, and the headers that carry it on (`spec/10 §9`)."""

import re
from collections.abc import Mapping
from random import Random, SystemRandom

import msgspec

__all__ = ["TraceContext", "continue_trace", "outgoing_headers", "parse_traceparent", "request_id_of"]

# version-traceid-parentid-flags; a version after 00 may append more fields (W3C Trace Context, section 3.2).
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_MAX_STATE = 512
_MAX_REQUEST_ID = 256
_RANDOM = SystemRandom()  # asked only where a trace is; keeps no state that a forked process would share


class TraceContext(msgspec.Struct, frozen=True, kw_only=True):
    """One span: what this process does for one request.

    `trace_id` is 32 and `span_id` 16 lower-case hex digits, neither all zero; `parent_id` is the span that caused this one
    or ""; `flags` two hex digits ("01": sampled). `state` and `request_id` are `tracestate` and `x-request-id` as received.
    """

    trace_id: str
    span_id: str
    parent_id: str = ""
    flags: str = "01"
    state: str = ""
    request_id: str = ""

    @classmethod
    def new(cls, random: Random, *, request_id: str = "") -> "TraceContext":
        """The first span of a new trace."""
        return cls(trace_id=_hex(random, 32), span_id=_hex(random, 16), request_id=request_id)

    @classmethod
    def receive(cls, headers: Mapping[str, str], random: Random) -> "TraceContext":
        """The span of a request that arrived with `headers` (names in lower case).

        It continues the sender's trace; without `traceparent`, or with a malformed one, it begins a new trace.
        """
        request_id = request_id_of(headers)
        parent = parse_traceparent(headers.get("traceparent", ""))
        if parent is None:
            return cls.new(random, request_id=request_id)
        return cls(
            trace_id=parent.trace_id,
            span_id=_hex(random, 16),
            parent_id=parent.span_id,
            flags=parent.flags,
            state=_clean(headers.get("tracestate", ""), _MAX_STATE),
            request_id=request_id,
        )

    def child(self, random: Random) -> "TraceContext":
        """A span below this one, as for an outgoing call."""
        return msgspec.structs.replace(self, span_id=_hex(random, 16), parent_id=self.span_id)

    @property
    def traceparent(self) -> str:
        """The header value that makes the receiver's span a child of this one."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    def headers(self) -> dict[str, str]:
        """What goes along with an outgoing call: `traceparent`, and `tracestate` and `x-request-id` if known."""
        found = {"traceparent": self.traceparent}
        if self.state:
            found["tracestate"] = self.state
        if self.request_id:
            found["x-request-id"] = self.request_id
        return found


def continue_trace(headers: Mapping[str, str], random: Random = _RANDOM) -> TraceContext | None:
    """The span of a request that arrived with `headers`, below the sender's; None if they name no trace. None begins here.

    Each call makes another span: ask once for each request, and only if it has headers.
    """
    return TraceContext.receive(headers, random) if parse_traceparent(headers.get("traceparent", "")) else None


def outgoing_headers(headers: Mapping[str, str], trace: TraceContext | None) -> dict[str, str]:
    """What a call made on behalf of a request carries: its `headers` as received, with its own span as the parent if it has one."""
    return dict(headers) if trace is None else {**headers, **trace.headers()}


def request_id_of(headers: Mapping[str, str]) -> str:
    """`x-request-id`, the client's own name for its request; "" if there is none that may be passed on."""
    return _clean(headers.get("x-request-id", ""), _MAX_REQUEST_ID)


def parse_traceparent(text: str) -> TraceContext | None:
    """The sender's span; None if `text` is not a valid header value."""
    match = _TRACEPARENT.fullmatch(text.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not trace_id.strip("0") or not span_id.strip("0"):
        return None
    return TraceContext(trace_id=trace_id, span_id=span_id, flags=flags)


def _hex(random: Random, digits: int) -> str:
    """A random number of so many hex digits, not zero."""
    return format(random.getrandbits(4 * digits) or 1, f"0{digits}x")


def _clean(text: str, limit: int) -> str:
    """`text` if it may go into a header again, else ""."""
    return text if len(text) <= limit and text.isascii() and text.isprintable() else ""
