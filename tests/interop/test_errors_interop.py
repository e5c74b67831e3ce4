"""Errors between a reference process and ours: each of its kinds, raised by its worker and by ours (`spec/10 §4.3, §4.4`)."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from interop.exchanges import Meeting, Place
from interop.peers import Peer, needs_reference
from stator.errors import (
    Cancelled,
    ConnectFailed,
    Disconnected,
    EngineError,
    Overloaded,
    PeerProtocolError,
    StatorError,
    StreamIncomplete,
    Timeout,
    Unavailable,
    UsageError,
)
from stator.protocol.wire_errors import BACKEND_KINDS, RUNTIME_KINDS, to_wire
from stator.runtime import Context

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

RAISED = {
    # what its handler raises: the kind, and how the message begins
    "ValueError": ("InvalidArgument", "ValueError: why"),
    "TypeError": ("InvalidArgument", "TypeError: why"),
    "UnicodeError": ("InvalidArgument", "UnicodeError: why"),
    "HttpError": ("InvalidArgument", '{"message":"why","code":422}'),
    "TimeoutError": ("ConnectionTimeout", "TimeoutError: why"),
    "ConnectionError": ("Disconnected", "ConnectionError: why"),
    "ConnectionResetError": ("Disconnected", "ConnectionResetError: why"),
    "AsyncioCancelledError": ("Cancelled", "CancelledError: why"),
    "GeneratorExit": ("EngineShutdown", "engine shutting down"),
    "RuntimeError": ("Unknown", "RuntimeError: why"),
    "KeyError": ("Unknown", "KeyError: 'why'"),
    "OSError": ("Unknown", "OSError: why"),
    "AssertionError": ("Unknown", "AssertionError: why"),
    # and its own exceptions
    "InvalidArgument": ("InvalidArgument", "why"),
    "CannotConnect": ("CannotConnect", "why"),
    "Disconnected": ("Disconnected", "why"),
    "ConnectionTimeout": ("ConnectionTimeout", "why"),
    "Cancelled": ("Cancelled", "why"),
    "EngineShutdown": ("EngineShutdown", "why"),
    "StreamIncomplete": ("StreamIncomplete", "why"),
    "Unknown": ("Unknown", "why"),
    "DynamoException": ("Unknown", "why"),
}


OURS: tuple[StatorError, ...] = (
    *(EngineError("why", kind=kind) for kind in sorted(BACKEND_KINDS)),
    StatorError("why"),
    UsageError("why"),
    PeerProtocolError("why"),
    Unavailable("why"),
    Overloaded("why"),
    Disconnected("why"),
    ConnectFailed("why"),
    StreamIncomplete("why"),
    Timeout("why", phase="connect"),
    Timeout("why", phase="items"),
    Cancelled("why"),
)
"""one for each kind on the wire, at least"""


async def read_each(place: Place, first: int) -> None:
    """Each of them, raised by its worker after `first` items, arrives here as what it is."""
    with place.peer("peer_raiser.py", PEER_ENDPOINT=f"raise{first}"):
        await asyncio.to_thread(place.wait_for, f"raise{first}")
        async with place.calling(f"raise{first}") as client:
            (worker,) = client.instance_ids()
            for name, (kind, text) in RAISED.items():
                got: list[Any] = []
                with pytest.raises(EngineError) as caught:
                    async for item in client.direct({"raise": name, "text": "why", "first": first}, worker, retry="never"):
                        got.append(item)
                assert got == list(range(first)), name
                assert (name, caught.value.kind) == (name, kind)
                assert caught.value.message.startswith(text), caught.value.message
                assert caught.value.http_status == (400 if kind == "InvalidArgument" else 500)


async def send_each(place: Place, client: Peer, first: int, expected: Callable[[StatorError], str]) -> None:
    """Each of ours, raised by our worker after `first` items, arrives there as `expected`. Its client takes some of them for a broken
    instance, so that each has a worker of its own."""

    async def one(error: StatorError) -> None:
        async def raises(request: Any, context: Context) -> AsyncIterator[Any]:
            for item in range(first):
                yield item
            raise error

        async with place.working(raises) as ours:
            answer = await client.ask(endpoint=ours.endpoint, request={})
        assert answer["error"] == f"ValueError: {expected(error)}", error
        assert answer["items"] == list(range(first))

    for start in range(0, len(OURS), 5):
        await asyncio.gather(*map(one, OURS[start : start + 5]))


def test_each_kind_of_the_wire_is_sent_and_read() -> None:
    sent = [to_wire(error).error_type for error in OURS]
    assert {kind for kind in sent if isinstance(kind, str)} == RUNTIME_KINDS
    assert {kind["Backend"] for kind in sent if isinstance(kind, dict)} == BACKEND_KINDS
    # The one that its Python cannot raise is there all the same.
    assert {kind for kind, _ in RAISED.values()} == BACKEND_KINDS - {"ResponseTimeout"}


def told(error: StatorError) -> str:
    """The reference's text for its kind. What a handler says of connections that it made itself is told as its own, not as the
    worker's.
    """
    kind = to_wire(error).error_type
    if isinstance(error, Disconnected | Timeout):
        assert isinstance(kind, str)
        return f"Backend{kind}: {type(error).__name__}: why"
    return f"Backend{kind['Backend']}: why" if isinstance(kind, dict) else f"{kind}: why"


@pytest.mark.parametrize("first", [0, 2])
class TestErrors(Meeting):
    async def test_what_its_worker_raises_arrives_here(self, place: Place, first: int) -> None:
        await read_each(place, first)

    async def test_what_our_worker_raises_arrives_there(self, place: Place, client: Peer, first: int) -> None:
        await send_each(place, client, first, told)
