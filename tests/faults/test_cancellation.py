"""A thousand requests given up at random points: every handler ends, and neither side keeps a task, a socket or a table entry."""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from stator.errors import Cancelled, StatorError
from stator.runtime import Client, ResponseStream
from stator.runtime.context import Context
from stator.testing.cluster import SOCKET_PLANES, Cluster, open_files, tasks_now
from stator.testing.plane_suite import eventually
from stator.transports.inbox import Inbox

pytestmark = pytest.mark.timeout(110)

REQUESTS = 1000
AT_ONCE = 50
POINTS = ("before send", "before prologue", "before first item", "mid-stream", "racing the end")
WAYS = ("cancel the task", "kill the stream", "kill the context", "leave the block")


class Handler:
    """Waits, streams for ever, or ends soon; counts how often it began and ended."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.begun += 1
        try:
            if request == "silent":
                await asyncio.Event().wait()
            number = 0
            while request == "endless" or number < request:
                yield number
                number += 1
                if number % 3 == 0:
                    await asyncio.sleep(0)
        finally:
            self.ended += 1
            await asyncio.sleep(0)  # clean-up that waits, and may itself be cancelled


async def ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def give_up(client: Client, point: str, way: str, random: Random) -> str:
    """Make a request and give it up; how its reader fared."""
    context = Context("cancelled-request")
    body: Any = {"before send": "endless", "before prologue": "endless", "before first item": "silent"}.get(point, "endless")
    if point == "racing the end":
        body = random.choice((0, 1, 3, 20))
    stream = client.generate(body, context)
    enough = random.choice((1, 2, 10)) if point == "mid-stream" else body
    reached = asyncio.Event()
    reading = asyncio.ensure_future(_read(stream, enough, reached, leaves=way == "leave the block"))
    await _come_to(point, reached, random)
    match way:
        case "cancel the task":
            reading.cancel()
        case "kill the context":
            context.kill()
        case "kill the stream":
            stream.kill()
        case _:
            await ticks(3)  # it leaves by itself, if it has come so far
            reading.cancel()
    try:
        return await reading
    except asyncio.CancelledError:
        return "cancelled"
    except Cancelled:
        return "killed"


async def _read(stream: ResponseStream, enough: Any, reached: asyncio.Event, *, leaves: bool) -> str:
    """Read to the end; or, leaving, until `enough` items have come."""
    count = 0
    if leaves:
        async with stream:
            async for _ in stream:
                count += 1
                if count == enough:
                    reached.set()
                    return "left"
        return "complete"
    async for _ in stream:
        count += 1
        if count == enough:
            reached.set()
    return "complete"


async def _come_to(point: str, reached: asyncio.Event, random: Random) -> None:
    match point:
        case "before send":
            await ticks(random.choice((0, 0, 1)))
        case "before prologue":
            await ticks(random.randrange(1, 6))
        case "before first item":
            await asyncio.sleep(random.choice((0.002, 0.01, 0.03)))
        case "mid-stream":
            await asyncio.wait_for(reached.wait(), 20)
        case _:
            await ticks(random.randrange(0, 60))


def _objects() -> Counter[str]:
    """Live objects that belong to requests."""
    gc.collect()
    kinds = (Inbox, ResponseStream, Context)
    # by type: asking any object for its __class__ runs code of libraries that other tests have imported
    return Counter(type(found).__name__ for found in gc.get_objects() if issubclass(type(found), kinds))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("plane", SOCKET_PLANES)
async def test_a_thousand_cancelled_requests_leave_nothing(plane: str, seed: int) -> None:
    async with Cluster.open(plane) as cluster:
        handler = Handler()
        for _ in range(2):
            await cluster.worker(handler)
        client = await cluster.client("random")
        await _warm_up(cluster, client)
        assert handler.begun == handler.ended
        tasks, files, objects = tasks_now(), open_files(), _objects()

        ends = await _give_up_all(client, Random(seed))

        await cluster.settled()
        await eventually(lambda: handler.begun == handler.ended, what="every handler that began has ended")
        await eventually(lambda: tasks_now() == tasks, what=f"no task is left beside {tasks}")
        await eventually(lambda: len(open_files()) <= len(files), what="no socket is left")
        await eventually(lambda: _objects() <= objects, what=f"no object of a request is left beside {objects}")
        assert sum(ends.values()) == REQUESTS
        assert handler.begun > REQUESTS / 4  # most came as far as their handler
        assert set(ends) <= {"cancelled", "killed", "left", "complete"}
        assert ends["cancelled"] > 100
        assert ends["killed"] > 100
        assert await client.generate(3).collect() == [0, 1, 2]


async def _warm_up(cluster: Cluster, client: Client) -> None:
    """Make the connections that stay."""
    for worker in cluster.workers:
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(client.direct(2, worker.id).collect())
    await cluster.settled()


async def _give_up_all(client: Client, random: Random) -> Counter[str]:
    waiting = [(POINTS[n % len(POINTS)], random.choice(WAYS)) for n in range(REQUESTS)]
    random.shuffle(waiting)
    ends: Counter[str] = Counter()

    async def caller() -> None:
        while waiting:
            ends[await give_up(client, *waiting.pop(), random)] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(caller())
    return ends


@pytest.mark.parametrize("plane", SOCKET_PLANES)
async def test_cancelled_while_the_connection_is_made(plane: str) -> None:
    """Nobody is connected yet: the dial is shared, and those who gave up leave it to the others."""
    async with Cluster.open(plane) as cluster:
        handler = Handler()
        await cluster.worker(handler)
        client = await cluster.client()
        tasks = [asyncio.ensure_future(client.generate(3).collect()) for _ in range(60)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends[::2])
        assert all(end == [0, 1, 2] for end in ends[1::2])
        await cluster.settled()
        assert handler.begun == handler.ended >= 30


@pytest.mark.parametrize("plane", SOCKET_PLANES)
async def test_the_callers_end_is_everybodys_end(plane: str) -> None:
    """A client process that leaves in the middle of a hundred streams."""
    async with Cluster.open(plane) as cluster:
        handler = Handler()
        await cluster.worker(handler)
        runtime = await cluster.join()
        client = await cluster.client(runtime=runtime)
        files = len(open_files())
        readers = [asyncio.ensure_future(client.generate("endless").collect()) for _ in range(100)]
        await eventually(lambda: handler.begun == 100)
        await cluster.leave(runtime)
        ends = await asyncio.gather(*readers, return_exceptions=True)
        assert all(isinstance(end, StatorError) for end in ends)
        await eventually(lambda: handler.ended == 100, what="all handlers have ended")
        await cluster.settled()
        await eventually(lambda: len(open_files()) <= files)
