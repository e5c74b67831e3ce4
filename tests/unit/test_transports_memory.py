"""The in-memory plane where the suites do not look: a sink that breaks."""

import asyncio
from typing import Any, Literal

import pytest

from stator.errors import StatorError
from stator.protocol.envelope import IncomingRequest, RequestEnvelope
from stator.tasks import DeadlineWheel
from stator.testing.fake_plane import fake_record
from stator.transports.inbox import Inbox, Patience, PhaseLimits
from stator.transports.inputs import DuplexInbox
from stator.transports.memory import MemoryNetwork, MemoryPlane
from stator.transports.plane import Responder


class Breaks:
    """A sink with a bug."""

    def __call__(self, request: IncomingRequest, responder: Responder, /) -> Any:
        raise KeyError("bug")

    def malformed(self, size: int, kind: Literal["deserialization", "invalid_message", "response_stream"]) -> None: ...


@pytest.mark.parametrize("streams_in", [False, True])
async def test_a_sink_that_breaks_refuses(streams_in: bool) -> None:
    wheel = DeadlineWheel(asyncio.get_running_loop())
    network = MemoryNetwork()
    worker, caller = MemoryPlane(network), MemoryPlane(network)
    worker.register("1/generate", Breaks())
    record = worker.describe(fake_record(1), "1/generate")
    kind = DuplexInbox if streams_in else Inbox
    inbox = kind(wheel=wheel, patience=Patience(PhaseLimits()), instance=1)
    await caller.open(record, RequestEnvelope(id="r", payload=b"" if streams_in else b"1", streams_in=streams_in), inbox)
    with pytest.raises(StatorError, match="KeyError"):
        await asyncio.wait_for(inbox.more(), 5)
    assert not worker.served
    assert not caller.opened
    assert len(wheel) == 0
