"""A trace goes through every plane: each process' span is below the one of who called it, and lines say so."""

import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from stator.runtime import Client, Context
from stator.telemetry import LogConfig, configure_logging, parse_traceparent
from stator.testing.cluster import PLANES, Cluster
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(60)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "a=1", "x-request-id": "mine"}


@pytest.fixture(params=PLANES)
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    async with Cluster.open(request.param) as cluster:
        yield cluster


class Chain:
    """Two endpoints: `outer` calls `inner` for its request. `seen` are the contexts, in the order of the calls."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.seen: list[Context] = []

    async def start(self) -> Client:
        await self.cluster.worker(self.inner, endpoint="demo.inner.generate")
        await self.cluster.worker(self.outer, endpoint="demo.outer.generate")
        self.below: Client = await self.cluster.client(endpoint="demo.inner.generate")
        return await self.cluster.client(endpoint="demo.outer.generate")

    async def outer(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.seen.append(context)
        async for item in self.below.generate(request, context):
            yield item

    async def inner(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.seen.append(context)
        yield dict(context.headers)


async def test_a_trace_goes_on_from_process_to_process(cluster: Cluster) -> None:
    chain = Chain(cluster)
    client = await chain.start()
    for _ in range(2):
        (received,) = await client.generate(1, headers=GIVEN).collect()
        outer, inner = chain.seen[-2:]
        assert outer.headers == GIVEN
        assert outer.trace is not None and inner.trace is not None
        assert (outer.trace.trace_id, outer.trace.parent_id) == (TRACE, SPAN)
        assert (inner.trace.trace_id, inner.trace.parent_id) == (TRACE, outer.trace.span_id)
        assert received == outer.trace.headers()
        assert (received["tracestate"], received["x-request-id"]) == ("a=1", "mine")
        assert len({SPAN, outer.trace.span_id, inner.trace.span_id}) == 3
        assert outer.trace is outer.trace
    spans = {context.trace.span_id for context in chain.seen if context.trace is not None}
    assert len(spans) == 4


async def test_without_a_trace_there_is_none(cluster: Cluster) -> None:
    chain = Chain(cluster)
    client = await chain.start()
    assert await client.generate(1).collect() == [{}]
    assert [context.trace for context in chain.seen] == [None, None]
    (received,) = await client.generate(1, headers={"x-request-id": "mine"}).collect()
    assert received == {"x-request-id": "mine"}
    assert [context.trace for context in chain.seen] == [None] * 4


async def test_headers_given_with_a_call_win(cluster: Cluster) -> None:
    chain = Chain(cluster)
    await chain.start()
    context = Context("r", headers=dict(GIVEN))
    (received,) = await chain.below.generate(1, context, headers={"x-request-id": "other"}).collect()
    assert received == {"x-request-id": "other"}


async def test_lines_have_the_spans_of_the_contexts(cluster: Cluster) -> None:
    chain = Chain(cluster)
    client = await chain.start()
    out = io.StringIO()
    undo = configure_logging(LogConfig(log="off,stator.request=debug", log_format="json"), stream=out)
    try:
        await client.generate(1, headers=GIVEN).collect()
        await eventually(lambda: out.getvalue().count("request completed") == 2)
    finally:
        undo()
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    found = {(line["message"], line["component"]): (line["trace_id"], line["span_id"], line["parent_id"]) for line in lines}
    outer, inner = (context.trace for context in chain.seen)
    assert outer is not None and inner is not None
    for message in ("request received", "request completed"):
        assert found[message, "outer"] == (TRACE, outer.span_id, SPAN)
        assert found[message, "inner"] == (TRACE, inner.span_id, outer.span_id)
    assert {line["x_request_id"] for line in lines} == {"mine"}


def test_a_child_context_is_the_same_span() -> None:
    parent = Context("r", headers=dict(GIVEN))
    child = parent.child("r-0")
    assert child.trace is parent.trace
    span = parse_traceparent(child.outgoing_headers()["traceparent"])
    assert span is not None and parent.trace is not None
    assert span.span_id == parent.trace.span_id
    assert Context("r").child().outgoing_headers() == {}
