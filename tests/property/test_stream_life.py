"""The life of a stream on every plane: opened, accepted, queued, stopped, killed, ended, refused, cut at either side, paused by its reader,
in every order, several at once, over a network that carries bytes when hypothesis says so. The model is `stator.testing.stream_life`.

From each state that is reached there is a way out: handlers that end, callers that stop or kill, a cut. After any of them both sides have
come to one end, and nothing is left in planes, budgets, wheel and network. While both sides read, all that was sent arrives.

What bytes and windows are is not seen here: `test_native_session`, `test_native_conversations`, `test_compatible_wire`.
"""

from random import Random
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from stator.errors import Overloaded, Unavailable
from stator.protocol.envelope import IncomingRequest, RequestEnvelope
from stator.protocol.ids import endpoint_path
from stator.protocol.records import EndpointRecord, Transport
from stator.tasks import DeadlineWheel
from stator.testing.manual_loop import ManualLoop
from stator.testing.pipe import Pipe
from stator.testing.stream_life import CALL_HOME, Call, Story, worker_error
from stator.transports.memory import MemoryNetwork, MemoryPlane
from stator.transports.native.client import NativeClient
from stator.transports.native.config import NativeConfig
from stator.transports.native.server import NativeServer
from stator.transports.plane import PlaneHost, Responder
from stator.transports.tcp.answer import Answer
from stator.transports.tcp.client import CompatibleClient
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.input_call import InputCall
from stator.transports.tcp.server import CompatibleServer

INSTANCE = 7
WINDOW = 16 * 1024
MOST = 4
"""requests at once"""
NUMBERS = st.integers(0, 59)
SIZES = st.sampled_from([0, 10, 500, 7000, 20_000, 70_000])
CHUNKS = st.sampled_from([1, 3, 12, 24, 25, 40, 600, 9000, None])

BEGINNINGS = ["open"] * 3 + ["open queued", "open refused", "open typed"]
CALLERS = ["take"] * 4 + ["say"] * 5 + ["end inputs", "stop", "kill"]
WORKERS = ["start"] + ["accept"] * 4 + ["send"] * 6 + ["hear"] * 4 + ["end", "fail", "refuse"]
NETWORK = ["turn"] * 4 + ["carry"] * 6 + ["settle"] * 4 + ["dials wait", "dials go on"]
CUTS = ["cut", "cut at the caller", "cut at the worker", "leave discovery"]
WAYS_OUT = ["all end", "all stop", "all kill", "all cut"]
EVENTS = BEGINNINGS * 2 + CALLERS * 4 + WORKERS * 4 + NETWORK * 3 + CUTS + WAYS_OUT + ["flow"] * 2
"""what may happen, as often as it shall"""


class Road:
    """A worker's plane and a caller's on one loop."""

    def __init__(self, loop: ManualLoop) -> None:
        self.loop = loop
        self.wheel = DeadlineWheel(loop)
        self.host = PlaneHost(
            process="a" * 32,
            bind_host="127.0.0.1",
            advertise_host="127.0.0.1",
            socket_directory=None,
            wheel=self.wheel,
            clock=loop,
            random=Random(1),
            observer=None,
            input_timeout=None,
        )
        self.server: Any
        self.client: Any

    def cut(self, which: int, *, side: bool | None) -> None:
        """Break a connection, or the network: at both sides, or at one, where the other hears of it later."""
        pipes = self.loop.connections
        if pipes:
            pipe = pipes[which % len(pipes)]
            if side is None:
                pipe.cut()
            else:
                pipe.ends[side].abort()

    def concerned(self, pipe: Pipe, stories: list[Story]) -> list[Story]:
        """Whose connection it is."""
        return stories

    def left(self) -> int:
        """Streams and bytes that are still accounted for."""
        return 0


class NativeRoad(Road):
    def __init__(self, loop: ManualLoop) -> None:
        super().__init__(loop)
        config = NativeConfig(unix=False, pulse=False, window=WINDOW, silence=1e6, dead_after=1e7)
        self.server = loop.finish(NativeServer.listen(config, self.host))
        self.client = loop.finish(NativeClient.start(config, self.host))

    def left(self) -> int:
        killed = sum(len(line.session.killed) for line in self.client._all if line.session is not None)
        budgets = self.client._host.budget.out + self.server._budget.out
        return self.client.open_streams + self.server.open_streams + killed + budgets


class CompatibleRoad(Road):
    def __init__(self, loop: ManualLoop) -> None:
        super().__init__(loop)
        config = TcpConfig()
        self.server = loop.finish(CompatibleServer.listen(config, self.host))
        self.client = loop.finish(CompatibleClient.start(config, self.host))

    def concerned(self, pipe: Pipe, stories: list[Story]) -> list[Story]:
        dialler = pipe.dialled.protocol
        if isinstance(dialler, InputCall):
            dialler = dialler._request
            if dialler is None:
                return []
        if isinstance(dialler, Answer):
            return [story for story in stories if story.id == dialler._request_id]
        return stories  # a request connection

    def left(self) -> int:
        return self.client.open_streams + self.server.open_streams


class MemoryRoad(Road):
    def __init__(self, loop: ManualLoop) -> None:
        super().__init__(loop)
        network = MemoryNetwork(window=WINDOW)
        self.server, self.client = MemoryPlane(network), MemoryPlane(network)
        self.server.input_timeout = None

    def cut(self, which: int, *, side: bool | None) -> None:
        self.server.cut()

    def left(self) -> int:
        return len(self.server.served) + len(self.client.opened)


class Life(RuleBasedStateMachine):
    """What callers, workers and the network do."""

    road_type: type[Road]

    @initialize(lose=st.booleans())
    def connect(self, lose: bool) -> None:
        self.loop = ManualLoop()
        self.loop.resets_lose = lose
        self.road = self.road_type(self.loop)
        path = endpoint_path(INSTANCE, "generate")
        self.road.server.register(path, self)
        bare = EndpointRecord(
            component="backend", endpoint="generate", namespace="test", instance_id=INSTANCE, transport=Transport()
        )
        self.record = self.road.server.describe(bare, path)
        self.count = 0
        self.breaking = False
        """a connection was cut, and it may not be known everywhere"""
        self.stories: list[Story] = []

    # -- the sink

    def __call__(self, request: IncomingRequest, responder: Responder) -> Call:
        story = next(story for story in self.stories if story.id == request.id)
        assert story.call is None, "a request arrived twice"
        if story.refusing is not None:
            raise story.refusing
        story.call = Call(story, request, responder, self.loop)
        return story.call

    def malformed(self, size: int, kind: str) -> None:
        raise AssertionError(f"a request of {size} bytes could not be read: {kind}")

    # -- what may happen

    @rule(what=st.sampled_from(EVENTS), number=NUMBERS, size=SIZES, chunk=CHUNKS)
    def happens(self, what: str, number: int, size: int, chunk: int | None) -> None:
        """One thing. `number` chooses the request, or the connection; `size` is of a request or an item, `chunk` of what is carried."""
        count = 4 if size > 500 or number % 2 else 50  # small items by the dozen: some windows count items, others bytes
        if what in WAYS_OUT:
            self.leave(what)
        elif what == "flow":
            self.flow()
        elif what in NETWORK or what in CUTS:
            self.network(what, number, chunk)
        elif what in BEGINNINGS or not self.stories:
            if len(self.stories) < MOST:
                self.open(what if what in BEGINNINGS else "open", size, talks=bool(number & 1))
            else:
                self.loop.settle()
        elif number % 3 and what in ("say", "send", "hear"):
            self.bring_on_the_way(self.stories[number % len(self.stories)])
        if what in CALLERS and self.stories:
            self.caller(what, self.stories[number % len(self.stories)], size, count)
        elif what in WORKERS and self.stories:
            self.worker(what, self.stories[number % len(self.stories)].call, size, count)
        for story in self.stories:
            story.check_now()

    def bring_on_the_way(self, story: Story) -> None:
        """Chance alone seldom brings a request so far that something flows."""
        self.loop.settle()
        if story.call is not None:
            self.loop.act(story.call.accept)
            self.loop.act(lambda: story.say("first"))
            self.loop.settle()

    def open(self, what: str, size: int, *, talks: bool) -> None:
        self.count += 1
        story = Story(f"r{self.count}", self.loop, self.road.wheel, instance=INSTANCE, talks=talks, typed=what == "open typed")
        story.queueing = what == "open queued"
        story.refusing = Overloaded("no slot is free") if what == "open refused" else None
        story.cut = self.breaking  # it may share what is breaking
        self.stories.append(story)
        payload = b"" if talks else msgspec.json.encode("x" * size)
        envelope = RequestEnvelope(id=story.id, payload=payload, streams_in=talks)
        self.loop.act(lambda: story.go(self.road.client.open(self.record, envelope, story.inbox)))
        self.loop.turn()  # as in a caller's own task: nothing comes between the inbox and its opening

    def caller(self, what: str, story: Story, size: int, count: int) -> None:
        match what:
            case "take":
                self.loop.act(story.take)
            case "say":
                for _ in range(count):
                    self.loop.act(lambda: story.say([len(story.inputs), "x" * size]))
            case "end inputs":
                self.loop.act(story.end_inputs)
            case "stop":
                self.loop.act(story.stop)
            case _:
                self.loop.act(story.kill)

    def worker(self, what: str, call: Call | None, size: int, count: int) -> None:
        if call is None:
            self.loop.turn()
            return
        match what:
            case "start":
                self.loop.act(call.start)
            case "accept":
                self.loop.act(call.accept)
            case "send":
                for _ in range(count):
                    self.loop.act(lambda: call.send([len(call.sent), "x" * size]))
            case "hear":
                self.loop.act(call.hear)
            case "end" | "fail":
                self.loop.act(lambda: call.end(worker_error() if what == "fail" else None))
            case _:
                self.loop.act(lambda: call.refuse(Unavailable("not now")))

    def network(self, what: str, number: int, chunk: int | None) -> None:
        loop = self.loop
        pipes = loop.connections
        match what:
            case "turn":
                loop.turn()
            case "carry":
                if pipes:
                    loop.act(lambda: pipes[number // 2 % len(pipes)].ends[number % 2].carry(chunk))
                loop.turn()
            case "settle":
                loop.settle()
                self.breaking = False
            case "dials wait":
                loop.hold_dials = True
            case "dials go on":
                loop.hold_dials = False
                loop.act(loop.let_dials_through)
            case "leave discovery":
                self.leave_discovery()
            case _:
                self.cut(number, side=None if what == "cut" else what == "cut at the worker")

    def leave_discovery(self) -> None:
        """The instance's record is gone: what it has not accepted will not be answered."""
        before = [story for story in self.stories if not story.ended]
        self.loop.act(lambda: self.road.client.forget(self.record))
        for story in before:
            story.cut |= story.ended

    def cut(self, number: int, *, side: bool | None) -> None:
        self.breaking = True
        pipes = self.loop.connections
        concerned = self.road.concerned(pipes[number % len(pipes)], self.stories) if pipes else self.stories
        for story in concerned:
            story.cut |= not story.ended
        self.loop.act(lambda: self.road.cut(number, side=side))

    # -- ways out

    def flow(self) -> None:
        """Everybody reads until there is nothing more."""
        self.loop.hold_dials = False
        before: list[Any] = []
        still = 0
        while still < 3:
            for story in self.stories:
                self.loop.act(story.take)
                if story.call is not None:
                    self.loop.act(story.call.hear)
            self.loop.settle()
            now = [story.progress for story in self.stories]
            still = still + 1 if now == before else 0
            before = now
        self.breaking = False
        for story in self.stories:
            story.check_now()
            story.check_flow()

    def leave(self, how: str) -> None:
        """Bring all requests to their end, then begin anew."""
        loop = self.loop
        loop.hold_dials = False
        for round in range(200):
            if how == "all cut":  # again and again: what is dialled meanwhile is not concerned by the last one
                for story in self.stories:
                    story.cut |= not story.ended
                loop.act(lambda: [self.road.cut(0, side=None), *[pipe.cut() for pipe in tuple(loop.connections)]])
            self.everybody_goes_on(how)
            loop.settle()
            if all(self.done(story) for story in self.stories):
                break
            if round == 100:
                loop.pass_time(CALL_HOME + 1)
        for story in self.stories:
            story.check_now()
            story.check()
        loop.pass_time(1.5)  # what lingers after an error
        assert self.road.left() == 0
        assert not loop.failures
        self.stories.clear()
        self.breaking = False

    def done(self, story: Story) -> bool:
        return (story.finished or story.raised is not None) and (story.call is None or story.call.over)

    def everybody_goes_on(self, how: str) -> None:
        """Who can end something does; who can take something takes it."""
        for story in self.stories:
            call = story.call
            if how == "all stop" and not story.stopped:
                self.loop.act(story.stop)
            elif how == "all kill":
                self.loop.act(story.kill)
            self.loop.act(story.take)
            if call is not None:
                self.loop.act(call.start)
                if how == "all end" or call.stopped:
                    self.loop.act(call.accept)
                    self.loop.act(call.end)
                elif how == "all stop":
                    self.loop.act(call.accept)

    def teardown(self) -> None:
        if not hasattr(self, "road"):
            return
        try:
            self.flow()
            self.leave("all end")
            for plane in (self.road.client, self.road.server):
                self.loop.finish(plane.aclose())
            self.loop.settle()
            assert not self.loop.connections
            assert len(self.road.wheel) == 0
            assert not self.loop.failures
        finally:
            self.road.wheel.close()
            self.loop.close()


class MemoryLife(Life):
    road_type = MemoryRoad


class NativeLife(Life):
    road_type = NativeRoad


class CompatibleLife(Life):
    road_type = CompatibleRoad


def run(machine: type[Life], *, examples: int, steps: int, always_the_same: bool) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=always_the_same,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )


PLANES = pytest.mark.parametrize("machine", [MemoryLife, NativeLife, CompatibleLife])


@PLANES
@pytest.mark.timeout(400)
def test_there_is_a_way_out_of_every_state(machine: type[Life]) -> None:
    run(machine, examples=200, steps=100, always_the_same=True)


@PLANES
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_there_is_a_way_out_of_many_more_states(machine: type[Life]) -> None:
    run(machine, examples=8000, steps=150, always_the_same=False)


def life(machine: type[Life], *steps: str, size: int = 0) -> Life:
    """What hypothesis found once, step by step."""
    state = machine()
    state.connect(lose=False)
    for step in steps:
        state.happens(what=step, number=0, size=size, chunk=None)
    return state


def test_a_handler_that_waits_goes_on_when_its_answer_was_ended_and_then_cut() -> None:
    """The native plane forgets an ended stream: its cut has to wake who waits, too."""
    state = life(NativeLife, "open", "settle", "accept", "send", "settle", "send", "turn", size=20_000)
    call = state.stories[0].call
    assert call is not None and call._ready is not None and not call._ready.done()
    state.happens(what="end", number=0, size=0, chunk=None)
    state.happens(what="cut", number=0, size=0, chunk=None)
    state.loop.settle()
    assert call._ready.done()
    state.teardown()


@PLANES
def test_many_small_items_pass_readers_that_paused(machine: type[Life]) -> None:
    """More than any window of items or bytes takes, both ways, before anybody reads."""
    state = life(machine)
    state.happens(what="open", number=1, size=0, chunk=None)
    for what in ["settle", "accept", *["say", "settle", "send", "settle"] * 12]:
        state.happens(what=what, number=4, size=10, chunk=None)
    story = state.stories[0]
    assert story.call is not None and len(story.inputs) > 64 and len(story.call.sent) > 64 and not story.read
    for what in ("flow", "end inputs", "flow"):
        state.happens(what=what, number=0, size=0, chunk=None)
    assert story.call.heard_all and len(story.read) == len(story.call.sent)
    state.teardown()


@PLANES
@pytest.mark.parametrize("ending", ["kill", "stop"])
def test_a_request_that_has_not_left_can_be_taken_back(machine: type[Life], ending: str) -> None:
    """The connection is full: what waits behind it is forgotten at once, and the others are not disturbed."""
    state = life(machine, "open", "settle", "all end")
    for _ in range(3):
        state.happens(what="open", number=0, size=70_000, chunk=None)
    state.happens(what=ending, number=2, size=0, chunk=None)
    state.happens(what="flow", number=0, size=0, chunk=None)
    first, second, third = state.stories
    assert first.call is not None and second.call is not None
    assert third.ended or (ending == "stop" and machine is not NativeLife)  # there it leaves at once, and the stop follows it
    state.teardown()
