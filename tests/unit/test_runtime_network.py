"""Which plane reaches an instance: the better one, the other one only when nothing was sent, the better one again later."""

import asyncio
import logging
from collections.abc import Iterator

import pytest

from stator.errors import (
    ConfigError,
    ConnectFailed,
    Disconnected,
    Overloaded,
    PeerProtocolError,
    StatorError,
    Timeout,
    Unavailable,
    UsageError,
)
from stator.protocol.envelope import IncomingRequest, RequestEnvelope
from stator.protocol.records import EndpointRecord
from stator.runtime.network import Network, PlaneChoice, choose_planes
from stator.tasks import DeadlineWheel
from stator.testing.fake_plane import FakePlane, answer, fail_to_connect, fake_host, fake_record, hang
from stator.testing.manual_clock import ManualClock
from stator.transports.inbox import Inbox, Patience, PhaseLimits
from stator.transports.plane import RequestControl, Responder

pytestmark = pytest.mark.timeout(10)

RETRY = 30.0
ENVELOPE = RequestEnvelope(id="r", payload=b"null")
FAILURES = [ConnectFailed("refused"), Timeout("no HELLO", phase="connect")]


class World:
    """A network over two fake planes and a clock that stands still."""

    def __init__(self, *, fall_back: bool = True) -> None:
        self.clock = ManualClock()
        self.wheel = DeadlineWheel(asyncio.get_running_loop(), now=self.clock.monotonic)
        self.native, self.tcp = FakePlane("native"), FakePlane("tcp")
        choice = PlaneChoice(planes=(self.native, self.tcp), fall_back=fall_back)
        self.network = Network(choice, fake_host(self.wheel), retry=RETRY)

    async def open(self, record: EndpointRecord) -> Inbox:
        inbox = Inbox(wheel=self.wheel, patience=Patience(PhaseLimits()), instance=record.instance_id)
        await self.network.open(record, ENVELOPE, inbox)
        return inbox

    @property
    def opened(self) -> tuple[list[int], list[int]]:
        return self.native.opened, self.tcp.opened


@pytest.fixture
def records() -> Iterator[list[EndpointRecord]]:
    yield [fake_record(n) for n in range(4)]


# -- which plane


async def test_the_better_plane_where_it_is_spoken() -> None:
    world = World()
    await world.open(fake_record(1))
    await world.open(fake_record(2, native=False))
    await world.open(fake_record(3, tcp=False))
    assert world.opened == ([1, 3], [2])
    assert world.network.fallbacks == {}


async def test_a_plane_is_connected_at_its_first_request_and_once() -> None:
    world = World()
    gate = asyncio.Event()
    world.native.on_connect = gate.wait
    async with asyncio.TaskGroup() as group:
        for n in range(5):
            group.create_task(world.open(fake_record(n)))
        await asyncio.sleep(0)
        assert world.native.log == ["connect"]
        gate.set()
    assert world.native.log == ["connect"]
    assert world.tcp.log == []


async def test_an_instance_nobody_reaches() -> None:
    world = World()
    with pytest.raises(ConnectFailed, match="native, tcp") as caught:
        await world.open(fake_record(5, native=False, tcp=False))
    assert caught.value.instance == 5
    assert caught.value.phase == "connect"


# -- falling back


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: error.code)
async def test_a_failed_connect_falls_back(failure: StatorError) -> None:
    world = World()
    world.native.default = fail_to_connect(failure)
    inbox = await world.open(fake_record(1))
    assert list(inbox.items) == ["item"]
    assert world.opened == ([1], [1])
    assert world.network.fallbacks == {failure.code: 1}


@pytest.mark.parametrize(
    "failure",
    [Overloaded("no stream left"), UsageError("too large"), PeerProtocolError("bad"), Disconnected("cut"), Unavailable("x")],
    ids=lambda error: error.code,
)
async def test_nothing_else_does(failure: StatorError) -> None:
    world = World()
    world.native.default = fail_to_connect(failure)
    with pytest.raises(type(failure)):
        await world.open(fake_record(1))
    assert world.opened == ([1], [])
    await_again = world.native.opened
    world.native.default = answer()
    await world.open(fake_record(1))
    assert await_again == [1, 1]


async def test_what_was_sent_is_not_sent_again() -> None:
    world = World()
    world.native.default = hang()
    inbox = await world.open(fake_record(1))
    inbox.cut("connection lost")
    assert world.opened == ([1], [])


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: error.code)
async def test_never_when_it_is_not_wanted(failure: StatorError) -> None:
    world = World(fall_back=False)
    world.native.default = fail_to_connect(failure)
    for _ in range(2):
        with pytest.raises(type(failure)):
            await world.open(fake_record(1))
    assert world.opened == ([1, 1], [])
    assert world.network.fallbacks == {}


async def test_never_where_nothing_else_reaches_the_instance() -> None:
    world = World()
    world.native.default = fail_to_connect(ConnectFailed("refused"))
    for _ in range(2):
        with pytest.raises(ConnectFailed, match="refused"):
            await world.open(fake_record(1, tcp=False))
    assert world.opened == ([1, 1], [])
    assert world.network.fallbacks == {}


async def test_the_last_plane_has_the_last_word() -> None:
    world = World()
    world.native.default = fail_to_connect(ConnectFailed("no native"))
    world.tcp.default = fail_to_connect(ConnectFailed("no tcp"))
    with pytest.raises(ConnectFailed, match="no tcp"):
        await world.open(fake_record(1))


async def test_the_better_plane_is_left_alone_for_a_while_and_tried_again() -> None:
    world = World()
    record = fake_record(1)
    world.native.default = fail_to_connect(ConnectFailed("refused"))
    await world.open(record)
    world.native.default = answer("native again")
    world.clock.advance(RETRY - 0.1)
    await world.open(record)
    assert world.opened == ([1], [1, 1])
    world.clock.advance(0.2)
    assert list((await world.open(record)).items) == ["native again"]
    assert world.opened == ([1, 1], [1, 1])
    world.clock.advance(3 * RETRY)
    await world.open(record)
    assert world.opened == ([1, 1, 1], [1, 1])


async def test_a_plane_that_worked_may_fail_later() -> None:
    world = World()
    record = fake_record(1)
    await world.open(record)
    await world.open(record)
    world.native.default = fail_to_connect(ConnectFailed("gone"))
    await world.open(record)
    assert world.opened == ([1, 1, 1], [1])
    assert world.network.fallbacks == {"connect_failed": 1}
    await world.open(record)
    assert world.opened == ([1, 1, 1], [1, 1])


async def test_other_instances_are_not_concerned() -> None:
    world = World()
    world.native.scripts[1] = fail_to_connect(ConnectFailed("refused"))
    await world.open(fake_record(1))
    await world.open(fake_record(2))
    assert world.opened == ([1, 2], [1])


async def test_one_warning_per_instance_however_many_requests_fail(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world = World()
    gate = asyncio.Event()

    async def fails_together(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        await gate.wait()
        raise ConnectFailed("refused", phase="connect")

    world.native.default = fails_together
    records = [fake_record(1), fake_record(2)]
    async with asyncio.TaskGroup() as group:
        for record in records * 5:
            group.create_task(world.open(record))
        await asyncio.sleep(0)
        gate.set()
    for _ in range(3):
        world.clock.advance(RETRY + 1)
        await world.open(records[0])
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert sorted(world.tcp.opened) == [1] * 8 + [2] * 5
    assert world.network.fallbacks == {"connect_failed": 5}


async def test_requests_that_fail_together_after_the_plane_worked() -> None:
    world = World()
    record = fake_record(1)
    await world.open(record)
    gate = asyncio.Event()

    async def fails_together(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        await gate.wait()
        raise ConnectFailed("refused", phase="connect")

    world.native.default = fails_together
    async with asyncio.TaskGroup() as group:
        opens = [group.create_task(world.open(record)) for _ in range(5)]
        await asyncio.sleep(0)
        gate.set()
    assert [list(task.result().items) for task in opens] == [["item"]] * 5


async def test_an_instance_that_left_and_came_back_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    record = fake_record(1)
    world.native.default = fail_to_connect(ConnectFailed("refused"))
    await world.open(record)
    world.native.default = answer("native")
    world.network.forget(record)
    assert list((await world.open(fake_record(1))).items) == ["native"]
    assert world.tcp.forgotten == [1]


async def test_the_request_that_is_over_is_not_sent_by_the_other_plane() -> None:
    world = World()

    async def killed_while_connecting(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        inbox.kill()
        raise ConnectFailed("refused", phase="connect")

    world.native.default = killed_while_connecting
    with pytest.raises(StatorError):
        await world.open(fake_record(1))
    assert world.opened == ([1], [])


async def test_the_other_plane_gets_its_own_time_to_connect() -> None:
    world = World()

    async def slow(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        world.clock.advance(2.9, world.wheel)
        raise Timeout("no HELLO", phase="connect")

    world.native.default = slow
    world.tcp.default = hang()
    inbox = await world.open(fake_record(1))
    world.clock.advance(1.0, world.wheel)
    assert not inbox.ended
    inbox.kill()


# -- listening


class Nowhere:
    def malformed(self, size: int, kind: str) -> None: ...

    def __call__(self, request: IncomingRequest, responder: Responder) -> RequestControl:
        raise AssertionError("nothing is delivered here")


nowhere = Nowhere()


async def test_every_plane_listens_once_even_when_endpoints_start_together() -> None:
    world = World()
    gate = asyncio.Event()
    world.native.on_listen = gate.wait
    async with asyncio.TaskGroup() as group:
        for n in range(3):
            group.create_task(world.network.register(fake_record(n), f"{n}/generate", nowhere))
        await asyncio.sleep(0)
        gate.set()
    assert world.native.log == world.tcp.log == ["listen"]
    assert set(world.native.sinks) == set(world.tcp.sinks) == {"0/generate", "1/generate", "2/generate"}
    world.network.unregister("1/generate")
    assert "1/generate" not in world.native.sinks
    world.network.drain()
    assert world.native.log[-1] == world.tcp.log[-1] == "drain"


async def test_a_listener_that_cannot_leaves_nothing_open() -> None:
    world = World()

    async def fails() -> None:
        raise ConnectFailed("address in use")

    world.tcp.on_listen = fails
    with pytest.raises(ConnectFailed):
        await world.network.register(fake_record(1), "1/generate", nowhere)
    assert world.native.log == ["listen", "close"]
    world.tcp.on_listen = None
    await world.network.register(fake_record(1), "1/generate", nowhere)  # the next one may try again
    assert set(world.native.sinks) == {"1/generate"}


# -- closing


async def test_callers_are_closed_before_listeners_and_nothing_opens_again() -> None:
    world = World(fall_back=True)
    order: list[str] = []

    class Noting(FakePlane):
        def __init__(self, name: str, what: str) -> None:
            super().__init__(name)
            self.what = what

        async def listen(self, host: object) -> FakePlane:  # type: ignore[override]  # only the answer matters
            return Noting("native", "server")

        async def aclose(self) -> None:
            order.append(self.what)

    plane = Noting("native", "client")
    network = Network(PlaneChoice(planes=(plane,), fall_back=False), fake_host(world.wheel), retry=RETRY)
    await network.register(fake_record(1), "1/generate", nowhere)
    inbox = Inbox(wheel=world.wheel, patience=Patience(PhaseLimits()))
    await network.open(fake_record(1), ENVELOPE, inbox)
    await network.aclose()
    await network.aclose()
    assert order == ["client", "server"]
    with pytest.raises(StatorError):
        await network.open(fake_record(1), ENVELOPE, inbox)
    with pytest.raises(StatorError):
        await network.register(fake_record(2), "2/generate", nowhere)
    assert plane.log == ["connect"]


# -- the setting


@pytest.mark.parametrize(
    ("name", "request_plane", "planes", "listening", "fall_back"),
    [
        ("auto", "tcp", ["native", "tcp", "nats", "http2"], ["native", "tcp"], True),
        ("auto", "nats", ["native", "tcp", "nats", "http2"], ["native", "nats"], True),
        ("native", "nats", ["native"], ["native"], False),
        ("compatible", "http2", ["tcp", "nats", "http2"], ["http2"], False),
    ],
)
def test_what_the_settings_mean(
    name: str, request_plane: str, planes: list[str], listening: list[str], fall_back: bool
) -> None:
    choice = choose_planes(name, request_plane, lambda plane: lambda: FakePlane(plane))
    assert [plane.name for plane in choice.planes] == planes
    assert [plane.name for plane in choice.listening] == listening
    assert choice.fall_back is fall_back


def test_an_unknown_plane_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected auto, native, compatible or memory"):
        choose_planes("fast", "tcp", lambda plane: lambda: FakePlane(plane))
