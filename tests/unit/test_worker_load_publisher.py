"""What the load publisher sends, when, and what trouble with the event plane does not do to it. Time is the test's."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from stator.errors import ConnectFailed
from stator.events.interface import Channel
from stator.llm.load_event import ActiveLoad
from stator.testing.manual_loop import ManualLoop
from stator.testing.worker_host import FakeEvents
from stator.worker import WorkerMetricsPublisher

pytestmark = pytest.mark.timeout(20)

WORKER = 0xABC


class Stage:
    """An open publisher on a loop whose time stands still."""

    def __init__(self) -> None:
        self.loop = ManualLoop()
        self.events = FakeEvents()
        self.publisher = self.loop.act(lambda: WorkerMetricsPublisher(self.events, namespace="demo", worker_id=WORKER))

    def open(self) -> "Stage":
        self.loop.finish(self.publisher.__aenter__())
        self.loop.settle()
        return self

    @property
    def sent(self) -> list[tuple[int, int | None, int | None]]:
        """Rank, decode blocks and used blocks of each message so far."""
        return [(load.dp_rank, load.active_decode_blocks, load.kv_used_blocks) for load in self.events.loads]

    def close(self) -> None:
        if not self.loop.is_closed():
            self.loop.finish(self.publisher.aclose())
            assert self.loop.failures == []
            self.loop.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    here = Stage().open()
    yield here
    here.close()


def test_the_message_is_the_references(stage: Stage) -> None:
    stage.publisher.publish(1, active_decode_blocks=3, kv_used_blocks=17)
    stage.loop.settle()
    assert stage.events.opened == [Channel(namespace="demo", topic="kv_metrics")]
    assert stage.events.loads == [ActiveLoad(worker_id=WORKER, dp_rank=1, active_decode_blocks=3, kv_used_blocks=17)]


def test_the_rank_is_0_and_the_fields_are_unsaid_unless_given(stage: Stage) -> None:
    stage.publisher.publish(kv_used_blocks=5)
    stage.loop.settle()
    assert stage.sent == [(0, None, 5)]


def test_what_is_unsaid_stays_as_it_was(stage: Stage) -> None:
    """Also where both were said in one burst: neither gets lost."""
    stage.publisher.publish(active_decode_blocks=5)
    stage.publisher.publish(kv_used_blocks=7)
    stage.loop.settle()
    assert stage.sent == [(0, 5, 7)]


def test_nothing_said_is_nothing_sent(stage: Stage) -> None:
    stage.publisher.publish(3)
    stage.loop.pass_time(3)
    assert stage.sent == []


def test_an_unchanged_value_is_not_sent_again_at_once(stage: Stage) -> None:
    for _ in range(5):
        stage.publisher.publish(kv_used_blocks=5)
        stage.loop.pass_time(0.1)
    assert stage.sent == [(0, None, 5)]


def test_a_burst_becomes_its_latest_value(stage: Stage) -> None:
    for number in range(500):
        stage.publisher.publish(kv_used_blocks=number)
        stage.publisher.publish(1, kv_used_blocks=2 * number)
    stage.loop.settle()
    assert sorted(stage.sent) == [(0, None, 499), (1, None, 998)]


def test_values_some_milliseconds_apart_are_all_sent(stage: Stage) -> None:
    for number in range(10):
        stage.publisher.publish(kv_used_blocks=number)
        stage.loop.pass_time(0.005)
    assert stage.sent == [(0, None, number) for number in range(10)]


def test_a_value_soon_after_another_is_sent_a_little_later(stage: Stage) -> None:
    for number in (1, 2, 3):
        stage.publisher.publish(kv_used_blocks=number)
        stage.loop.settle()
    assert stage.sent == [(0, None, 1)]
    stage.loop.pass_time(0.01)
    assert stage.sent == [(0, None, 1), (0, None, 3)]


def test_each_rank_is_repeated_every_second(stage: Stage) -> None:
    stage.publisher.publish(0, kv_used_blocks=5)
    stage.publisher.publish(2, kv_used_blocks=6)
    stage.loop.pass_time(10.05)
    assert len(stage.sent) == 2 * 11
    assert set(stage.sent) == {(0, None, 5), (2, None, 6)}


def test_a_repetition_comes_within_a_second_and_a_half(stage: Stage) -> None:
    """A reader gives a value up after 5 s without it."""
    at: list[float] = []
    stage.events.on_publish = lambda payload: at.append(stage.loop.time())
    stage.loop.pass_time(0.7)
    stage.publisher.publish(kv_used_blocks=5)
    stage.loop.pass_time(8)
    gaps = [after - before for before, after in pairwise(at)]
    assert len(gaps) >= 6
    assert max(gaps) <= 1.5 + 0.11


def test_a_channel_that_cannot_be_opened_is_tried_again_and_the_latest_value_sent_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = Stage()
    stage.events.opening_fails = ConnectFailed("no broker")
    with caplog.at_level(logging.INFO):
        stage.open()
        for number in range(100):
            stage.publisher.publish(kv_used_blocks=number)
            stage.loop.pass_time(0.3)
        assert stage.sent == []
        stage.events.opening_fails = None
        stage.loop.pass_time(6)
    assert stage.sent[0] == (0, None, 99)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the load of this worker cannot be published yet: no broker",
        "the load of this worker is published",
    ]
    stage.close()


def test_a_failing_plane_is_told_once_per_rank_and_so_is_its_recovery(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        stage.events.publishing_fails = OSError("gone")
        stage.publisher.publish(0, kv_used_blocks=1)
        stage.publisher.publish(1, kv_used_blocks=1)
        stage.loop.pass_time(30)
        assert sorted(record.levelname for record in caplog.records) == ["WARNING", "WARNING"]
        stage.events.publishing_fails = None
        stage.loop.pass_time(2)
    assert set(stage.sent) == {(0, None, 1), (1, None, 1)}
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO", "INFO"]


def test_a_number_that_is_none_harms_no_other_rank(stage: Stage) -> None:
    stage.publisher.publish(0, kv_used_blocks=object())  # type: ignore[arg-type]
    stage.publisher.publish(1, kv_used_blocks=1)
    stage.loop.settle()
    assert stage.sent == [(1, None, 1)]


def test_after_the_end_nothing_is_sent_and_nobody_complains(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.publisher.publish(kv_used_blocks=1)
    stage.loop.settle()
    stage.loop.finish(stage.publisher.aclose())
    stage.loop.finish(stage.publisher.aclose())
    assert stage.events.closed == stage.events.opened
    stage.publisher.publish(kv_used_blocks=2)
    stage.loop.pass_time(3)
    stage.loop.close()
    for number in range(3):
        stage.publisher.publish(kv_used_blocks=number)
    assert stage.sent == [(0, None, 1)]
    assert caplog.records == []


def test_the_end_comes_while_the_channel_is_being_opened() -> None:
    stage = Stage()
    stage.events.opening_fails = ConnectFailed("no broker")
    stage.open()
    stage.publisher.publish(kv_used_blocks=1)
    stage.close()
    assert stage.sent == []


async def test_many_threads_may_publish_at_once() -> None:
    """The last value of each rank is what is sent last."""
    events = FakeEvents()
    threads = 4

    def write(publish: Callable[..., None], rank: int) -> None:
        for number in range(2000):
            publish(rank, kv_used_blocks=number)

    async with WorkerMetricsPublisher(events, namespace="demo", worker_id=WORKER) as publisher:
        await asyncio.gather(*(asyncio.to_thread(write, publisher.publish, rank) for rank in range(threads)))
        async with asyncio.timeout(5):
            while {load.dp_rank: load.kv_used_blocks for load in events.loads} != dict.fromkeys(range(threads), 1999):
                await asyncio.sleep(0.005)
    assert len(events.loads) < threads * 500, "bursts are sent as one"
