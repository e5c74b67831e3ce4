"""Calls home over TLS: so many at once to each client, and without TLS as they come."""

import asyncio

import pytest

from stator.security import Refusals, Tls
from stator.tasks import Scope
from stator.testing.certificates import Authority, tls_of
from stator.transports.tcp.home_caller import HomeCaller

pytestmark = pytest.mark.timeout(10)


@pytest.fixture
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return tls_of(Authority(tmp_path_factory.mktemp("tls")))


class Crowd:
    """Many calls to one client, which last until told otherwise."""

    def __init__(self, caller: HomeCaller, scope: Scope, port: int, *, size: int) -> None:
        self.inside = 0
        self.go = asyncio.Event()
        self.tasks = [scope.spawn(self._call(caller, port)) for _ in range(size)]

    async def _call(self, caller: HomeCaller, port: int) -> None:
        async with caller.turn("127.0.0.1", port):
            self.inside += 1
            await self.go.wait()


async def ticks() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_turns_are_bounded_for_each_client_by_itself(tls: Tls) -> None:
    caller = HomeCaller(tls=tls, refusals=Refusals())
    async with Scope("calls") as scope:
        one, other = Crowd(caller, scope, 1, size=100), Crowd(caller, scope, 2, size=5)
        await ticks()
        assert (one.inside, other.inside) == (32, 5)
        for task in one.tasks[:10]:
            task.cancel()  # running
        for task in one.tasks[90:]:
            task.cancel()  # waiting
        await ticks()
        assert one.inside == 42
        one.go.set()
        other.go.set()
        await asyncio.wait([*one.tasks, *other.tasks])
        assert one.inside == 90
    assert caller._turns == {}  # pyright: ignore[reportPrivateUsage]


async def test_without_tls_nobody_waits() -> None:
    caller = HomeCaller(tls=None, refusals=Refusals())
    async with Scope("calls") as scope:
        crowd = Crowd(caller, scope, 1, size=500)
        await ticks()
        assert crowd.inside == 500
