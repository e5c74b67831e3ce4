"""One collection of the API server, kept up to date: listed once, then followed; listed again when that is all one can do.

What is known is only ever changed by what the server said: while it is away, everything stays as it was.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from stator.discovery.kubernetes_config import KubernetesConfig
from stator.discovery.kubernetes_objects import read_event, read_header, read_page
from stator.discovery.kubernetes_problem import ApiProblem
from stator.tasks import Backoff

if TYPE_CHECKING:
    from stator.discovery.kubernetes_client import KubernetesClient

__all__ = ["Collection", "Reflector"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BACKOFF = Backoff(first=0.2, most=5.0)
_SPREAD = 1.0
"""seconds over which those spread who lost their connection at the same time"""
_LONGEST_PATIENCE = 120.0
"""seconds; a server that wants to be left alone for longer is asked all the same"""
_GRACE = 20.0
"""seconds that the server may be late with ending a watch"""
_TURN = 64
"""objects that are read before others get their turn: one takes some 40 µs"""
_BRIEF = 2.0
"""seconds; several watches in a row that last no longer are a fault, and not answered by hurrying"""


class Collection(msgspec.Struct, frozen=True, kw_only=True):
    """Where the objects are and which of them are wanted."""

    what: str
    path: str
    params: Mapping[str, str] = {}


class Reflector(Generic[T]):
    """`items` has name → (resource version, what `read` made of the object). `changed()` is called after every change.

    `tell(problem)` reports each attempt: None when the server answered. `read(raw, previous)` never raises for content.
    """

    def __init__(
        self,
        api: "KubernetesClient",
        collection: Collection,
        *,
        config: KubernetesConfig,
        random: Random,
        read: Callable[[msgspec.Raw, T | None], T],
        changed: Callable[[], None],
        tell: Callable[[ApiProblem | None], None],
    ) -> None:
        self.items: dict[str, tuple[str, T]] = {}
        self.problem: ApiProblem | None = None
        """why the last attempt failed"""
        self.listed_at: float | None = None
        """loop time at which the newest list began; None: there was none yet"""
        self.lists = 0
        self.watches = 0
        self._api = api
        self._collection = collection
        self._config = config
        self._random = random
        self._read = read
        self._changed = changed
        self._tell = tell
        self._version: str | None = None
        self._asked = 0
        self._answered = 0
        self._ended = False
        self._turn = asyncio.Event()
        self._news = asyncio.Event()
        self._wake = asyncio.Event()
        self._limit: asyncio.Timeout | None = None
        self._failures = 0
        self._brief = 0

    @property
    def synced(self) -> bool:
        """Whether the collection was listed."""
        return self.listed_at is not None

    def has_reached(self, version: str, *, since: float | None) -> bool:
        """Whether `items` is as new as `version`, which the server made at loop time `since` or before.

        Versions of one kind of objects count up; where they are no numbers, a list that began later tells.
        """
        seen = self._version or ""
        if version.isdigit() and seen.isdigit() and int(seen) >= int(version):
            return True
        return self.listed_at is not None and since is not None and self.listed_at > since

    async def reach(self, version: str, *, since: float | None) -> None:
        """Wait until `has_reached`."""
        while not self.has_reached(version, since=since) and not self._ended:
            await self._news.wait()

    async def attempt(self) -> None:
        """Wait until the present attempt to list or watch has ended."""
        await self._turn.wait()

    async def sync(self) -> None:
        """Wait until a list that began after this call has ended, well or badly (`problem`). Cancelled: it is made all the same."""
        self._asked += 1
        mine = self._asked
        self._wake.set()
        limit = self._limit
        if limit is not None and not limit.expired():
            limit.reschedule(asyncio.get_running_loop().time())  # interrupts the watch
        while self._answered < mine and not self._ended:
            await self._turn.wait()

    async def run(self) -> None:
        """Keep up until cancelled."""
        try:
            while True:
                asked = self._asked
                try:
                    if self._version is None or asked > self._answered:
                        await self._list()
                        self._end_turn(asked)
                    await self._watch()
                except ApiProblem as problem:
                    await self._recover(problem, asked)
                except Exception as error:  # nothing may end it: who follows no more believes old news for ever
                    logger.exception("following %s failed", self._collection.what)
                    await self._recover(ApiProblem(f"{type(error).__name__}: {error}", status=500), asked)
        finally:
            self._ended = True
            self._end_turn(self._asked)

    # -- listing

    async def _list(self) -> None:
        """Replace what is known by what is there: only the difference shows."""
        began = asyncio.get_running_loop().time()
        params = {**self._collection.params, "limit": str(self._config.page)}
        fresh: dict[str, tuple[str, T]] = {}
        while True:
            try:
                page = read_page(await self._api.get(self._collection.path, params))
            except ApiProblem as problem:
                if not (problem.expired and "continue" in params):
                    raise
                params = dict(self._collection.params)  # the pages are not kept any more: all in one
                fresh.clear()
                continue
            for number, raw in enumerate(page.items or ()):
                self._adopt(raw, fresh)
                if number % _TURN == _TURN - 1:
                    await asyncio.sleep(0)
            if not page.metadata.proceed:
                break
            params["continue"] = page.metadata.proceed
        self.lists += 1
        self.listed_at = began
        self._version = page.metadata.resource_version or "0"
        changed = fresh.keys() != self.items.keys() or any(self.items[name] is not item for name, item in fresh.items())
        self.items = fresh
        self._well()
        if changed:
            self._changed()

    def _adopt(self, raw: msgspec.Raw, fresh: dict[str, tuple[str, T]]) -> None:
        header = read_header(raw)
        known = self.items.get(header.name)
        if known is None or known[0] != header.resource_version:
            known = (header.resource_version, self._read(raw, known[1] if known is not None else None))
        fresh[header.name] = known

    # -- watching

    async def _watch(self) -> None:
        """Follow until the server ends the watch, the connection breaks, nothing is heard, or a list is wanted."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        opened = broke = False
        try:
            async with asyncio.timeout(self._config.answer_timeout) as limit:
                if self._asked > self._answered:
                    return
                self._limit = limit
                async with self._api.watch(self._collection.path, self._watch_params()) as lines:
                    opened = True
                    self.watches += 1
                    self._well()
                    end = loop.time() + self._config.watch_timeout + _GRACE
                    batch: list[bytes] | None = []
                    while batch is not None and self._asked == self._answered:
                        for line in batch:
                            self._take(line)
                        limit.reschedule(min(loop.time() + self._config.silence, end))
                        batch = await lines.read()
        except TimeoutError:
            if self._asked == self._answered:
                if not opened:
                    raise ApiProblem(f"no answer within {self._config.answer_timeout:g} s") from None
                logger.info("the watch of %s says nothing any more; it is resumed", self._collection.what)
        except ApiProblem as problem:
            if not opened or problem.status:
                raise
            broke = True
            logger.debug("the watch of %s ended: %s", self._collection.what, problem)
        finally:
            self._limit = None
            if opened and loop.time() - began >= _BRIEF:
                self._failures = self._brief = 0
        await self._rest(self._random.random() * _SPREAD if broke else 0.0)

    def _watch_params(self) -> dict[str, str]:
        return {
            **self._collection.params,
            "watch": "true",
            "resourceVersion": self._version or "0",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._config.watch_timeout),
        }

    async def _rest(self, at_least: float) -> None:
        """A pause between two watches: short, but for the second and later ones in a row that ended at once."""
        if self._asked > self._answered:
            return
        self._brief += 1
        await self._pause(max(at_least, _BACKOFF.delay(self._brief - 2, self._random) if self._brief > 1 else 0.0))

    def _take(self, line: bytes) -> None:
        event = read_event(line)
        header = read_header(event.object)
        if event.type == "DELETED":
            if self.items.pop(header.name, None) is not None:
                self._changed()
        elif event.type in ("ADDED", "MODIFIED"):
            known = self.items.get(header.name)
            self.items[header.name] = (
                header.resource_version,
                self._read(event.object, known[1] if known is not None else None),
            )
            self._changed()
        if header.resource_version:
            self._version = header.resource_version
        self._tell_news()

    # -- what went wrong

    async def _recover(self, problem: ApiProblem, asked: int) -> None:
        if problem.expired:
            logger.info("the versions of %s are not kept so long; they are listed again", self._collection.what)
            self._version = None
            await self._rest(0.0)
            return
        if problem.status in (400, 500, 504):
            self._version = None  # it may be the version that the server cannot make sense of
        delay = _BACKOFF.delay(self._failures, self._random)
        self._failures += 1
        self.problem = problem
        self._tell(problem)
        self._end_turn(asked)
        if problem.retry_after is None:
            await self._pause(delay)
        else:
            patience = min(problem.retry_after, _LONGEST_PATIENCE)
            await asyncio.sleep(max(delay, patience + self._random.random() * min(1.0, patience / 4)))

    async def _pause(self, seconds: float) -> None:
        """Wait; somebody who wants a list now ends it."""
        self._wake.clear()
        if seconds and self._asked == self._answered:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    def _well(self) -> None:
        self.problem = None
        self._tell(None)

    def _end_turn(self, asked: int) -> None:
        self._answered = max(self._answered, asked)
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()
        self._tell_news()

    def _tell_news(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
