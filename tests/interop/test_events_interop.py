"""Events there and back between us and the reference 1.3.1: over ZMQ, with and without a broker, and over NATS."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from interop.peers import Peer, discovery_root, needs_reference, peer
from stator.events import Channel, Event, Subscription
from stator.llm.load_event import LOAD_TOPIC, ActiveLoad, decode_load
from stator.protocol.records import EventChannelRecord, Query, decode_record
from stator.runtime import Runtime
from stator.testing.nats_server import nats_server
from stator.testing.zmq_broker import zmq_broker

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

LOAD = Channel(namespace="events", topic=LOAD_TOPIC)
BLOCKS = Channel(namespace="events", component="backend", topic="kv-events")
PASSES = Channel(namespace="events", component="backend", topic="forward-pass-metrics")
CHANNELS = Query(EventChannelRecord.bucket)
WITHIN = 30.0


class Meeting(msgspec.Struct, kw_only=True):
    """A process of the reference, and how one of ours joins it."""

    peer: Peer
    settings: dict[str, Any]
    kind: str
    """of the records; "" with a broker, which needs none"""

    async def heard(self) -> list[bytes]:
        """What the reference has heard."""
        return [bytes.fromhex(text) for text in (await self.peer.ask(do="received"))["heard"]]


@pytest.fixture(scope="module", params=["zmq", "zmq broker", "nats"])
def meeting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meeting]:
    root = discovery_root(tmp_path_factory)
    own: dict[str, Any] = {"discovery": "file", "file__root": str(root), "event_plane": request.param.split()[0]}
    theirs = {"DYN_EVENT_PLANE": own["event_plane"]}
    kind = {"zmq": "Zmq", "nats": "Nats"}.get(request.param, "")
    with ExitStack() as stack:
        if request.param == "nats":
            server = stack.enter_context(nats_server(tmp_path_factory.mktemp("nats")))
            own["nats__servers"] = theirs["NATS_SERVER"] = server.url
        elif request.param == "zmq broker":
            broker = stack.enter_context(zmq_broker())
            own["zmq__broker"] = theirs["DYN_ZMQ_BROKER_URL"] = broker.setting
        process = stack.enter_context(peer("peer_events.py", root, **theirs))
        yield Meeting(peer=process, settings=own, kind=kind)


async def next_where(heard: Subscription, fits: Callable[[Event], bool]) -> Event:
    async with asyncio.timeout(WITHIN):
        async for event in heard:
            if fits(event):
                return event
    raise AssertionError("the subscription ended")


async def test_their_load_arrives_decoded(meeting: Meeting) -> None:
    async with Runtime.connect(**meeting.settings) as runtime, await runtime.events.subscribe(LOAD) as heard:
        number = 0
        event = None
        async with asyncio.timeout(WITHIN):
            while event is None:  # unchanged values are not sent again, so each is new
                number += 1
                await meeting.peer.ask(do="load", rank=3, blocks=number)
                try:
                    async with asyncio.timeout(0.2):
                        event = await anext(heard)
                except TimeoutError:
                    pass
        load = decode_load(event.payload)
        assert load == ActiveLoad(worker_id=load.worker_id, dp_rank=3, active_decode_blocks=load.active_decode_blocks)
        assert 0 < (load.active_decode_blocks or 0) <= number
        first = event.sequence
        await meeting.peer.ask(do="load", rank=3, blocks=4711)
        event = await next_where(heard, lambda event: decode_load(event.payload).active_decode_blocks == 4711)
        assert event.sequence > first
        assert event.topic == LOAD_TOPIC
        statistics = heard.statistics()
        assert (statistics.malformed, statistics.gaps, statistics.publishers) == (0, 0, 1)


async def test_their_blocks_arrive_on_the_components_channel(meeting: Meeting) -> None:
    async with Runtime.connect(**meeting.settings) as runtime, await runtime.events.subscribe(BLOCKS) as heard:
        event = None
        async with asyncio.timeout(WITHIN):
            while event is None:
                await meeting.peer.ask(do="blocks", hashes=[111, -222])
                try:
                    async with asyncio.timeout(0.2):
                        event = await anext(heard)
                except TimeoutError:
                    pass
        stored = msgspec.msgpack.decode(event.payload)
        assert stored["worker_id"] == 77
        blocks = stored["event"]["data"]["stored"]["blocks"]
        assert [block["block_hash"] for block in blocks] == [111, 2**64 - 222]
        assert heard.statistics().malformed == 0


async def test_ours_arrive_at_their_subscriber_in_order(meeting: Meeting) -> None:
    async with Runtime.connect(**meeting.settings) as runtime, await runtime.events.publisher(PASSES) as publisher:
        async with asyncio.timeout(WITHIN):
            number = 0
            while b"probe" not in b"".join(await meeting.heard()):
                publisher.publish(b"probe %d" % number)
                number += 1
                await asyncio.sleep(0.05)
        sent = [msgspec.msgpack.encode({"version": 1, "number": number, "fill": "x" * 500}) for number in range(1000)]
        for payload in sent:
            publisher.publish(payload)
        async with asyncio.timeout(WITHIN):
            while (received := [each for each in await meeting.heard() if not each.startswith(b"probe")])[-1:] != sent[-1:]:
                await asyncio.sleep(0.1)
        assert received == sent


async def test_what_both_write_into_discovery(meeting: Meeting) -> None:
    async with Runtime.connect(**meeting.settings) as runtime:
        theirs = await runtime.discovery.list(CHANNELS)
        async with await runtime.events.publisher(LOAD) as publisher:
            listed = await runtime.discovery.list(CHANNELS)
            ours = [record for record in listed if record.key.id == publisher.publisher_id]
            if not meeting.kind:
                assert theirs == listed == []
                return
            (own,) = ours
            like = next(record for record in theirs if record.key.segments == own.key.segments)
            assert isinstance(own, EventChannelRecord)
            assert isinstance(like, EventChannelRecord)
            assert own.transport.kind == like.transport.kind == meeting.kind
            assert own.transport.config.keys() == like.transport.config.keys()
            if meeting.kind == "Nats":
                assert own.transport == like.transport
            folder = Path(meeting.settings["file__root"]) / EventChannelRecord.bucket
            read = {decode_record(path.read_bytes()).key.id for path in folder.iterdir() if not path.name.startswith(".")}
            assert {record.key.id for record in listed} == read
