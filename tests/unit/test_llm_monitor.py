"""The worker monitor: from load events to busy workers, per model; thresholds at run time; what survives the event plane."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

import pytest

from stator.errors import ConnectFailed, UsageError
from stator.events import Channel, Event, EventPlane
from stator.llm.card import WorkerType
from stator.llm.deployment import DeployedWorker
from stator.llm.kv_load import KvCapacity
from stator.llm.load_event import ActiveLoad, encode_load
from stator.llm.monitor import Place, WorkerMonitor
from stator.llm.thresholds import LoadConfig, Thresholds
from stator.protocol.ids import EndpointId
from stator.tasks import Backoff
from stator.testing.manual_clock import ManualClock
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(20)

HALF = LoadConfig(active_decode_blocks_threshold=0.5)
CHAT: Place = (EndpointId("blue", "backend", "generate"), "chat")
LORA: Place = (EndpointId("blue", "backend", "generate"), "lora")
GREEN: Place = (EndpointId("green", "backend", "generate"), "chat")


class Told:
    """Who serves a model, and what it was told."""

    def __init__(self, *workers: int, repeats: bool = False, blocks: int | None = 1000, kind: WorkerType | None = None) -> None:
        facts = DeployedWorker(capacity=KvCapacity(total_kv_blocks=blocks), repeats=repeats, kind=kind)
        self.workers: Mapping[int, DeployedWorker] = dict.fromkeys(workers, facts)
        self.busy: list[list[int]] = []
        self.why: Mapping[int, str] = {}

    def set_busy(self, busy: Mapping[int, str]) -> None:
        self.busy.append(sorted(busy))
        self.why = busy


def used(worker: int, blocks: int, *, rank: int = 0) -> bytes:
    return encode_load(ActiveLoad(worker_id=worker, dp_rank=rank, kv_used_blocks=blocks))


def monitor(watched: Mapping[Place, Told], config: LoadConfig = HALF, clock: ManualClock | None = None) -> WorkerMonitor:
    made = WorkerMonitor(config, clock or ManualClock())
    made.follow(watched)
    return made


def test_busy_workers_are_told_when_they_change_and_not_else() -> None:
    chat = Told(1, 2)
    it = monitor({CHAT: chat})
    for worker, blocks in ((1, 500), (1, 501), (1, 600), (2, 700), (3, 900), (1, 500)):
        it.hear(used(worker, blocks))
    assert chat.busy == [[], [1], [1, 2], [2]]
    assert chat.why[2] == "kv_used_blocks 700 is over 500 (0.5 of 1000 blocks)"
    statistics = it.statistics()
    assert (statistics.heard, statistics.workers, statistics.busy) == (6, 2, 1)


def test_events_that_cannot_be_read_are_counted_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    chat = Told(1)
    it = monitor({CHAT: chat})
    for payload in (b"", b"\x81\xa1a", b"\xc1", used(1, 900)[:-3], b"\x80", encode_load(ActiveLoad(worker_id=1))):
        it.hear(payload)
    assert (it.statistics().malformed, it.statistics().heard) == (5, 1)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "load event cannot be read: Input data was truncated"
    ]
    it.hear(used(1, 900))
    assert chat.busy == [[], [1]]


def test_a_newcomer_is_told_who_is_busy_already() -> None:
    it = monitor({})
    it.hear(used(1, 900))
    chat, lora = Told(1, 2), Told(1)
    it.follow({CHAT: chat})
    assert chat.busy == [[1]]
    it.follow({CHAT: chat, LORA: lora})
    assert lora.busy == [[1]]
    it.follow({LORA: lora})
    it.hear(used(1, 0))
    assert lora.busy[-1] == [] and chat.busy[-1] == [1], "who is not watched any more is told nothing"


def test_thresholds_are_per_model_and_act_at_once() -> None:
    chat, lora, green = Told(1), Told(1), Told(5)
    it = monitor({CHAT: chat, LORA: lora, GREEN: green})
    it.hear(used(1, 700))
    it.hear(used(5, 700))
    assert (chat.busy[-1], lora.busy[-1], green.busy[-1]) == ([1], [1], [5])
    now = it.set_thresholds("chat", active_decode_blocks_threshold=0.8, active_prefill_tokens_threshold=None)
    assert now == it.thresholds("chat") == it.all_thresholds()["chat"]
    assert now == Thresholds(active_decode_blocks_threshold=0.8, active_prefill_tokens_threshold_frac=64.0)
    assert (chat.busy[-1], lora.busy[-1], green.busy[-1]) == ([], [1], []), "without waiting for the next event"
    assert it.all_thresholds()["lora"] == HALF.thresholds
    assert it.set_thresholds("chat") == now, "nothing given, nothing changed"
    assert list(it.all_thresholds()) == ["chat", "lora"]


def test_thresholds_of_strangers_and_out_of_range_are_refused() -> None:
    it = monitor({CHAT: Told(1)})
    assert it.thresholds("other") is None
    with pytest.raises(UsageError, match=r"Model .other. not found\. Thresholds can only be set for discovered models"):
        it.set_thresholds("other", active_decode_blocks_threshold=0.5)
    with pytest.raises(UsageError, match=r"active_decode_blocks_threshold must be between 0\.0 and 1\.0, got 1\.5"):
        it.set_thresholds("chat", active_decode_blocks_threshold=1.5, active_prefill_tokens_threshold=5)
    assert it.thresholds("chat") == HALF.thresholds


def test_thresholds_that_were_set_outlive_the_workers() -> None:
    it = monitor({CHAT: Told(1)})
    it.set_thresholds("chat", active_decode_blocks_threshold=0.1)
    it.follow({})
    assert it.thresholds("chat") is None and it.all_thresholds() == {}
    chat = Told(2)
    it.follow({CHAT: chat})
    it.hear(used(2, 101))
    assert chat.busy == [[], [2]]


def test_without_admission_control_nobody_is_busy_until_somebody_says_so() -> None:
    chat = Told(1)
    it = monitor({CHAT: chat}, LoadConfig(admission_control="none"))
    it.hear(encode_load(ActiveLoad(worker_id=1, kv_used_blocks=10**9, active_prefill_tokens=10**12)))
    assert chat.busy == [[]]
    assert it.thresholds("chat") == Thresholds()
    it.set_thresholds("chat", active_decode_blocks_threshold=0.9)
    assert chat.busy == [[], [1]]


def test_by_default_a_full_worker_is_not_busy() -> None:
    chat = Told(1)
    it = monitor({CHAT: chat}, LoadConfig())
    it.hear(used(1, 1000))
    assert chat.busy == [[]]
    it.hear(encode_load(ActiveLoad(worker_id=1, active_decode_blocks=1001)))
    assert chat.busy == [[], [1]], "a router has booked more than there is"


def test_only_workers_that_repeat_themselves_go_stale() -> None:
    clock = ManualClock()
    ours, theirs = Told(1, repeats=True), Told(5)
    it = monitor({CHAT: ours, GREEN: theirs}, clock=clock)
    it.hear(used(1, 900))
    it.hear(used(5, 900))
    clock.advance(5.0)
    it.forget_stale()
    assert (ours.busy[-1], theirs.busy[-1]) == ([1], [5])
    clock.advance(0.1)
    it.forget_stale()
    assert (ours.busy[-1], theirs.busy[-1]) == ([], [5])
    it.hear(used(1, 900))
    assert ours.busy[-1] == [1]


def test_who_leaves_takes_its_state_along() -> None:
    chat = Told(1, 2)
    it = monitor({CHAT: chat})
    it.hear(used(1, 900))
    chat.workers = {2: chat.workers[2]}
    it.follow({CHAT: chat})
    chat.workers = {1: chat.workers[2], 2: chat.workers[2]}
    it.follow({CHAT: chat})
    assert chat.busy[-1] == [] and not it.snapshot()


def test_the_snapshot_has_every_rank_that_reported() -> None:
    clock = ManualClock()
    chat, lora, green = Told(1, 2), Told(1), Told(5, kind=WorkerType.PREFILL)
    it = monitor({CHAT: chat, LORA: lora, GREEN: green}, clock=clock)
    it.hear(used(5, 3))
    it.hear(used(1, 900, rank=1))
    clock.advance(2.0)
    it.hear(encode_load(ActiveLoad(worker_id=1, active_decode_blocks=4, active_prefill_tokens=6)))
    rows = it.snapshot()
    assert [(row.worker_id, row.dp_rank, row.namespace, row.worker_type, row.age) for row in rows] == [
        (1, 0, "blue", "decode", 0.0),
        (1, 1, "blue", "decode", 2.0),
        (5, 0, "green", "prefill", 2.0),
    ]
    assert [(row.models, row.busy) for row in rows] == [(("chat", "lora"), ()), (("chat", "lora"),) * 2, (("chat",), ())]
    assert (rows[0].active_decode_blocks, rows[0].active_prefill_tokens, rows[0].kv_used_blocks) == (4, 6, None)


# -- listening


class Feed:
    """A subscription that the test fills and breaks."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.closed = False
        self._queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(100)

    def put(self, item: bytes | Exception | None) -> None:
        self._queue.put_nowait(item)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        item = await self._queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return Event(publisher_id=1, sequence=0, published_at=0, topic=self.channel.topic, payload=item)


class Plane:
    """An event plane that only knows how to subscribe, and refuses as often as it is told."""

    def __init__(self) -> None:
        self.feeds: list[Feed] = []
        self.refusals = 0

    async def subscribe(self, channel: Channel, **options: Any) -> Feed:
        if self.refusals:
            self.refusals -= 1
            raise ConnectFailed("the broker is away")
        feed = Feed(channel)
        self.feeds.append(feed)
        return feed

    def open_feeds(self) -> list[str]:
        return sorted(str(feed.channel) for feed in self.feeds if not feed.closed)


def listener(plane: Plane, config: LoadConfig = HALF) -> tuple[WorkerMonitor, Any]:
    made = WorkerMonitor(config, ManualClock(), backoff=Backoff(first=0.001, most=0.002))
    fake: EventPlane = plane  # pyright: ignore[reportAssignmentType]  # all that the monitor uses
    return made, made.listening(fake)


async def test_it_listens_to_the_namespaces_that_have_models() -> None:
    plane = Plane()
    it, listening = listener(plane)
    chat, green = Told(1), Told(5)
    async with listening:
        await asyncio.sleep(0)
        assert plane.feeds == [], "without models to nobody"
        it.follow({CHAT: chat, LORA: Told(1)})
        await eventually(lambda: plane.open_feeds() == ["namespace.blue.kv_metrics"])
        it.follow({CHAT: chat, GREEN: green})
        await eventually(lambda: plane.open_feeds() == ["namespace.blue.kv_metrics", "namespace.green.kv_metrics"])
        for feed in plane.feeds:
            feed.put(used(5, 900))  # a broker may give everything to everybody
        await eventually(lambda: it.statistics().heard == 2)
        assert green.busy[-1] == [5] and chat.busy[-1] == []
        it.follow({GREEN: green})
        await eventually(lambda: plane.open_feeds() == ["namespace.green.kv_metrics"])
        it.follow({GREEN: green, CHAT: chat})
        await eventually(lambda: len(plane.open_feeds()) == 2)
    assert plane.open_feeds() == []


async def test_what_was_followed_before_is_listened_to_from_the_start() -> None:
    plane = Plane()
    it, listening = listener(plane)
    it.follow({CHAT: Told(1)})
    async with listening:
        await eventually(lambda: len(plane.open_feeds()) == 1)


async def test_a_subscription_that_breaks_is_made_again_and_what_was_known_stands(caplog: pytest.LogCaptureFixture) -> None:
    plane = Plane()
    plane.refusals = 3
    it, listening = listener(plane)
    chat = Told(1)
    async with listening:
        it.follow({CHAT: chat})
        await eventually(lambda: len(plane.feeds) == 1)
        assert it.statistics().resubscribed == 3
        assert caplog.text.count("WARNING") == 1, "said once, not with every try"
        plane.feeds[0].put(used(1, 900))
        plane.feeds[0].put(ConnectFailed("the broker is gone"))
        await eventually(lambda: len(plane.feeds) == 2)
        plane.feeds[1].put(None)
        await eventually(lambda: len(plane.feeds) == 3)
        assert plane.open_feeds() == ["namespace.blue.kv_metrics"]
        assert chat.busy == [[], [1]]
        plane.feeds[2].put(used(1, 0))
        await eventually(lambda: chat.busy[-1] == [])


async def test_stale_reports_are_forgotten_by_themselves() -> None:
    class Fast(ManualClock):
        def monotonic(self) -> float:
            return asyncio.get_running_loop().time()

    it = WorkerMonitor(LoadConfig(active_decode_blocks_threshold=0.5, stale_after=0.05), Fast())
    plane: EventPlane = Plane()  # pyright: ignore[reportAssignmentType]
    ours, theirs = Told(1, repeats=True), Told(5)
    async with it.listening(plane):
        it.follow({CHAT: ours, GREEN: theirs})
        it.hear(used(1, 900))
        it.hear(used(5, 900))
        assert (ours.busy[-1], theirs.busy[-1]) == ([1], [5])
        await eventually(lambda: ours.busy[-1] == [])
        assert theirs.busy[-1] == [5]
