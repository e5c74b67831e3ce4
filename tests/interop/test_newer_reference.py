"""The reference 1.6.1 and Stator, over TCP and over NATS, both ways (`spec/10 §8`)."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from interop.exchanges import Exchanges, Place
from interop.peers import REFERENCE_NEW, Peer, needs_newer_reference
from interop.test_errors_interop import read_each, send_each
from stator.errors import Disconnected, EngineError, StatorError, Timeout
from stator.protocol.wire_errors import to_wire

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


def told(error: StatorError) -> str:
    kind = to_wire(error).error_type
    text = f"{type(error).__name__}: why" if isinstance(error, Disconnected | Timeout) else "why"
    return f"{CLASSES[kind['Backend'] if isinstance(kind, dict) else kind]}: {text}"


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
        await read_each(place, first)

    @pytest.mark.parametrize("first", [0, 2])
    async def test_each_error_that_our_worker_raises(self, place: Place, client: Peer, first: int) -> None:
        await send_each(place, client, first, told)

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
