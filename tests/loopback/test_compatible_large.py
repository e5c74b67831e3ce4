"""Large requests and items on the compatible plane take time in proportion to their size."""

import asyncio
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


@pytest.mark.parametrize("way", ["there", "back"])
async def test_three_times_the_size_takes_about_three_times_as_long(way: str) -> None:
    """Nine times as long, if anything were quadratic; the kernel's part of large allocations makes up to four of three.

    Both sizes are beyond 32 MiB, where the C library takes all memory from the kernel and gives it back: below, it keeps some.
    """
    async with Wide().serving(sized) as caller:
        small, large = [
            await seconds(caller, size if way == "there" else 1, 1 if way == "there" else size)
            for size in (35_000_000, 105_000_000)
        ]
        assert large < 5.5 * small, f"35 MB took {small:.3f} s, 105 MB took {large:.3f} s"
