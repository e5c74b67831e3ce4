"""Errors between a reference process and ours: each of its kinds, raised by its worker and by ours (`spec/10 §4.3, §4.4`)."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from interop.peers import Peer, discovery_root, needs_reference, peer, records_in
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
from stator.runtime import Context, Runtime

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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discovery_root(tmp_path_factory)


@pytest.fixture(scope="module")
def raiser(root: Path) -> Iterator[Peer]:
    with peer("peer_raiser.py", root) as process:
        deadline = time.monotonic() + 30
        while not records_in(root):
            assert time.monotonic() < deadline, "the worker did not register"
            time.sleep(0.05)
        yield process


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[Peer]:
    with peer("peer_client.py", root) as process:
        yield process


@pytest.mark.parametrize("first", [0, 2])
async def test_what_its_worker_raises_arrives_here(root: Path, raiser: Peer, first: int) -> None:
    async with Runtime.connect(plane="compatible", discovery="file", file__root=str(root)) as runtime:
        endpoint = await runtime.endpoint("demo.backend.generate").client()
        await endpoint.wait_for_instances()
        (worker,) = endpoint.instance_ids()
        for name, (kind, text) in RAISED.items():
            got: list[Any] = []
            with pytest.raises(EngineError) as caught:
                async for item in endpoint.direct({"raise": name, "text": "why", "first": first}, worker, retry="never"):
                    got.append(item)
            assert got == list(range(first)), name
            assert (name, caught.value.kind) == (name, kind)
            assert caught.value.message.startswith(text), caught.value.message
            assert caught.value.http_status == (400 if kind == "InvalidArgument" else 500)
    # The one that its Python cannot raise is there all the same.
    assert {kind for kind, _ in RAISED.values()} == BACKEND_KINDS - {"ResponseTimeout"}


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


def test_each_kind_of_the_wire_is_sent() -> None:
    sent = [to_wire(error).error_type for error in OURS]
    assert {kind for kind in sent if isinstance(kind, str)} == RUNTIME_KINDS
    assert {kind["Backend"] for kind in sent if isinstance(kind, dict)} == BACKEND_KINDS


@pytest.mark.parametrize("first", [0, 2])
async def test_what_our_worker_raises_arrives_there(root: Path, client: Peer, first: int) -> None:
    """As the reference's text for that kind. Its client takes some of them for a broken instance, so that each has a worker of its own.

    What a handler says of connections that it made itself is told as its own, not as the worker's.
    """

    async def one(number: int, error: StatorError) -> None:
        async def raises(request: Any, context: Context) -> AsyncIterator[Any]:
            for item in range(first):
                yield item
            raise error

        endpoint = f"demo.backend.raises{number}x{first}"
        async with (
            Runtime.connect(plane="compatible", discovery="file", file__root=str(root)) as runtime,
            runtime.endpoint(endpoint).serving(raises),
        ):
            answer = await client.ask(endpoint=endpoint, request={})
        kind = to_wire(error).error_type
        if isinstance(error, Disconnected | Timeout):
            assert isinstance(kind, str)
            expected = f"ValueError: Backend{kind}: {type(error).__name__}: why"
        elif isinstance(kind, dict):
            expected = f"ValueError: Backend{kind['Backend']}: why"
        else:
            expected = f"ValueError: {kind}: why"
        assert answer["error"] == expected, error
        assert answer["items"] == list(range(first))

    for start in range(0, len(OURS), 5):
        batch = enumerate(OURS[start : start + 5], start)
        await asyncio.gather(*(one(number, error) for number, error in batch))
