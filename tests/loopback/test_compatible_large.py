"""Large requests and items on the compatible plane take time in proportion to their size."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from loopback.test_compatible_plane import TestCompatiblePlane as Plane
from stator.runtime.context import Context
from stator.testing.growth import LINEAR, Growth
from stator.transports.tcp import TcpConfig

pytestmark = [pytest.mark.load, pytest.mark.timeout(120)]


async def sized(request: Any, context: Context) -> AsyncIterator[Any]:
    yield "x" * request["back"]


class Wide(Plane):
    config = TcpConfig(max_message_size=2**28)


@pytest.mark.parametrize("way", ["there", "back"])
async def test_time_is_linear_in_the_size(way: str) -> None:
    async with Wide().serving(sized) as caller:

        async def carry(size: int) -> None:
            there, back = (size, 1) if way == "there" else (1, size)
            (answer,) = await caller.collect({"text": "x" * there, "back": back})
            assert len(answer) == back

        growth = Growth()
        for _ in growth.rounds(5):
            with growth.small():
                await carry(10_000_000)
            with growth.large():
                await carry(30_000_000)
        assert growth.ratio <= LINEAR, growth
