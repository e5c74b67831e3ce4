"""Trace context: what is accepted, what begins a new trace, what goes on."""

from random import Random

import pytest

from stator.telemetry import TraceContext, continue_trace, outgoing_headers, parse_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADER = f"00-{TRACE}-{SPAN}-01"


def test_a_request_continues_the_senders_trace() -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-00", "tracestate": "a=1,b=2", "x-request-id": "r-1", "request-id": "not this"}
    span = TraceContext.receive(headers, Random(1))
    assert (span.trace_id, span.parent_id, span.flags) == (TRACE, SPAN, "00")
    assert span.span_id not in (SPAN, "")
    assert span.headers() == {"traceparent": f"00-{TRACE}-{span.span_id}-00", "tracestate": "a=1,b=2", "x-request-id": "r-1"}


def test_a_child_is_below_its_parent_in_the_same_trace() -> None:
    parent = TraceContext.new(Random(1))
    child = parent.child(Random(2))
    assert (child.trace_id, child.parent_id) == (parent.trace_id, parent.span_id)
    assert child.span_id != parent.span_id
    assert parent.headers() == {"traceparent": f"00-{parent.trace_id}-{parent.span_id}-01"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        HEADER.upper(),
        HEADER[:-1],
        HEADER + "-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"00_{TRACE}_{SPAN}_01",
        HEADER + "\n" + HEADER,
    ],
)
def test_a_malformed_header_begins_a_new_trace(text: str) -> None:
    assert parse_traceparent(text) is None
    span = TraceContext.receive({"traceparent": text, "tracestate": "a=1", "x-request-id": "r"}, Random(3))
    assert span.trace_id != TRACE and span.parent_id == "" and span.state == "" and span.request_id == "r"
    assert parse_traceparent(span.traceparent) is not None


def test_later_versions_may_carry_more() -> None:
    span = parse_traceparent(f" cc-{TRACE}-{SPAN}-01-what-the-future-brings ")
    assert span is not None and (span.trace_id, span.span_id) == (TRACE, SPAN)


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "x" * 513, "naïve"])
def test_what_must_not_go_into_a_header_again_is_dropped(value: str) -> None:
    span = TraceContext.receive({"traceparent": HEADER, "tracestate": value, "x-request-id": value}, Random(3))
    assert set(span.headers()) == {"traceparent"}


def test_ids_come_from_the_given_randomness_and_are_never_zero() -> None:
    class Zero(Random):
        def getrandbits(self, k: int, /) -> int:
            return 0

    assert TraceContext.new(Random(5)) == TraceContext.new(Random(5)) != TraceContext.new(Random(6))
    assert parse_traceparent(TraceContext.new(Zero()).traceparent) is not None


def test_only_a_trace_that_is_there_is_continued() -> None:
    assert continue_trace({}) is None
    assert continue_trace({"x-request-id": "r", "tracestate": "a=1"}) is None
    assert continue_trace({"traceparent": "garbage"}) is None
    span = continue_trace({"traceparent": HEADER, "x-request-id": "r"}, Random(1))
    assert span is not None
    assert (span.trace_id, span.parent_id, span.request_id) == (TRACE, SPAN, "r")
    other = continue_trace({"traceparent": HEADER})
    assert other is not None and other.span_id not in (span.span_id, SPAN)


def test_a_call_made_for_a_request_is_below_its_own_span() -> None:
    received = {"traceparent": HEADER, "x-request-id": "r", "other": "kept"}
    span = continue_trace(received)
    assert span is not None
    sent = outgoing_headers(received, span)
    assert sent == {"traceparent": f"00-{TRACE}-{span.span_id}-01", "x-request-id": "r", "other": "kept"}
    below = continue_trace(sent)
    assert below is not None and (below.trace_id, below.parent_id) == (TRACE, span.span_id)
    assert outgoing_headers(received, None) == received
