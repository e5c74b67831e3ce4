"""A worker whose handler goes bad, as the rest of its cluster sees it: its record goes, and comes back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from stator.errors import Disconnected, EngineError, StatorError, Unavailable
from stator.health import EndpointState
from stator.protocol.annotated import Annotated
from stator.protocol.records import EndpointRecord, Query
from stator.runtime import Client, Context, Runtime, ServedEndpoint
from stator.testing.cluster import ENDPOINT, Cluster
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(60)

WAIT, LIMIT = 0.4, 0.3
IN_TIME = WAIT * 1.25 + LIMIT + 0.3
"""seconds until a fault is known: silence, noticed a quarter late, the time for an answer, and the wheel's tenth for each"""
SLACK = 0.5
"""seconds for a busy machine"""
CANARY = {"canary": True}
SETTINGS: dict[str, Any] = {"health__canary": True, "health__canary_wait": WAIT, "health__canary_timeout": LIMIT}


class Moody:
    """A handler that does as it is told; counts who asks."""

    def __init__(self) -> None:
        self.mood = "good"
        self.probes = 0
        self.requests = 0

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        if request == CANARY:
            self.probes += 1
        else:
            self.requests += 1
        match self.mood:
            case "hangs":
                await asyncio.Event().wait()
            case "raises":
                raise RuntimeError("engine down")
            case "error items":
                yield Annotated(event="error", comment=["engine down"])
            case "endless":
                while True:
                    yield "token"
                    await asyncio.sleep(0.02)
            case _:
                yield "fine"


class Ward:
    """A worker with a canary, and somebody else who watches."""

    def __init__(self, cluster: Cluster, handler: Moody, runtime: Runtime, served: ServedEndpoint, client: Client) -> None:
        self.cluster = cluster
        self.handler = handler
        self.runtime = runtime
        self.served = served
        self.client = client

    @classmethod
    @asynccontextmanager
    async def open(cls, plane: str = "memory", **settings: Any) -> AsyncIterator["Ward"]:
        """The worker is listed, and its first canary has been answered."""
        async with Cluster.open(plane, instance_timeout=0.05) as cluster:
            handler, runtime = Moody(), await cluster.join(**{**SETTINGS, **settings})
            served = await runtime.endpoint(ENDPOINT).start(handler, canary_payload=CANARY)
            client = await cluster.client()
            await client.wait_for_instances(timeout=5)
            ward = cls(cluster, handler, runtime, served, client)
            await ward.becomes(EndpointState.READY)
            yield ward
            handler.mood = "good"

    async def becomes(self, state: EndpointState) -> None:
        await eventually(lambda: self.runtime.health.state("generate") is state, within=IN_TIME + SLACK, what=state.value)

    async def is_withdrawn(self) -> None:
        await eventually(lambda: not self.client.instance_ids(), within=IN_TIME + SLACK, what="withdrawn")

    async def is_listed(self) -> None:
        await eventually(lambda: self.client.instance_ids() == [self.runtime.instance_id], within=IN_TIME + SLACK)

    async def rounds(self, number: int) -> None:
        """Wait for so many probes more."""
        end = self.handler.probes + number
        await eventually(lambda: self.handler.probes >= end, within=number * (WAIT + LIMIT + 0.5) + SLACK, what="probes")

    async def recorded(self) -> bool:
        return bool(await self.runtime.discovery.list(Query(EndpointRecord.bucket)))


@pytest.mark.parametrize("plane", ["memory", "native", "compatible"])
@pytest.mark.parametrize("mood", ["hangs", "raises", "error items"])
async def test_a_worker_that_stops_answering_is_withdrawn_and_comes_back(
    mood: str, plane: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Ward.open(plane) as ward:
        assert await ward.client.generate("hi").collect() == ["fine"]
        ward.handler.mood = mood
        await ward.is_withdrawn()
        assert ward.runtime.health.state("generate") is EndpointState.SICK
        assert not ward.runtime.health.ready
        assert not ward.served.listed
        with pytest.raises(Unavailable):
            await ward.client.generate("hi").collect()
        ward.handler.mood = "good"
        await ward.is_listed()
        assert ward.runtime.health.ready
        assert await ward.client.generate("hi").collect() == ["fine"]
    assert "endpoint generate is notready" in caplog.text


@pytest.mark.parametrize("mood", ["raises", "error items"])
async def test_requests_that_all_fail_are_no_signs_of_life(mood: str) -> None:
    async with Ward.open("compatible") as ward:
        ward.handler.mood = mood
        failed = 0
        limit = asyncio.get_running_loop().time() + IN_TIME + SLACK
        while ward.client.instance_ids():
            assert asyncio.get_running_loop().time() < limit, "it is still listed"
            try:
                items = await ward.client.generate("hi").collect()
                assert [item.event for item in items] == ["error"]
            except EngineError:
                pass
            except (Unavailable, Disconnected):  # it was withdrawn in this moment
                break
            failed += 1
            await asyncio.sleep(0.02)
        assert failed >= 10


async def test_a_process_is_found_sick_as_fast_as_is_promised() -> None:
    async with Ward.open() as ward:
        assert await ward.client.generate("hi").collect() == ["fine"]
        ward.handler.mood = "hangs"
        began = asyncio.get_running_loop().time()
        await ward.is_withdrawn()
        assert asyncio.get_running_loop().time() - began < IN_TIME + SLACK


async def test_real_answers_keep_the_canary_quiet() -> None:
    async with Ward.open("native") as ward:
        before = ward.handler.probes
        for _ in range(40):
            assert await ward.client.generate("hi").collect() == ["fine"]
            await asyncio.sleep(WAIT / 8)
        assert ward.handler.probes == before


async def test_a_long_answer_keeps_the_canary_quiet() -> None:
    async with Ward.open("native") as ward:
        ward.handler.mood = "endless"
        async with ward.client.generate("hi") as stream:
            await anext(stream)
            before = ward.handler.probes
            end = asyncio.get_running_loop().time() + 5 * WAIT
            async for _ in stream:
                if asyncio.get_running_loop().time() > end:
                    break
            assert ward.handler.probes <= before + 1  # one may have been about to be sent


async def test_late_while_admission_is_full_is_busy_not_sick() -> None:
    async with Ward.open(admission__slots=2, admission__queue=1) as ward:
        ward.handler.mood = "hangs"
        streams = [ward.client.generate("hi") for _ in range(3)]
        reading = [asyncio.ensure_future(stream.collect()) for stream in streams]
        await eventually(lambda: ward.served.inflight == 3)
        await ward.rounds(3)
        assert ward.client.instance_ids() == [ward.runtime.instance_id]
        assert ward.runtime.health.ready
        streams[0].kill()  # no longer full
        await ward.is_withdrawn()
        for stream in streams:
            stream.kill()
        await asyncio.gather(*reading, return_exceptions=True)


class Unreachable:
    """Discovery that cannot be written to for a number of calls."""

    def __init__(self, call: Any, times: int) -> None:
        self._call = call
        self.left = times

    async def __call__(self, *args: Any) -> bool:
        if self.left:
            self.left -= 1
            raise Unavailable("the disk is full")
        return await self._call(*args)


@pytest.mark.parametrize("what", ["register", "unregister"])
async def test_discovery_that_cannot_be_told_is_told_later(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Ward.open() as ward:
        broken = Unreachable(getattr(ward.runtime.discovery, what), 3)
        monkeypatch.setattr(ward.runtime.discovery, what, broken)
        ward.handler.mood = "hangs"
        await eventually(lambda: not ward.client.instance_ids(), within=10, what="withdrawn")
        ward.handler.mood = "good"
        await eventually(lambda: ward.client.instance_ids() == [ward.runtime.instance_id], within=10, what="listed")
        assert broken.left == 0
        assert caplog.text.count("discovery could not be told: the disk is full") == 3


async def test_moods_that_change_while_discovery_cannot_be_told_leave_one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Ward.open() as ward:
        broken = Unreachable(ward.runtime.discovery.unregister, 1_000)
        monkeypatch.setattr(ward.runtime.discovery, "unregister", broken)
        tasks = len(asyncio.all_tasks())
        for _ in range(50):
            for state in (EndpointState.SICK, EndpointState.READY):
                ward.runtime.health.set_endpoint("generate", state, "as told")
                await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) <= tasks + 2
        broken.left = 0
        await ward.becomes(EndpointState.READY)
        await ward.is_listed()
        assert ward.served.listed


async def test_a_recovery_does_not_undo_an_operators_drain() -> None:
    async with Ward.open() as ward:
        ward.handler.mood = "hangs"
        await ward.is_withdrawn()
        await ward.runtime.drain()
        ward.handler.mood = "good"
        await ward.becomes(EndpointState.READY)
        await ward.rounds(2)
        assert not await ward.recorded()
        await ward.runtime.resume()
        await ward.is_listed()
        assert await ward.client.generate("hi").collect() == ["fine"]


async def test_a_resume_does_not_undo_what_the_canary_found() -> None:
    async with Ward.open() as ward:
        ward.handler.mood = "hangs"
        await ward.is_withdrawn()
        await ward.runtime.drain()
        await ward.runtime.resume()
        await ward.served.unregister()
        await ward.served.register()
        assert not await ward.recorded()
        ward.handler.mood = "good"
        await ward.is_listed()


async def test_a_sleeping_endpoint_is_not_woken_by_its_canary() -> None:
    async with Ward.open() as ward:
        await ward.served.unregister()
        ward.handler.mood = "hangs"
        await ward.becomes(EndpointState.SICK)
        ward.handler.mood = "good"
        await ward.becomes(EndpointState.READY)
        assert not await ward.recorded()
        await ward.served.register()
        await ward.is_listed()


async def test_leaving_with_a_canary_under_way_leaves_nothing() -> None:
    async with Ward.open() as ward:
        ward.handler.mood = "hangs"
        await ward.rounds(1)
        await ward.served.finish(1.0)
        assert not await ward.recorded()
        with pytest.raises(StatorError):
            await ward.served.register()
        assert ward.runtime.health.state("generate") is None


async def test_canaries_are_counted_and_requests_are_not() -> None:
    async with Ward.open("native") as ward:
        assert await ward.client.generate("hi").collect() == ["fine"]
        await ward.rounds(3)
        ward.handler.mood = "raises"
        await ward.is_withdrawn()
        page = ward.runtime.metrics.exposition().decode().splitlines()

        def shown(name: str) -> list[str]:
            return [line for line in page if line.startswith(name) and not line.endswith(" 0")]

        assert [line.rsplit(" ", 1)[1] for line in shown("dynamo_component_requests_total")] == ["1"]
        assert [line.rsplit(" ", 1)[1] for line in shown("stator_requests_received_total")] == ["1"]
        assert {line.split('outcome="')[1].split('"')[0] for line in shown("stator_canary_probes_total")} == {"healthy", "sick"}
