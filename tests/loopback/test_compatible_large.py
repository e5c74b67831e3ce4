"""Large requests and items on the compatible plane take time in proportion to their size."""

import asyncio
import ctypes
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loopback.test_compatible_plane import TestCompatiblePlane as Plane
from stator.runtime.context import Context
from stator.testing.plane_suite import Caller
from stator.transports.tcp import TcpConfig

pytestmark = [pytest.mark.load, pytest.mark.timeout(120)]


async def sized(request: Any, context: Context) -> AsyncIterator[Any]:
    yield "x" * request["back"]


async def seconds(caller: Caller, there: int, back: int) -> float:
    """The fastest of some exchanges: the others had company on this machine."""
    taken: list[float] = []
    for _ in range(4):
        text = "x" * there
        started = time.perf_counter()
        (answer,) = await caller.collect({"text": text, "back": back})
        taken.append(time.perf_counter() - started)
        assert len(answer) == back
        await asyncio.sleep(0)
    return min(taken)


class Wide(Plane):
    config = TcpConfig(max_message_size=2**28)


@pytest.fixture(scope="module", autouse=True)
def even_memory() -> None:
    """Below 32 MiB the C library keeps freed blocks, above it gives them back and pays for each page again: treat all sizes alike."""
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)


@pytest.mark.parametrize("way", ["there", "back"])
async def test_thirty_megabytes_take_at_most_four_times_ten(way: str) -> None:
    async with Wide().serving(sized) as caller:
        ten, thirty = [
            await seconds(caller, size if way == "there" else 1, 1 if way == "there" else size)
            for size in (10_000_000, 30_000_000)
        ]
        assert thirty <= 4 * ten, f"10 MB took {ten:.3f} s, 30 MB took {thirty:.3f} s"
