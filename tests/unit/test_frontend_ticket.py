"""Ids, metadata, and ending a request from outside."""

import asyncio

import pytest

from stator.errors import Unavailable
from stator.frontend.ticket import Ticket, propagated_headers, request_metadata
from stator.telemetry import TraceContext

UUID_TEXT = "0b7f4c1e-3a52-4b8e-9a55-1f0c6e7d8a90"


def ticket(**headers: str) -> Ticket:
    return Ticket({name.replace("_", "-"): value for name, value in headers.items()}, new_id=lambda: "new", now=0.0)


def test_ids() -> None:
    assert (ticket().id, ticket().shown_id) == ("new", "new")
    assert (ticket(x_request_id="mine").id, ticket(x_request_id="mine").shown_id) == ("new", "mine")
    both = ticket(x_request_id="mine", x_dynamo_request_id=UUID_TEXT.upper())
    assert (both.id, both.shown_id) == (UUID_TEXT, "mine")


@pytest.mark.parametrize("bad", ["", "x", "z" * 36, UUID_TEXT + "0", "{" + UUID_TEXT[:34] + "}"])
def test_request_ids_that_are_no_uuid_are_ignored(bad: str) -> None:
    assert ticket(x_dynamo_request_id=bad).id == "new"


@pytest.mark.parametrize("bad", ["a b", "a\tb", "é", "x" * 201])
def test_request_ids_that_cannot_be_shown_are_ignored(bad: str) -> None:
    assert ticket(x_request_id=bad).shown_id == "new"


def test_what_travels() -> None:
    headers = {"traceparent": "t", "x-request-id": "r", "cookie": "c", "X-Dynamo-Meta-Tenant": "blue", "x-dynamo-meta-": "no"}
    assert propagated_headers(headers, None) == {"x-request-id": "r"}  # no trace that could be continued
    assert propagated_headers({"x-request-id": "x" * 300}, None) == {}
    trace = TraceContext(trace_id="1" * 32, span_id="2" * 16, parent_id="3" * 16, state="s=1", request_id="r")
    expected = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01", "tracestate": "s=1", "x-request-id": "r"}
    assert propagated_headers(headers, trace) == expected
    assert request_metadata(headers) == {"tenant": "blue"}


async def test_an_aborted_request_ends_with_the_given_error() -> None:
    mine, error = ticket(), Unavailable("stop")

    async def work() -> object:
        mine.enter()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as cancelled:
            recovered = mine.recover(cancelled)
        await asyncio.sleep(0)  # no longer cancelled
        return recovered

    async with asyncio.TaskGroup() as group:
        task = group.create_task(work())
        await asyncio.sleep(0)
        mine.abort(error)
        mine.abort(Unavailable("again"))
    assert task.result() is error


async def test_other_cancellations_stay() -> None:
    mine = ticket()
    mine.enter()
    cancelled = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        mine.recover(cancelled)
    mine.leave()
    mine.abort(Unavailable("late"))
    await asyncio.sleep(0)
