"""Waiting for a connection of the HTTP/2 plane."""

import asyncio
import random

import pytest

from stator.errors import Timeout
from stator.protocol.http2_map import HttpAddress
from stator.tasks import DeadlineWheel, Scope, SystemClock
from stator.transports.http2 import line as line_module
from stator.transports.http2.config import Http2Config
from stator.transports.http2.limits import session_limits
from stator.transports.http2.line import Http2Pool, Line, LineHost
from stator.transports.plane import PlaneHost


class FullLine(Line):
    """Its dial ends when it is told to; then others are faster to fill it."""

    dialled: "asyncio.Future[None]"
    fresh = True

    async def connect(self, address: HttpAddress) -> None:
        await self.dialled

    @property
    def usable(self) -> bool:
        fresh, self.fresh = self.fresh, False
        return fresh


@pytest.mark.timeout(10)
async def test_who_comes_between_a_dial_and_the_news_of_it_lets_the_loop_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(line_module, "Line", FullLine)
    monkeypatch.setattr(FullLine, "dialled", loop.create_future(), raising=False)
    wheel = DeadlineWheel(loop)
    config = Http2Config(pool_size=1, connect_timeout=0.2)
    host = PlaneHost(
        process="a" * 32,
        bind_host="127.0.0.1",
        advertise_host="127.0.0.1",
        socket_directory=None,
        wheel=wheel,
        clock=SystemClock(),
        random=random.Random(1),
        observer=None,
    )
    async with Scope("dials") as dials, Scope("callers") as callers:
        shared = LineHost(config=config, limits=session_limits(config, worker=False), host=host, dials=dials)
        pool = Http2Pool(HttpAddress("127.0.0.1", 1, False, ""), shared, empty=lambda _: None)

        async def late() -> None:
            await FullLine.dialled
            await pool.wait(2)

        first = callers.spawn(pool.wait(1), name="first")
        await asyncio.sleep(0)  # it dials
        await asyncio.sleep(0)  # the dial waits
        second = callers.spawn(late(), name="second")
        await asyncio.sleep(0)
        FullLine.dialled.set_result(None)  # wakes the dial, and right behind it the second caller
        for caller in (first, second):
            with pytest.raises(Timeout, match=r"no stream to 127.0.0.1:1 within 0.2 s"):
                await caller
    wheel.close()
