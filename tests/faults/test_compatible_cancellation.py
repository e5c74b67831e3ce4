"""A thousand requests of the compatible plane, cancelled wherever they happen to be, leave nothing behind."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pytest

from loopback.test_compatible_plane import TestCompatiblePlane as Plane
from stator.errors import Cancelled, StatorError
from stator.runtime.context import Context
from stator.testing.plane_suite import Caller, drain, eventually

pytestmark = pytest.mark.timeout(60)


async def some(request: Any, context: Context) -> AsyncIterator[Any]:
    for number in range(request["n"]):
        yield number
        if number % 3 == 0:
            await asyncio.sleep(0)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def cancelled_somewhere(caller: Caller, random: Random, number: int) -> str:
    """One request and its end; how it ended."""
    how = random.choice(("kill", "stop", "cancel", "drop", "finish"))
    task = asyncio.ensure_future(caller.open({"n": random.randrange(200)}, id=f"r{number}"))
    if how == "cancel":
        for _ in range(random.randrange(3)):
            await asyncio.sleep(0)
        if task.cancel():
            await asyncio.wait({task})
            if task.cancelled():
                return "cancelled"
    inbox = await task
    for _ in range(random.randrange(40)):
        await asyncio.sleep(0)
    if how == "stop":
        inbox.stop()
    elif how != "finish":
        inbox.kill()
    try:
        await drain(inbox)
    except Cancelled:
        return "killed"
    except StatorError as error:
        return error.code
    return "complete"


async def test_requests_cancelled_at_random_points() -> None:
    random = Random(7)
    async with Plane().serving(some) as caller:
        await caller.collect({"n": 3})
        gc.collect()
        tasks, files = len(asyncio.all_tasks()), open_files()
        ends: dict[str, int] = {}
        for start in range(0, 1000, 50):
            for end in await asyncio.gather(*(cancelled_somewhere(caller, random, start + n) for n in range(50))):
                ends[end] = ends.get(end, 0) + 1
        assert sum(ends.values()) == 1000
        assert ends.keys() <= {"cancelled", "killed", "complete"}
        assert ends["killed"] > 100
        assert ends["complete"] > 100
        await eventually(lambda: caller.serving.inflight == 0, what="handlers ended")
        await eventually(lambda: caller.pair.open_streams() == 0, what="streams ended")
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks, what="tasks ended")
        await eventually(lambda: open_files() <= files, what="sockets closed")
        assert await caller.collect({"n": 5}) == [0, 1, 2, 3, 4]
