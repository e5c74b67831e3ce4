"""Worker processes that are stopped, blocked, killed and replaced, as their callers see it."""

import asyncio
import signal
import socket
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from faults.worker_processes import Site, WorkerProcess, site_of
from stator.errors import ConnectFailed, Disconnected, StatorError, StreamIncomplete, Unavailable
from stator.runtime import Client
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(100)

NATIVE = ("native", "native-tcp")
EVERY = (*NATIVE, "compatible")
STREAMS = 5
"""on each worker"""


class Reader:
    """Reads one stream in a task and notes what came when."""

    def __init__(self, group: asyncio.TaskGroup, client: Client, request: Any, worker: WorkerProcess) -> None:
        self.items: list[Any] = []
        self.error: StatorError | None = None
        self.ended_at = 0.0
        self._stream = client.direct(request, worker.id)
        group.create_task(self._read())

    async def _read(self) -> None:
        try:
            async with self._stream:
                async for item in self._stream:
                    self.items.append(item)
        except StatorError as error:
            self.error = error
        self.ended_at = asyncio.get_running_loop().time()

    def stop(self) -> None:
        self._stream.kill()


class WatchedSite(Site):
    """Its workers say what they hold."""

    script = Path(__file__).with_name("runtime_worker.py")

    async def worker(self, **settings: Any) -> WorkerProcess:
        """Start one and wait until the client sees it."""
        worker = await super().worker(**settings)
        await self.facts(worker)  # makes the connection
        worker.quiet = await self.facts(worker)
        return worker

    async def who(self, **options: Any) -> int:
        """Who answers."""
        return (await self.client.generate({"do": "who"}, **options).collect())[0]

    async def facts(self, worker: WorkerProcess) -> dict[str, int]:
        """What `worker` holds, this question aside."""
        return (await self.client.direct({"do": "facts"}, worker.id).collect())[0]

    async def settled(self, *workers: WorkerProcess) -> None:
        """Nothing is held here, nor at `workers`: no request, no task, no file more than at their beginning."""
        await super().settled()
        for worker in workers:
            limit = now() + 10
            while more := {what: n for what, n in (await self.facts(worker)).items() if n > worker.quiet[what]}:
                assert now() < limit, f"the worker still holds {more}, at its beginning {worker.quiet}"
                await asyncio.sleep(0.05)

    def state(self, worker: WorkerProcess) -> str:
        """Whether it may be chosen, and why not."""
        return next((row.state for row in self.client.explain() if row.instance_id == worker.id), "gone")


def site(plane: str, root: Path, **settings: Any) -> AbstractAsyncContextManager[WatchedSite]:
    return site_of(WatchedSite, plane, root, **settings)


def now() -> float:
    return asyncio.get_running_loop().time()


# -- stopped


@pytest.mark.load
@pytest.mark.parametrize("plane", NATIVE)
async def test_a_stopped_worker_is_found_dead_and_comes_back(plane: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        frozen, well = await here.worker(), await here.worker()
        async with asyncio.TaskGroup() as group:
            lost = [Reader(group, here.client, {"do": "count"}, frozen) for _ in range(STREAMS)]
            kept = [Reader(group, here.client, {"do": "count"}, well) for _ in range(STREAMS)]
            await eventually(lambda: all(reader.items for reader in lost + kept), within=10)
            frozen.send(signal.SIGSTOP)
            stopped = now()
            fresh = [group.create_task(here.who()) for _ in range(10)]
            await eventually(lambda: all(reader.error for reader in lost), within=6, what="its streams ended")
            assert max(reader.ended_at for reader in lost) - stopped <= 3.0
            assert all(isinstance(reader.error, Disconnected) for reader in lost)
            assert here.state(frozen) == "inhibited"
            assert set(await asyncio.gather(*fresh)) == {well.id}
            asked = now()
            assert {await here.who() for _ in range(10)} == {well.id}
            assert now() - asked < 2
            assert not any(reader.error for reader in kept)
            before = [len(reader.items) for reader in kept]
            await eventually(lambda: all(len(r.items) > n for r, n in zip(kept, before, strict=True)), what="they go on")
            frozen.send(signal.SIGCONT)
            async with asyncio.timeout(15):  # inhibited for five seconds
                while frozen.id not in {await here.who() for _ in range(4)}:
                    await asyncio.sleep(0.1)
            assert here.state(frozen) == "free"
            for reader in kept:
                reader.stop()
        for reader in lost + kept:
            assert reader.items == list(range(len(reader.items)))
        await here.settled(frozen, well)


@pytest.mark.load
async def test_a_worker_stopped_for_a_moment_loses_nothing(tmp_path: Path) -> None:
    async with site("native", tmp_path) as here:
        worker = await here.worker()
        async with asyncio.TaskGroup() as group:
            readers = [Reader(group, here.client, {"do": "count"}, worker) for _ in range(STREAMS)]
            await eventually(lambda: all(reader.items for reader in readers))
            worker.send(signal.SIGSTOP)
            await asyncio.sleep(1.5)
            worker.send(signal.SIGCONT)
            before = [len(reader.items) for reader in readers]
            await eventually(lambda: all(len(r.items) > n + 5 for r, n in zip(readers, before, strict=True)))
            assert here.state(worker) == "free"
            for reader in readers:
                reader.stop()
        assert all(reader.items == list(range(len(reader.items))) for reader in readers)
        await here.settled(worker)


@pytest.mark.load
async def test_a_suspicion_ends_even_if_its_streams_were_given_up(tmp_path: Path) -> None:
    async with site("native", tmp_path) as here:
        worker, other = await here.worker(), await here.worker()
        async with asyncio.TaskGroup() as group:
            blocked = Reader(group, here.client, {"do": "block", "how": "sleep", "seconds": 3.5}, worker)
            await eventually(lambda: here.state(worker) == "suspect", within=4)
            blocked.stop()
        assert {await here.who() for _ in range(4)} == {other.id}
        await eventually(lambda: here.state(worker) == "free", within=6, what="the worker is heard of again")
        assert {await here.who() for _ in range(4)} == {worker.id, other.id}
        await here.settled(worker, other)


# -- blocked


async def _block(here: WatchedSite, how: str, seconds: float) -> None:
    """A handler blocks its worker: nobody's stream is lost, and others route around it."""
    blocked, well = await here.worker(), await here.worker()
    routes_around = here.plane in NATIVE
    async with asyncio.TaskGroup() as group:
        neighbours = [Reader(group, here.client, {"do": "count"}, blocked) for _ in range(STREAMS)]
        await eventually(lambda: all(reader.items for reader in neighbours))
        culprit = Reader(group, here.client, {"do": "block", "how": how, "seconds": seconds}, blocked)
        await eventually(lambda: bool(culprit.items))
        began = now()
        if routes_around:
            await eventually(lambda: here.state(blocked) == "suspect", within=5)
            assert now() - began < 3.0
            while now() - began < min(seconds - 0.5, 6.0):
                asked = now()
                assert await here.who() == well.id
                assert now() - asked < 1.0
                await asyncio.sleep(0.05)
        await eventually(lambda: "done" in culprit.items, within=seconds + 5, what="it was let go")
        before = [len(reader.items) for reader in neighbours]
        await eventually(lambda: all(len(r.items) > n + 5 for r, n in zip(neighbours, before, strict=True)))
        assert not any(reader.error for reader in neighbours)
        assert now() - began > seconds - 0.5
        await eventually(lambda: here.state(blocked) == "free", what="it is routable again")
        assert {await here.who() for _ in range(4)} == {blocked.id, well.id}
        for reader in neighbours:
            reader.stop()
    assert all(reader.items == list(range(len(reader.items))) for reader in neighbours)
    await here.settled(blocked, well)


@pytest.mark.load
@pytest.mark.parametrize("how", ["sleep", "busy"])
@pytest.mark.parametrize("plane", EVERY)
async def test_a_blocked_worker_loses_no_stream(plane: str, how: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        await _block(here, how, 4.0)


@pytest.mark.soak
@pytest.mark.parametrize("how", ["sleep", "busy"])
@pytest.mark.parametrize("plane", EVERY)
async def test_a_worker_blocked_for_long_loses_no_stream(plane: str, how: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        await _block(here, how, 10.0)


# -- killed


@pytest.mark.parametrize("plane", EVERY)
async def test_a_killed_worker_is_noticed_at_once(plane: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        killed, well = await here.worker(file__ttl=2.0), await here.worker(file__ttl=2.0)
        async with asyncio.TaskGroup() as group:
            lost = [Reader(group, here.client, {"do": "count"}, killed) for _ in range(STREAMS)]
            silent = [Reader(group, here.client, {"do": "wait"}, killed) for _ in range(STREAMS)]
            kept = [Reader(group, here.client, {"do": "count"}, well) for _ in range(STREAMS)]
            await eventually(lambda: all(reader.items for reader in lost + kept))
            fresh = [group.create_task(here.who()) for _ in range(10)]
            killed.send(signal.SIGKILL)
            dead = now()
            await eventually(lambda: all(reader.error for reader in lost + silent), what="its streams ended")
            assert max(reader.ended_at for reader in lost + silent) - dead < 2.0
            assert all(isinstance(reader.error, StreamIncomplete) for reader in lost)
            assert all(type(reader.error) is Disconnected for reader in silent)
            await asyncio.gather(*fresh)
            assert {await here.who() for _ in range(10)} == {well.id}
            assert not any(reader.error for reader in kept)
            await eventually(lambda: here.client.instance_ids() == [well.id], within=20, what="its record expired")
            for reader in kept:
                reader.stop()
        assert all(reader.items == list(range(len(reader.items))) for reader in lost + kept)
        await here.settled(well)


async def test_requests_in_the_queue_of_a_killed_worker_go_elsewhere(tmp_path: Path) -> None:
    """Compatible plane: they were acknowledged, and nobody will call home."""
    async with site("compatible", tmp_path) as here:
        killed, well = await here.worker(admission__slots=1), await here.worker()
        async with asyncio.TaskGroup() as group:
            running = Reader(group, here.client, {"do": "count"}, killed)
            await eventually(lambda: bool(running.items))
            queued = [group.create_task(here.who()) for _ in range(8)]
            await eventually(lambda: sum(task.done() for task in queued) == 4, what="half of them were answered")
            killed.send(signal.SIGKILL)
            assert set(await asyncio.wait_for(asyncio.gather(*queued), 5)) == {well.id}
        await here.settled(well)


@pytest.mark.parametrize("plane", EVERY)
async def test_a_worker_that_ends_in_order_is_not_noticed(plane: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        leaving, well = await here.worker(), await here.worker()
        async with asyncio.TaskGroup() as group:
            asking = True

            async def ask() -> None:
                while asking:
                    assert await here.who() in (leaving.id, well.id)

            for _ in range(4):
                group.create_task(ask())
            await asyncio.sleep(0.2)
            leaving.send(signal.SIGTERM)
            await asyncio.wait_for(leaving.process.wait(), 20)
            await asyncio.sleep(0.2)
            asking = False
        assert leaving.process.returncode == 0
        assert here.client.instance_ids() == [well.id]
        await here.settled(well)


# -- replaced


@pytest.mark.parametrize("plane", ["native-tcp", "compatible"])
async def test_another_process_on_the_same_port_is_not_taken_for_the_old_one(plane: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    setting = {"native-tcp": "native__port", "compatible": "tcp__port"}[plane]
    async with site(plane, tmp_path) as here:
        old = await here.worker(**{setting: port})
        assert await here.who() == old.id
        old.send(signal.SIGKILL)
        await old.process.wait()
        new = await here.worker(**{setting: port})
        assert set(here.client.instance_ids()) == {old.id, new.id}
        with pytest.raises((ConnectFailed, Unavailable)) as caught:
            await here.client.direct({"do": "who"}, old.id).collect()
        assert caught.value.instance == old.id
        assert {await here.who() for _ in range(6)} == {new.id}
        assert here.state(old) == "inhibited"
        await here.settled(new)
