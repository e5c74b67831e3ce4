"""Constant load: so many requests begin every second, whatever becomes of the others, and every answer is looked at.

    async with SteadyLoad(client, rate=200, items=100).running() as load:
        ...                                    # something happens
    assert not load.failures, load.report()    # all requests have ended

For workers of `stator.testing.worker_fleet`.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec

from stator.runtime import Client
from stator.tasks import Scope

__all__ = ["Ended", "SteadyLoad"]

_DRAIN = 60.0
"""seconds that running requests get at the end"""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one request. Times are the event loop's, in seconds."""

    began: float
    ended: float
    instance: int
    """who answered, or was asked last; 0: nobody"""
    items: int
    """how many came, in their order"""
    failure: str = ""
    """"" if the answer was whole"""
    error: Exception | None = None

    @property
    def took(self) -> float:
        return self.ended - self.began


class SteadyLoad:
    """An open load on one client."""

    def __init__(self, client: Client, *, rate: float, items: int = 100, pause: float = 0.005, most: int = 20_000) -> None:
        """`rate` in requests per second; each is a stream of `items` numbers, one every `pause` seconds. `most` may run at once."""
        self.requests: list[Ended] = []
        """those that have ended, in that order"""
        self.running_now = 0
        self._client = client
        self._rate = rate
        self._request = {"n": items, "pause": pause}
        self._items = items
        self._most = most
        self._stopping = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> "AsyncGenerator[SteadyLoad, None]":
        """The load lasts as long as the block; leaving it waits until every request has ended."""
        async with Scope("steady load") as scope:
            begin = scope.spawn(self._begin(scope), name="pace")
            try:
                yield self
            finally:
                self._stopping.set()
            await begin
            async with asyncio.timeout(_DRAIN):
                await scope.join()

    async def _begin(self, scope: Scope) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._stopping.is_set():
            if self.running_now >= self._most:
                raise AssertionError(f"{self.running_now} requests run at once: nobody answers any more")
            self.running_now += 1
            scope.spawn(self._one(), name="request")
            due += 1 / self._rate
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def _one(self) -> None:
        loop = asyncio.get_running_loop()
        began, count, failure, error = loop.time(), 0, "", None
        stream = self._client.generate(self._request)
        try:
            async with stream:
                async for item in stream:
                    if item != count:
                        failure = f"item {count} is {item!r}"
                        break
                    count += 1
            if not failure and count != self._items:
                failure = f"ended after {count} of {self._items} items"
        except Exception as caught:  # whatever it is, it is a failure
            error, failure = caught, f"{type(caught).__name__} after {count} items: {caught}"
        finally:
            self.running_now -= 1
        self.requests.append(
            Ended(
                began=began,
                ended=loop.time(),
                instance=stream.instance_id,
                items=count,
                failure=failure,
                error=error,
            )
        )

    # -- what was seen

    @property
    def failures(self) -> list[Ended]:
        """The requests whose answers were not whole."""
        return [each for each in self.requests if each.failure]

    def begun_in(self, start: float, end: float) -> list[Ended]:
        """Those that began in a stretch of time."""
        return [each for each in self.requests if start <= each.began < end]

    def report(self) -> str:
        """For people."""
        shown = "".join(f"\n  {each.failure} (instance {each.instance:x}, {each.took:.2f} s)" for each in self.failures[:5])
        slowest = max((each.took for each in self.requests), default=0.0)
        return f"{len(self.requests)} requests, {len(self.failures)} failed, the slowest took {slowest:.2f} s{shown}"
