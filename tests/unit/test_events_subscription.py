"""What all subscriptions share: the bounds of what they remember, and fairness towards others on the loop."""

import asyncio
from typing import Any

import pytest

from stator.events import Channel, Event, EventsConfig, Gap
from stator.events import subscription as subscription_module
from stator.events import zmq_subscription as zmq_module
from stator.events.host import EventHost
from stator.events.subscription import ChannelSubscription
from stator.events.zmq_subscription import BrokerSubscription
from stator.protocol.event_frame import encode_frames

pytestmark = pytest.mark.timeout(10)

LOAD = Channel(namespace="demo", topic="kv_metrics")


def event(publisher: int, sequence: int) -> Event:
    return Event(publisher_id=publisher, sequence=sequence, published_at=0, topic=LOAD.topic, payload=b"")


def subscription(gaps: list[Gap]) -> ChannelSubscription:
    return ChannelSubscription(
        LOAD, EventsConfig(), capacity=None, overflow="drop_oldest", on_gap=gaps.append, forget=lambda _: None
    )


async def test_the_publisher_heard_least_recently_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription_module, "_MAX_PUBLISHERS", 3)
    gaps: list[Gap] = []
    heard = subscription(gaps)
    for publisher, sequence in ((1, 0), (2, 0), (3, 0), (1, 1), (4, 0), (1, 9), (2, 9)):
        heard.offer(event(publisher, sequence))
        await anext(heard)
    assert heard.publishers == 3
    assert gaps == [Gap(publisher_id=1, expected=2, found=9)]  # 2 was forgotten for 4, so what it missed is not known


async def test_a_reader_that_never_waits_lets_others_run() -> None:
    heard = subscription([])
    for sequence in range(1000):
        heard.offer(event(1, sequence))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        neighbour = group.create_task(others())
        for _ in range(1000):
            await anext(heard)
        neighbour.cancel()
    assert turns >= 5


class Sockets:
    """Instead of ZMQ's."""

    def inlet(self, topic: bytes, deliver: Any) -> Any:
        self.deliver = deliver
        return self

    def connect(self, endpoint: str) -> None: ...

    def close(self) -> None: ...


async def test_copies_are_recognised_as_long_as_they_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_module, "_REMEMBERED", 2)
    sockets: Any = Sockets()
    host: Any = EventHost(discovery=None, clock=None, random=None, config=EventsConfig())  # type: ignore[arg-type] - not used
    heard = BrokerSubscription(
        sockets, LOAD, host, ("a", "b"), capacity=None, overflow="drop_oldest", on_gap=None, forget=lambda _: None
    )
    await heard.start()
    for publisher, sequence in ((1, 0), (1, 0), (2, 0), (1, 0), (2, 0), (3, 0), (1, 0), (3, 0)):
        sockets.deliver(list(encode_frames(event(publisher, sequence), b"kv_metrics")))
    assert [(await anext(heard)).publisher_id for _ in range(heard.statistics().queued)] == [1, 2, 3, 1]
    await heard.aclose()
