"""One request among instances that fail: who is tried next, who is avoided, and which error the caller sees. Time stands still."""

import asyncio
import gc
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from stator.discovery.memory import MemoryDiscovery, MemoryStore
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
from stator.events import EventHost, EventsConfig, MemoryEvents, MemoryEventsConfig
from stator.health import EngineRoutes, HealthConfig, SystemHealth
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.records import EndpointRecord
from stator.protocol.stream import Phase
from stator.routing import Policy, RoundRobin, RoutingConfig
from stator.runtime.admission import Admission, AdmissionConfig
from stator.runtime.client import Client
from stator.runtime.config import RuntimeConfig
from stator.runtime.context import Context
from stator.runtime.meter import ProcessMeter
from stator.runtime.network import Network, PlaneChoice
from stator.runtime.services import RequestIds, Services
from stator.runtime.view import InstanceView
from stator.tasks import DeadlineWheel, Scope
from stator.telemetry import MetricsLevel
from stator.testing.fake_plane import ENDPOINT, FakePlane, answer, fail_to_connect, fake_host, fake_record, hang, refuse
from stator.testing.manual_clock import ManualClock
from stator.testing.plane_suite import eventually
from stator.transports.inbox import Inbox

pytestmark = pytest.mark.timeout(10)


class World:
    """A client of three instances (1, 2, 3) over a scripted plane."""

    def __init__(self, *, instances: int = 3, policy: Policy | None = None, **settings: Any) -> None:
        routing = RoutingConfig(
            **{name: settings.pop(name) for name in list(settings) if name in RoutingConfig.__struct_fields__}
        )
        self.clock = ManualClock()
        self.wheel = DeadlineWheel(asyncio.get_running_loop(), now=self.clock.monotonic)
        self.plane = FakePlane("native")
        random = Random(1)
        discovery = MemoryDiscovery(MemoryStore(), clock=self.clock, random=random)
        events = MemoryEvents(
            MemoryEventsConfig(), host=EventHost(discovery=discovery, clock=self.clock, random=random, config=EventsConfig())
        )
        self.services = Services(
            config=RuntimeConfig(**settings),
            routing=routing,
            discovery=discovery,
            events=events,
            network=Network(PlaneChoice(planes=(self.plane,), fall_back=False), fake_host(self.wheel), retry=30.0),
            wheel=self.wheel,
            scope=Scope("test"),
            clock=self.clock,
            random=random,
            new_id=RequestIds(random),
            closing=asyncio.Event(),
            views={},
            served={},
            meter=ProcessMeter(MetricsLevel.runtime(), Admission(AdmissionConfig()), self.clock),
            health=SystemHealth(clock=self.clock),
            health_config=HealthConfig(),
            engine_routes=EngineRoutes(),
            status=None,
        )
        self.view = InstanceView(ENDPOINT, routing, self.wheel.now, self.services.network.forget)
        self.services.views[ENDPOINT] = self.view
        self.show(range(1, instances + 1))
        self.client = Client(self.services, ENDPOINT, policy or RoundRobin())

    def show(self, instances: Any) -> None:
        """What discovery says."""
        self.view.update({n: fake_record(n) for n in instances})

    @property
    def opened(self) -> list[int]:
        return self.plane.opened

    def states(self) -> dict[int, str]:
        return {row.instance_id: row.state for row in self.client.explain()}

    async def failing(self, kind: type[StatorError], **options: Any) -> StatorError:
        """Call; the error that must come, after which nothing may be held."""
        with pytest.raises(kind) as caught:
            await self.client.generate("hi", **options).collect()
        assert type(caught.value) is kind
        self.check_nothing_held()
        return caught.value

    def check_nothing_held(self) -> None:
        assert self.view.occupancy.total == 0
        assert len(self.wheel) == 0


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    world.check_nothing_held()


# -- retries before the first item

RETRIED = [
    refuse(Overloaded("full")),
    refuse(Unavailable("draining")),
    refuse(Disconnected("cut before the first item")),
    refuse(EngineError("the worker is shutting down", kind="EngineShutdown")),
    fail_to_connect(ConnectFailed("refused")),
    fail_to_connect(Timeout("no connection", phase="connect")),
    answer(error=Overloaded("raised by the handler")),
    answer(error=Disconnected("died after it accepted")),
    answer(error=EngineError("the worker is shutting down", kind="EngineShutdown")),
]


@pytest.mark.parametrize("script", RETRIED)
async def test_trouble_before_the_first_item_is_invisible(world: World, script: Any) -> None:
    world.plane.scripts[1] = script
    assert await world.client.generate("hi").collect() == ["item"]
    assert world.opened[0] == 1
    assert len(world.opened) == 2
    assert world.plane.requests[0].id == world.plane.requests[1].id


@pytest.mark.parametrize("script", RETRIED)
async def test_however_the_answer_is_read(world: World, script: Any) -> None:
    world.plane.scripts = {1: script, 2: script}
    async with world.client.generate("hi") as stream:
        assert stream.instance_id == 3
        assert await anext(stream) == "item"
    world.plane.scripts = {world.opened[-1] % 3 + 1: script}
    assert [batch async for batch in world.client.generate("hi").batches()] == [["item"]]
    stream = world.client.generate("hi")
    assert await anext(stream) == "item"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


@pytest.mark.parametrize(
    "error",
    [
        EngineError("boom"),
        EngineError("bad", kind="InvalidArgument"),
        PeerProtocolError("bad frame"),
        UsageError("x"),
        Cancelled("x"),
    ],
    ids=lambda error: f"{error.code}",
)
async def test_what_another_instance_would_not_do_better_is_raised(world: World, error: StatorError) -> None:
    world.plane.default = refuse(error)
    await world.failing(type(error))
    assert world.opened == [1]
    assert set(world.states().values()) == {"free"}


@pytest.mark.parametrize(
    "error", [Overloaded("x"), Disconnected("x"), StreamIncomplete("x"), Unavailable("x"), EngineError("x")]
)
async def test_after_the_first_item_never(world: World, error: StatorError) -> None:
    world.plane.default = answer("one", "two", error=error)
    got: list[Any] = []
    with pytest.raises(type(error)):
        async for item in world.client.generate("hi"):
            got.append(item)
    assert got == ["one", "two"]
    assert world.opened == [1]


async def test_an_item_that_came_with_the_error_was_delivered_too(world: World) -> None:
    world.plane.default = answer("one", error=StreamIncomplete("cut"))
    async with world.client.generate("hi") as stream:  # accepted, items and end all at once
        assert await anext(stream) == "one"
        with pytest.raises(StreamIncomplete):
            await anext(stream)
        with pytest.raises(StreamIncomplete):
            await anext(stream)  # and it stays so
    assert world.opened == [1]


@pytest.mark.parametrize("script", RETRIED)
async def test_not_for_requests_with_side_effects(world: World, script: Any) -> None:
    world.plane.default = script
    with pytest.raises(StatorError):
        await world.client.generate("hi", retry="never").collect()
    with pytest.raises(StatorError):
        await world.client.round_robin("hi", retry="never").collect()
    assert len(world.opened) == 2


@pytest.mark.parametrize("script", RETRIED)
async def test_direct_goes_nowhere_else(world: World, script: Any) -> None:
    world.plane.default = script
    with pytest.raises(StatorError):
        await world.client.direct("hi", 2).collect()
    assert world.opened == [2]


async def test_direct_to_nobody(world: World) -> None:
    error = await world.failing(ConnectFailed, instance=99)
    assert error.instance == 99
    assert world.opened == []


async def test_each_instance_is_tried_once_and_the_last_error_is_raised(world: World) -> None:
    world.plane.scripts = {n: refuse(Disconnected(f"cut {n}")) for n in (1, 2, 3)}
    error = await world.failing(Disconnected)
    assert error.message == f"cut {world.opened[-1]}"
    assert error.instance == world.opened[-1]
    assert sorted(world.opened) == [1, 2, 3]


async def test_the_only_instance_says_why_it_failed() -> None:
    world = World(instances=1)
    world.plane.default = refuse(Disconnected("cut"))
    assert (await world.failing(Disconnected)).message == "cut"
    world.plane.default = refuse(Overloaded("eight of eight slots"))
    assert (await world.failing(Overloaded)).message == "eight of eight slots"


async def test_the_number_of_attempts_is_limited() -> None:
    world = World(instances=10, attempts=4)
    world.plane.default = refuse(Overloaded("full"))
    await world.failing(Overloaded)
    assert len(world.opened) == 4


async def test_a_spent_budget_shows_the_original_error() -> None:
    world = World(instances=10, retry_rate=0.0, retry_ratio=0.0)
    world.plane.default = refuse(Disconnected("cut"))
    assert (await world.failing(Disconnected)).message == "cut"
    assert world.opened == [1]


async def test_the_budget_is_earned_by_requests() -> None:
    world = World(instances=10, retry_rate=0.0, retry_ratio=0.5)
    for _ in range(4):
        await world.client.generate("hi").collect()
    world.clock.advance(1.0)
    world.opened.clear()
    world.plane.default = refuse(Disconnected("cut"))
    await world.failing(Disconnected)
    assert len(world.opened) == 1 + 2  # five requests at a half each


@pytest.mark.parametrize("error", [Overloaded("full"), Unavailable("draining")])
async def test_a_worker_that_did_not_begin_costs_no_budget(error: StatorError) -> None:
    world = World(instances=5, retry_rate=0.0, retry_ratio=0.0)
    world.plane.scripts = {n: refuse(error) for n in (1, 2, 3, 4)}
    assert await world.client.generate("hi").collect() == ["item"]
    assert world.opened[-1] == 5
    assert len(world.opened) == len(set(world.opened))


async def test_a_stopped_request_is_not_sent_again(world: World) -> None:
    async def stops(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        inbox.advance(Phase.ACCEPT)
        asyncio.get_running_loop().call_soon(stream.stop)
        asyncio.get_running_loop().call_soon(inbox.finish, Disconnected("cut"))

    world.plane.default = stops
    stream = world.client.generate("hi")
    with pytest.raises(Disconnected):
        await stream.collect()
    assert world.opened == [1]


# -- avoiding what failed


@pytest.mark.parametrize("script", [refuse(Disconnected("cut")), fail_to_connect(ConnectFailed("refused"))])
async def test_a_failed_instance_is_avoided_twice_as_long_each_time(script: Any) -> None:
    world = World(instances=2)
    world.plane.scripts[1] = script
    for penalty in (5.0, 10.0, 20.0, 40.0, 60.0, 60.0):
        world.opened.clear()
        while 1 not in world.opened:
            assert await world.client.generate("hi").collect() == ["item"]
        assert world.states() == {1: "inhibited", 2: "free"}
        world.opened.clear()
        world.clock.advance(penalty - 0.01)
        for _ in range(4):
            await world.client.generate("hi").collect()
        assert world.opened == [2, 2, 2, 2]
        world.clock.advance(0.02)
    world.plane.scripts.clear()
    for _ in range(4):
        await world.client.generate("hi").collect()
    world.plane.scripts[1] = script
    world.opened.clear()
    while 1 not in world.opened:
        await world.client.generate("hi").collect()
    world.clock.advance(5.01)  # a success starts over
    assert world.states() == {1: "free", 2: "free"}


async def test_requests_that_fail_together_are_one_failure() -> None:
    world = World(instances=2)
    world.plane.scripts[1] = hang()
    streams = [asyncio.ensure_future(world.client.generate("hi").collect()) for _ in range(10)]
    await eventually(lambda: len(world.opened) == 10)
    for inbox in world.plane.inboxes:
        inbox.cut("connection lost")
    assert await asyncio.gather(*streams) == [["item"]] * 10
    world.clock.advance(5.01)
    assert world.states() == {1: "free", 2: "free"}


async def test_a_single_inhibited_instance_is_used(world: World) -> None:
    world.show([1])
    world.plane.default = refuse(Disconnected("blip"))
    await world.failing(Disconnected)
    assert world.states() == {1: "inhibited"}
    world.plane.default = answer("back")
    assert await world.client.generate("hi").collect() == ["back"]
    assert world.states() == {1: "free"}


async def test_of_several_inhibited_the_one_that_ends_first_is_used() -> None:
    world = World(instances=2, retry_rate=0.0, retry_ratio=0.0)
    world.plane.default = refuse(Disconnected("cut"))
    await world.failing(Disconnected)
    world.clock.advance(1.0)
    await world.failing(Disconnected)
    assert world.opened == [1, 2]
    world.plane.default = answer("ok")
    await world.client.generate("hi").collect()
    assert world.opened == [1, 2, 1]


async def test_a_full_instance_is_left_alone_and_direct_is_told() -> None:
    world = World(instances=2)
    world.plane.scripts[1] = refuse(Overloaded("full"))
    for _ in range(4):
        await world.client.generate("hi").collect()
    assert world.opened == [1, 2, 2, 2, 2]
    assert world.states() == {1: "overloaded", 2: "free"}
    await world.failing(Overloaded, instance=1)
    world.clock.advance(5.01)
    assert world.states() == {1: "free", 2: "free"}


async def test_an_error_of_the_handler_says_nothing_about_the_instance(world: World) -> None:
    world.plane.default = answer("one", error=EngineError("boom"))
    with pytest.raises(EngineError):
        await world.client.generate("hi").collect()
    assert set(world.states().values()) == {"free"}


@pytest.mark.parametrize(
    ("phase", "limit", "inhibits"),
    [
        (Phase.ACCEPT, "accept", True),
        (Phase.CALL_HOME, "call_home", True),
        (Phase.PROLOGUE, "prologue", False),
        (Phase.FIRST_ITEM, "first_item", False),
    ],
)
async def test_each_wait_is_bounded_and_named(phase: Phase, limit: str, inhibits: bool) -> None:
    world = World(instances=1, **{f"{limit}_timeout": 2.0})
    world.plane.default = hang(phase)
    task = asyncio.ensure_future(world.client.generate("hi").collect())
    await eventually(lambda: bool(world.opened))
    world.clock.advance(1.9, world.wheel)
    await asyncio.sleep(0)
    assert not task.done()
    world.clock.advance(0.3, world.wheel)
    with pytest.raises(Timeout) as caught:
        await task
    assert caught.value.phase == phase.label
    assert caught.value.instance == 1
    assert world.states() == {1: "inhibited" if inhibits else "free"}
    world.check_nothing_held()


async def test_a_caller_in_a_hurry_says_nothing_about_the_instance() -> None:
    world = World(instances=1)
    world.plane.default = hang(Phase.ACCEPT)
    task = asyncio.ensure_future(world.client.generate("hi", limits={"accept": 0.5}).collect())
    await eventually(lambda: bool(world.opened))
    world.clock.advance(0.8, world.wheel)
    with pytest.raises(Timeout):
        await task
    assert world.states() == {1: "free"}


# -- nobody there


async def test_nobody_after_a_while_is_unavailable() -> None:
    world = World(instances=0, instance_timeout=0.01)
    await world.failing(Unavailable)
    assert world.opened == []


async def test_somebody_who_comes_in_time_is_asked() -> None:
    world = World(instances=0, instance_timeout=5)
    task = asyncio.ensure_future(world.client.generate("hi").collect())
    await asyncio.sleep(0.01)
    world.show([7])
    assert await task == ["item"]
    assert world.opened == [7]


async def test_not_waiting_is_possible() -> None:
    world = World(instances=0, instance_timeout=0)
    world.view.synced.set()
    started = asyncio.get_running_loop().time()
    await world.failing(Unavailable)
    assert asyncio.get_running_loop().time() - started < 0.5


async def test_draining_instances_take_nothing_new(world: World) -> None:
    world.view.availability.mark_draining(1)
    world.view.availability.mark_draining(2)
    for _ in range(3):
        await world.client.generate("hi").collect()
    assert world.opened == [3, 3, 3]
    world.view.availability.mark_draining(3)
    await world.failing(Unavailable)


# -- the whole time of a request


async def test_the_total_counts_over_all_attempts() -> None:
    world = World(instances=3)

    async def slow_to_refuse(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        world.clock.advance(0.6)
        inbox.finish(Disconnected("cut"))

    world.plane.default = slow_to_refuse
    error = await world.failing(Timeout, timeout=1.0)
    assert error.phase == "total"
    assert len(world.opened) == 2
    assert world.plane.requests[0].deadline == 1.0
    assert world.plane.requests[1].deadline == pytest.approx(0.4)


async def test_waiting_for_an_instance_counts_too() -> None:
    world = World(instances=0, instance_timeout=30)
    started = asyncio.get_running_loop().time()
    with pytest.raises((Timeout, Unavailable)):
        await world.client.generate("hi", timeout=0.05).collect()
    assert asyncio.get_running_loop().time() - started < 5


async def test_the_deadline_of_the_callers_request_is_ours(world: World) -> None:
    world.plane.default = hang(Phase.FIRST_ITEM)
    context = Context("outer", deadline=world.wheel.now() + 2.0)
    task = asyncio.ensure_future(world.client.generate("hi", context).collect())
    await eventually(lambda: bool(world.opened))
    assert world.plane.requests[0].deadline == pytest.approx(2.0)
    world.clock.advance(2.3, world.wheel)
    with pytest.raises(Timeout) as caught:
        await task
    assert caught.value.phase == "total"
    late = Context("late", deadline=world.wheel.now() - 1)
    with pytest.raises(Timeout):
        await world.client.generate("hi", late).collect()
    assert len(world.opened) == 1


async def test_the_shorter_of_deadline_and_timeout_counts(world: World) -> None:
    context = Context("outer", deadline=world.wheel.now() + 2.0)
    await world.client.generate("hi", context, timeout=0.5).collect()
    await world.client.generate("hi", context, timeout=50.0).collect()
    assert [envelope.deadline for envelope in world.plane.requests] == [pytest.approx(0.5), pytest.approx(2.0)]


# -- ending


async def test_leaving_the_block_kills(world: World) -> None:
    world.plane.default = hang(Phase.FIRST_ITEM)
    async with world.client.generate("hi") as stream:
        assert world.view.occupancy.load(stream.instance_id) == 1
    assert isinstance(world.plane.inboxes[0].error, Cancelled)
    assert stream.instance_id == 1
    with pytest.raises(Cancelled):
        await anext(stream)


async def test_a_stream_that_is_dropped_is_killed(world: World) -> None:
    async def trickles(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        inbox.receive(["one"])

    world.plane.default = trickles
    assert await anext(world.client.generate("hi")) == "one"
    gc.collect()
    await eventually(lambda: world.plane.inboxes[0].ended, what="the dropped stream was killed")
    assert world.view.occupancy.total == 0


async def test_a_stream_never_read_costs_nothing(world: World) -> None:
    world.client.generate("hi")
    stream = world.client.generate("hi")
    stream.kill()
    stream.kill()
    with pytest.raises(StatorError):
        await stream.collect()
    assert world.opened == []


async def test_entering_twice_sends_once(world: World) -> None:
    stream = world.client.generate("hi")
    async with stream, stream:
        pass
    assert world.opened == [1]


@pytest.mark.parametrize("how", ["kill", "context"])
async def test_killed_while_connecting_nothing_comes_alive_again(world: World, how: str) -> None:
    gate = asyncio.Event()

    async def connects_slowly(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        await gate.wait()
        if not inbox.ended:
            inbox.receive(["alive"])

    world.plane.default = connects_slowly
    context = Context("outer")
    stream = world.client.generate("hi", context)
    task = asyncio.ensure_future(stream.collect())
    await eventually(lambda: bool(world.opened))
    stream.kill() if how == "kill" else context.kill()
    gate.set()
    with pytest.raises(Cancelled):
        await task


async def test_cancelled_while_connecting(world: World) -> None:
    world.plane.default = hang()
    task = asyncio.ensure_future(world.client.generate("hi").collect())
    await eventually(lambda: bool(world.opened))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(world.plane.inboxes[0].error, Cancelled)


async def test_a_killed_context_sends_nothing(world: World) -> None:
    context = Context("outer")
    context.kill()
    with pytest.raises(Cancelled):
        await world.client.generate("hi", context).collect()
    assert world.opened == []


async def test_a_stopped_context_or_stream_sends_nothing_and_is_complete(world: World) -> None:
    context = Context("outer")
    context.stop()
    assert await world.client.generate("hi", context).collect() == []
    stream = world.client.generate("hi")
    stream.stop()
    async with stream:
        assert await stream.collect() == []
    assert world.opened == []


async def test_a_context_is_let_go_at_the_end(world: World) -> None:
    context = Context("outer")
    for _ in range(3):
        await world.client.generate("hi", context).collect()
    async with world.client.generate("hi", context) as stream:
        await anext(stream)
    world.plane.default = refuse(EngineError("x"))
    with pytest.raises(EngineError):
        await world.client.generate("hi", context).collect()
    assert not context._on_end  # pyright: ignore[reportPrivateUsage]


# -- what a caller may say


async def test_identity_comes_from_the_context_unless_it_is_given(world: World) -> None:
    context = Context("outer", metadata={"tenant": "t"}, headers={"traceparent": "p"})
    await world.client.generate("hi", context).collect()
    await world.client.generate("hi", context, id="own", metadata={"a": "b"}, headers={}).collect()
    await world.client.generate("hi").collect()
    first, second, third = world.plane.requests
    assert (first.id, first.metadata, first.headers) == ("outer", {"tenant": "t"}, {"traceparent": "p"})
    assert (second.id, second.metadata, second.headers) == ("own", {"a": "b"}, {})
    assert third.id not in ("outer", "own")
    assert third.payload == b'"hi"'


@pytest.mark.parametrize(
    "options",
    [
        {"id": ""},
        {"id": 7},
        {"id": "\ud800"},
        {"metadata": {"a": 1}},
        {"metadata": {"a": "\ud800"}},
        {"headers": {"a": None}},
        {"limits": {"patience": 3}},
        {"limits": {"items": 0}},
        {"limits": {"items": "soon"}},
        {"timeout": -1},
        {"timeout": "soon"},
    ],
    ids=str,
)
async def test_what_cannot_be_sent_is_refused_at_once(world: World, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        world.client.generate("hi", **options)
    assert world.opened == []


@pytest.mark.parametrize("request_", [object(), {1, 2}, 2**70, "\ud800"], ids=["object", "set", "large", "surrogate"])
async def test_a_request_without_json_form_is_refused_at_once(world: World, request_: Any) -> None:
    if isinstance(request_, set):  # has one: a list
        await world.client.generate(request_).collect()
        return
    with pytest.raises(UsageError):
        world.client.generate(request_)


async def test_unknown_options_of_the_named_policies(world: World) -> None:
    with pytest.raises(UsageError, match="speed"):
        world.client.random("hi", speed=3)
    await world.client.random("hi", timeout=3.0, id="x", retry="auto").collect()
    await world.client.round_robin("hi", limits={"items": 3.0}, metadata={"a": "b"}).collect()
    assert [envelope.id for envelope in world.plane.requests[:1]] == ["x"]


async def test_one_reader_at_a_time(world: World) -> None:
    world.plane.default = hang(Phase.FIRST_ITEM)
    async with world.client.generate("hi") as stream:
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(UsageError):
            await anext(stream)
        world.plane.inboxes[0].receive(["for the first"])
        assert await first == "for the first"
