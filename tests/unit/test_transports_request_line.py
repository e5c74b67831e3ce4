"""Waiting for a request connection of the compatible plane."""

import asyncio

import pytest

from stator.errors import Timeout
from stator.tasks import DeadlineWheel, Scope
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.request_line import RequestLine, RequestPool


class FullLine(RequestLine):
    """A line that others were faster to fill."""

    @property
    def usable(self) -> bool:
        return False


class Pool(RequestPool):
    """Its one dial ends when it is told to."""

    dialled: "asyncio.Future[None]"

    async def _connect(self) -> RequestLine:
        await self.dialled
        return FullLine(config=self._config, wheel=self._wheel, freed=self._freed, gone=self._lost)


@pytest.mark.timeout(10)
async def test_who_comes_between_a_dial_and_the_news_of_it_lets_the_loop_go_on() -> None:
    loop = asyncio.get_running_loop()
    wheel = DeadlineWheel(loop)
    config = TcpConfig(pool_size=1, connect_timeout=0.2)
    async with Scope("dials") as dials, Scope("callers") as callers:
        pool = Pool("127.0.0.1", 1, config=config, wheel=wheel, dials=dials, connects=asyncio.Semaphore(), empty=lambda _: None)
        pool.dialled = loop.create_future()

        async def late() -> None:
            await pool.dialled
            await pool.wait(2)

        first = callers.spawn(pool.wait(1), name="first")
        await asyncio.sleep(0)  # it dials
        await asyncio.sleep(0)  # the dial waits
        second = callers.spawn(late(), name="second")
        await asyncio.sleep(0)
        pool.dialled.set_result(None)  # wakes the dial, and right behind it the second caller
        for caller in (first, second):
            with pytest.raises(Timeout, match=r"no connection to 127.0.0.1:1 within 0.2 s"):
                await caller
    wheel.close()
