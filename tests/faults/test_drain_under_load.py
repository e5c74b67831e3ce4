"""Worker processes that are told to end while they are busy: nobody notices, or is told why, in time."""

import asyncio
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster

from faults.worker_processes import Load, Site, WorkerProcess, site
from stator.errors import ConnectFailed, EngineError, StatorError, Unavailable
from stator.runtime import ResponseStream, Runtime
from stator.testing.cluster import ENDPOINT
from stator.testing.plane_suite import eventually

pytestmark = [pytest.mark.timeout(100), pytest.mark.load]

EVERY = ("native", "native-tcp", "compatible")
STREAMS = 100
BESIDE = 8
ITEMS, PAUSE = 30, 0.1
WHO = {"do": "who"}


def now() -> float:
    return asyncio.get_running_loop().time()


async def begin(here: Site, worker: WorkerProcess, number: int, **request: Any) -> list[ResponseStream]:
    """Streams at one worker that have all begun."""
    streams = [here.client.direct({"do": "numbers", "n": ITEMS, "pause": PAUSE, **request}, worker.id) for _ in range(number)]
    assert await asyncio.gather(*(anext(stream) for stream in streams)) == [0] * number
    return streams


@pytest.mark.parametrize("plane", EVERY)
async def test_a_busy_worker_that_is_told_to_end_fails_nobody(plane: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        leaving, staying = await here.worker(), await here.worker()
        streams = await begin(here, leaving, STREAMS)
        began = now()
        load = Load(here.client, WHO, None)
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(stream.collect()) for stream in streams]
            with load.by(BESIDE, group):
                leaving.send(signal.SIGTERM)
                await eventually(lambda: here.client.instance_ids() == [staying.id], what="its record is gone")
                assert leaving.process.returncode is None
                assert not any(task.done() for task in reading)
                assert await leaving.gone(within=ITEMS * PAUSE + 5) == 0
                took = now() - began
        assert all(task.result() == list(range(1, ITEMS)) for task in reading)
        assert load.failures == []
        assert load.done > 100
        longest = ITEMS * PAUSE
        assert longest * 0.9 < took < longest + 2.0
        waiting = re.search(r"waiting for (\d+) requests, at most 30 s", leaving.log)
        assert waiting is not None
        assert STREAMS <= int(waiting[1]) <= STREAMS + BESIDE  # some of the load may have reached it before the signal
        assert "ERROR" not in leaving.log and "Traceback" not in leaving.log


@pytest.mark.parametrize("plane", EVERY)
async def test_what_is_left_at_the_limit_is_told_why(plane: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        leaving, _ = await here.worker(shutdown_timeout=1.0), await here.worker()
        streams = await begin(here, leaving, STREAMS, n=100_000)
        short = await begin(here, leaving, 10, n=5)
        began = now()
        leaving.send(signal.SIGTERM)
        ended = await asyncio.gather(*(stream.collect() for stream in streams), return_exceptions=True)
        assert {type(error) for error in ended} == {EngineError}
        assert {error.kind for error in ended if isinstance(error, EngineError)} == {"EngineShutdown"}
        assert await leaving.gone(within=5) == 0
        assert 0.9 < now() - began < 1.0 + 2.0
        assert [await stream.collect() for stream in short] == [[1, 2, 3, 4]] * 10
        assert f"ending {STREAMS} requests after 1.0 s" in leaving.log
        assert "Traceback" not in leaving.log


@pytest.mark.parametrize("plane", EVERY)
async def test_a_second_signal_ends_it_at_once(plane: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        leaving, staying = await here.worker(), await here.worker()
        streams = await begin(here, leaving, STREAMS, n=100_000)
        leaving.send(signal.SIGTERM)
        await eventually(lambda: here.client.instance_ids() == [staying.id], what="its record is gone")
        quiet = now() + 0.5  # a second signal at once is the first one, sent twice
        while now() < quiet:
            await anext(streams[0])
        second = now()
        leaving.send(signal.SIGTERM)
        ended = await asyncio.gather(*(stream.collect() for stream in streams), return_exceptions=True)
        assert all(isinstance(error, StatorError) for error in ended)
        assert await leaving.gone(within=5) == 1
        assert now() - second < 2.0
        assert "second SIGTERM: stopping at once" in leaving.log


async def test_the_steps_of_leaving_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_blocking_calls: BlockBuster
) -> None:
    """Record, GOAWAY, running requests, end: seen by a caller, and by somebody who never spoke to the worker."""
    no_blocking_calls.deactivate()  # the directory is looked at in the very step in which the caller is told
    steps: list[str] = []
    async with site("native", tmp_path) as here, Runtime.connect(discovery="file", file__root=str(tmp_path)) as third:
        leaving, staying = await here.worker(), await here.worker()
        (stream,) = await begin(here, leaving, 1, n=15)
        observer = here.runtime._services.network._host.observer  # pyright: ignore[reportPrivateUsage]  # who is told first
        assert observer is not None
        draining = observer.draining

        def goaway(instance: int) -> None:
            draining(instance)
            steps.append("GOAWAY too early" if here.recorded(leaving) else "GOAWAY")

        monkeypatch.setattr(observer, "draining", goaway)
        watched = await third.endpoint(ENDPOINT).client()
        await watched.wait_for_instances(2, timeout=10)
        assert here.recorded(leaving)
        leaving.send(signal.SIGTERM)
        await eventually(lambda: watched.instance_ids() == [staying.id], what="the third process knows")
        steps.append("record")
        with pytest.raises((Unavailable, ConnectFailed)):
            await here.client.direct(WHO, leaving.id).collect()
        assert leaving.process.returncode is None
        assert await stream.collect() == list(range(1, 15))
        steps.append("answer")
        assert await leaving.gone(within=5) == 0
        steps.append("end")
    assert sorted(steps[:2]) == ["GOAWAY", "record"]  # the news of the record take the longer way
    assert steps[2:] == ["answer", "end"]


@pytest.mark.parametrize("plane", EVERY)
async def test_a_rolling_restart_is_not_noticed(plane: str, tmp_path: Path) -> None:
    """Four workers, each ended before its successor starts, under load: each request is answered once, and was asked once."""
    journal = tmp_path / "journal"
    async with site(plane, tmp_path / "cluster") as here:
        workers = [await here.worker(journal=str(journal)) for _ in range(4)]
        load = Load(here.client, {"do": "numbers", "n": 4, "pause": 0.01}, [0, 1, 2, 3])
        async with asyncio.TaskGroup() as group:
            with load.by(16, group):
                for number, old in enumerate(workers):
                    before = load.done
                    await eventually(lambda before=before: load.done > before + 100, within=20, what="requests go on")
                    old.send(signal.SIGTERM)
                    assert await old.gone(within=10) == 0
                    assert "Traceback" not in old.log
                    workers[number] = await here.worker(journal=str(journal))
                await eventually(lambda: load.done >= 2_000, within=40, what="2 000 requests")
        assert load.failures == []
        assert load.done >= 2_000
        assert load.slowest < 5.0
        handled = journal.read_text().split()
        assert len(handled) == len(set(handled)) == load.done
