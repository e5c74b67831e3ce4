"""Lines to one address: one dial for all who wait, a further line when the others are full."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TypeVar

import pytest

from stator.errors import ConnectFailed, StatorError, Timeout, Unavailable
from stator.protocol.http2_map import HttpAddress
from stator.tasks import DeadlineWheel, Scope
from stator.testing.native_sockets import plane_host
from stator.transports.http2 import Http2Config
from stator.transports.http2.limits import session_limits
from stator.transports.http2.line import Http2Pool, LineHost
from stator.transports.http2.line import Line as Http2Line
from stator.transports.line_pool import LinePool, PooledLine
from stator.transports.tcp import TcpConfig
from stator.transports.tcp.request_line import RequestLine, RequestPool

pytestmark = pytest.mark.timeout(10)

L = TypeVar("L", bound=PooledLine)


class Line:
    """Usable until it is said to be full."""

    def __init__(self) -> None:
        self.usable = True


class Pool(LinePool[Line]):
    """Its dials end when they are told to."""

    def __init__(self, *, most: int = 1, limit: float = 5.0) -> None:
        self.scope = Scope("dials")
        self.emptied = 0
        self.dials: list[asyncio.Future[Line]] = []
        super().__init__("host:1", most=most, limit=limit, dials=self.scope, empty=Pool._is_empty)

    def _is_empty(self) -> None:
        self.emptied += 1

    async def _connect(self) -> Line:
        self.dials.append(asyncio.get_running_loop().create_future())
        return await self.dials[-1]

    def free(self, line: Line) -> None:
        line.usable = True
        self._freed()

    def lose(self, line: Line) -> None:
        self._lost(line)


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    it = Pool(most=2)
    yield it
    await it.scope.aclose()


async def settle() -> None:
    for _ in range(6):
        await asyncio.sleep(0)


async def waiting(pool: LinePool[L], callers: int) -> list[asyncio.Task[L]]:
    tasks = [asyncio.create_task(pool.wait(number)) for number in range(1, callers + 1)]
    await settle()
    return tasks


async def one_line(pool: Pool) -> Line:
    (caller,) = await waiting(pool, 1)
    pool.dials[-1].set_result(Line())
    return await caller


async def test_a_usable_line_is_taken_without_a_dial(pool: Pool) -> None:
    assert pool.line() is None
    line = await one_line(pool)
    assert pool.line() is line and pool.lines == (line,)
    assert await pool.wait(2) is line
    assert len(pool.dials) == 1 and pool.emptied == 0


async def test_all_who_wait_share_one_dial(pool: Pool) -> None:
    callers = await waiting(pool, 3)
    assert len(pool.dials) == 1
    line = Line()
    pool.dials[0].set_result(line)
    assert await asyncio.gather(*callers) == [line] * 3
    assert len(pool.dials) == 1


async def test_a_further_line_is_made_when_the_first_is_full_up_to_the_most(pool: Pool) -> None:
    first = await one_line(pool)
    first.usable = False
    second = await one_line(pool)
    assert pool.lines == (first, second) and pool.line() is second
    second.usable = False
    callers = await waiting(pool, 2)
    assert len(pool.dials) == 2, "there is no third line"
    pool.free(first)
    assert await asyncio.gather(*callers) == [first, first]


async def test_who_waits_for_room_looks_again_when_a_line_is_lost(pool: Pool) -> None:
    first = await one_line(pool)
    first.usable = False
    second = await one_line(pool)
    second.usable = False
    (caller,) = await waiting(pool, 1)
    pool.lose(first)
    await settle()
    assert pool.lines == (second,) and len(pool.dials) == 3
    third = Line()
    pool.dials[-1].set_result(third)
    assert await caller is third


async def test_all_are_told_of_a_failed_dial_each_for_its_instance(pool: Pool) -> None:
    callers = await waiting(pool, 2)
    pool.dials[0].set_exception(ConnectionRefusedError("refused"))
    for number, caller in enumerate(callers, 1):
        with pytest.raises(ConnectFailed, match="cannot connect to host:1: refused") as caught:
            await caller
        assert (caught.value.instance, caught.value.phase) == (number, "connect")
    assert pool.emptied > 0
    assert await one_line(pool) in pool.lines, "the next one dials again"


async def test_what_the_plane_says_keeps_its_kind(pool: Pool) -> None:
    (caller,) = await waiting(pool, 1)
    pool.dials[0].set_exception(Unavailable("it drains"))
    with pytest.raises(Unavailable, match="it drains") as caught:
        await caller
    assert caught.value.instance == 1


async def test_the_wait_for_a_dial_and_for_room_is_bounded() -> None:
    pool = Pool(limit=0.05)
    with pytest.raises(Timeout, match=r"no connection to host:1 within 0.05 s"):
        await pool.wait(1)
    assert pool.emptied == 0, "the dial goes on"
    line = Line()
    pool.dials[0].set_result(line)
    await settle()
    assert pool.line() is line
    line.usable = False
    with pytest.raises(Timeout, match=r"no connection to host:1 within 0.05 s"):
        await pool.wait(1)
    await pool.scope.aclose()


async def test_who_is_cancelled_leaves_the_dial_to_the_next(pool: Pool) -> None:
    (caller,) = await waiting(pool, 1)
    caller.cancel()
    await settle()
    assert caller.cancelled() and pool.emptied == 0
    (second,) = await waiting(pool, 1)
    assert len(pool.dials) == 1
    pool.dials[0].set_result(Line())
    assert await second is pool.line()


async def test_who_is_cancelled_while_waiting_for_room_is_forgotten() -> None:
    pool = Pool()
    line = await one_line(pool)
    line.usable = False
    first, second = await waiting(pool, 2)
    first.cancel()
    await settle()
    assert first.cancelled()
    pool.free(line)
    assert await second is line


async def test_it_is_empty_without_lines_callers_and_dials(pool: Pool) -> None:
    line = await one_line(pool)
    pool.lose(line)
    assert pool.emptied == 1
    (caller,) = await waiting(pool, 1)
    caller.cancel()
    await settle()
    assert pool.emptied == 1, "the dial goes on"
    pool.dials[-1].set_exception(ConnectionRefusedError("refused"))
    await settle()
    assert pool.emptied == 2


@pytest.mark.parametrize("where", ["dial", "room", "later"])
async def test_the_end_of_its_scope_ends_every_wait(where: str) -> None:
    pool = Pool()
    callers: list[asyncio.Task[Line]] = []
    if where == "room":
        line = await one_line(pool)
        line.usable = False
        callers = await waiting(pool, 1)
        await pool.scope.aclose()
        pool.lose(line)  # the client ends its lines then
    elif where == "dial":
        callers = await waiting(pool, 1)
        await pool.scope.aclose()
    else:
        await pool.scope.aclose()
        callers = await waiting(pool, 1)
    for caller in callers:
        with pytest.raises(ConnectFailed, match="the client closed its plane"):
            await caller
    assert pool.emptied > 0


# -- between a dial and the news of it


async def between(
    pool: LinePool[L], dials: list[asyncio.Future[L]], made: L | Exception
) -> tuple[asyncio.Task[L], asyncio.Task[L]]:
    """Two callers: the second comes when the dial of the first has ended and nobody was told yet."""
    (first,) = await waiting(pool, 1)

    async def late() -> L:
        with suppress(ConnectionRefusedError):
            await dials[0]
        return await pool.wait(2)

    second = asyncio.create_task(late())
    await asyncio.sleep(0)
    if isinstance(made, Exception):  # wakes the dial, and right behind it the second caller
        dials[0].set_exception(made)
    else:
        dials[0].set_result(made)
    return first, second


async def test_who_comes_between_a_dial_and_the_news_of_it_waits_for_room() -> None:
    pool = Pool(limit=0.1)
    full = Line()
    full.usable = False
    for caller in await between(pool, pool.dials, full):
        with pytest.raises(Timeout):
            await caller
    assert len(pool.dials) == 1
    await pool.scope.aclose()


async def test_who_comes_between_a_failed_dial_and_the_news_of_it_has_a_dial_of_its_own() -> None:
    pool = Pool()
    first, second = await between(pool, pool.dials, ConnectionRefusedError("refused"))
    with pytest.raises(StatorError, match="refused"):
        await first
    await settle()
    assert len(pool.dials) == 2 and pool.emptied == 0, "news of the first leaves the second dial alone"
    (third,) = await waiting(pool, 1)
    line = Line()
    pool.dials[1].set_result(line)
    assert await second is line and await third is line
    assert len(pool.dials) == 2
    await pool.scope.aclose()


async def test_who_comes_between_waits_on_the_compatible_plane_too() -> None:
    dials: list[asyncio.Future[RequestLine]] = [asyncio.get_running_loop().create_future()]
    wheel = DeadlineWheel(asyncio.get_running_loop())
    config = TcpConfig(pool_size=1, connect_timeout=0.1)

    class Dialling(RequestPool):
        async def _connect(self) -> RequestLine:
            return await dials[0]

    async with Scope("dials") as scope:
        pool = Dialling(
            "127.0.0.1", 1, config=config, wheel=wheel, dials=scope, connects=asyncio.Semaphore(), empty=lambda _: None
        )
        line = RequestLine(config=config, wheel=wheel, freed=lambda: None, gone=lambda _: None)
        assert not line.usable  # it has no connection
        for caller in await between(pool, dials, line):
            with pytest.raises(Timeout, match=r"no connection to 127.0.0.1:1 within 0.1 s"):
                await caller
    wheel.close()


async def test_who_comes_between_waits_on_the_http2_plane_too() -> None:
    dials: list[asyncio.Future[Http2Line]] = [asyncio.get_running_loop().create_future()]
    wheel = DeadlineWheel(asyncio.get_running_loop())
    config = Http2Config(pool_size=1, connect_timeout=0.1)

    class Dialling(Http2Pool):
        async def _connect(self) -> Http2Line:
            return await dials[0]

    async with Scope("dials") as scope:
        limits = session_limits(config, worker=False)
        shared = LineHost(config=config, limits=limits, host=plane_host(wheel=wheel), dials=scope)
        pool = Dialling(HttpAddress("127.0.0.1", 1, False, ""), shared, empty=lambda _: None)
        line = Http2Line(shared, freed=lambda: None, gone=lambda _: None)
        assert not line.usable and not line.session.spent  # it has no connection
        for caller in await between(pool, dials, line):
            with pytest.raises(Timeout, match=r"no stream to 127.0.0.1:1 within 0.1 s"):
                await caller
    wheel.close()
