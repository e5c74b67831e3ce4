"""The reference 1.6.1 and Stator, over TCP and over NATS, both ways (`spec/10 §8`)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from interop.exchanges import Exchanges, Place
from interop.peers import REFERENCE_NEW, Peer, needs_newer_reference
from interop.test_errors_interop import OURS, RAISED
from stator.errors import Disconnected, EngineError, StatorError, Timeout
from stator.protocol.wire_errors import to_wire
from stator.runtime import Context

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_newer_reference]


CLASSES = {
    "InvalidArgument": "InvalidRequest",
    "CannotConnect": "Unavailable",
    "Disconnected": "Unavailable",
    "StreamIncomplete": "Unavailable",
    "EngineShutdown": "Unavailable",
    "Unavailable": "Unavailable",
    "ConnectionTimeout": "DeadlineExceeded",
    "ResponseTimeout": "DeadlineExceeded",
    "Cancelled": "Cancelled",
    "ResourceExhausted": "CapacityExhausted",
    "Unknown": "Internal",
}
"""what its client makes of each kind of error that we send"""


class NewerExchanges(Exchanges):
    reference: ClassVar[Path] = REFERENCE_NEW
    error_text: ClassVar[str] = "ValueError: InvalidRequest: ValueError: boom"
    unsendable: ClassVar[str] = "ValueError: Internal: object value cannot be sent"
    overloaded: ClassVar[str] = "CapacityExhausted"
    codec: ClassVar[str] = "msgpack"

    async def test_its_record_names_its_codec_which_is_followed(self, place: Place, worker: Peer) -> None:
        record = place.record("generate")
        assert record.request_plane_codec == self.codec
        async with place.calling("generate", tcp__codec="json") as client:
            (value,) = await client.generate({"mode": "echo", "value": [1.5, None]}).collect()
            assert value == [1.5, None]

    async def test_its_item_that_cannot_be_sent(self, place: Place, worker: Peer) -> None:
        async with place.calling("generate") as client:
            got: list[Any] = []
            with pytest.raises(EngineError):
                async for item in client.generate({"mode": "unsendable"}, retry="never"):
                    got.append(item)
            assert got == [1]


class TestNewerTcp(NewerExchanges):
    @pytest.mark.parametrize("first", [0, 2])
    async def test_each_error_that_its_worker_raises(self, place: Place, first: int) -> None:
        """Its error items say more than ours; what they have in common is read."""
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

    @pytest.mark.parametrize("first", [0, 2])
    async def test_each_error_that_our_worker_raises(self, place: Place, client: Peer, first: int) -> None:
        async def one(error: StatorError) -> None:
            async def raises(request: Any, context: Context) -> AsyncIterator[Any]:
                for item in range(first):
                    yield item
                raise error

            async with place.working(raises) as ours:
                answer = await client.ask(endpoint=ours.endpoint, request={})
            kind = to_wire(error).error_type
            named = CLASSES[kind["Backend"] if isinstance(kind, dict) else kind]
            text = f"{type(error).__name__}: why" if isinstance(error, Disconnected | Timeout) else "why"
            assert answer["error"] == f"ValueError: {named}: {text}", error
            assert answer["items"] == list(range(first))

        for start in range(0, len(OURS), 5):
            await asyncio.gather(*map(one, OURS[start : start + 5]))

    async def test_its_path_is_longer(self, place: Place, worker: Peer) -> None:
        record = place.record("generate")
        assert record.transport.tcp is not None
        path = record.transport.tcp.partition("/")[2]
        assert path == f"{record.instance_id:x}/demo/backend/generate"


class TestNewerNats(NewerExchanges):
    over_nats: ClassVar[bool] = True


class TestNewerJson(NewerExchanges):
    """A worker of it that was told to speak JSON."""

    codec: ClassVar[str] = "json"

    @pytest.fixture(scope="class")
    @classmethod
    def worker(cls, place: Place) -> Any:
        with place.peer("peer_worker.py", DYN_REQUEST_PLANE_CODEC="json") as process:
            place.wait_for("generate", "broken")
            yield process
