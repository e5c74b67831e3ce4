"""The metadata object of this process: applied as a whole whenever something changed, by one task, one request at a time."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

import msgspec

from stator.discovery.kubernetes_objects import read_header
from stator.discovery.kubernetes_problem import ApiProblem
from stator.tasks import Backoff

if TYPE_CHECKING:
    from stator.discovery.kubernetes_client import KubernetesClient

__all__ = ["MetadataWriter"]

logger = logging.getLogger(__name__)

_PARAMS = {"force": "true", "fieldManager": "dynamo-worker"}
_BACKOFF = Backoff(first=0.2, most=5.0)
_LONGEST_PATIENCE = 120.0
"""seconds; a server that wants to be left alone for longer is asked all the same"""
_GOODBYES = 3
"""attempts to delete the object when closing"""
_VERSIONS = 1024
"""of the object, as our own applies made them: events about them come late"""


class MetadataWriter:
    """`content()` makes the object from what is owned at that moment, so that several changes may travel together.

    `tell(problem)` reports each attempt: None when the server took it. With `clear_first` the object that a predecessor of the same
    name left is deleted before anything else (`cleared`).
    """

    def __init__(
        self,
        api: "KubernetesClient",
        path: str,
        *,
        content: Callable[[], bytes],
        tell: Callable[[ApiProblem | None], None],
        random: Random,
        clear_first: bool,
    ) -> None:
        self.cleared = asyncio.Event()
        self.applies = 0
        self.applied_at: float | None = None
        """loop time at which the server took the newest version"""
        self.versions: deque[str] = deque(maxlen=_VERSIONS)
        """resource versions that we made"""
        self._api = api
        self._path = path
        self._content = content
        self._tell = tell
        self._random = random
        self._clear_first = clear_first
        self._wanted = 0
        self._applied = 0
        self._refusal: tuple[int, ApiProblem] | None = None
        self._turn = asyncio.Event()
        self._wake = asyncio.Event()
        self._closing = False
        self._written = False
        self._uid = ""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def clean(self) -> bool:
        """Whether the server has what we want it to have, as far as we know."""
        return self._applied == self._wanted

    @property
    def version(self) -> str:
        """The resource version that our last apply made; "" before the first one."""
        return self.versions[-1] if self.versions else ""

    def touch(self) -> int:
        """What is owned has changed. The answer is for `applied`."""
        self._wanted += 1
        self._wake.set()
        return self._wanted

    async def applied(self, change: int | None = None) -> None:
        """Wait until the server has `change` (default: all that was wanted at this call). Raises `ApiProblem` when it refuses.

        Cancelled: the change is applied all the same.
        """
        change = self._wanted if change is None else change
        while self._applied < change:
            if self._refusal is not None and self._refusal[0] >= change:
                raise self._refusal[1]
            if self._closing:
                raise ApiProblem("the discovery was closed")
            await self._turn.wait()

    async def run(self) -> None:
        """Apply until `close`."""
        attempt = 0
        while not self._closing:
            self._wake.clear()
            if self._clear_first and not self.cleared.is_set():
                problem = await self._clear()
            elif not self.clean:
                problem = await self._apply()
            else:
                await self._wake.wait()
                continue
            attempt = attempt + 1 if problem is not None else 0
            if problem is not None:
                await self._pause(problem, attempt)

    async def _clear(self) -> ApiProblem | None:
        try:
            await self._api.delete(self._path, b"")
        except ApiProblem as problem:
            if not problem.lasting:
                self._tell(problem)
                return problem
            logger.warning("what a predecessor left in %s cannot be deleted: %s", self._path, problem)
        self.cleared.set()
        return None

    async def _apply(self) -> ApiProblem | None:
        change = self._wanted
        self._written = True
        self._idle.clear()
        try:
            header = read_header(await self._api.apply(self._path, _PARAMS, self._content()))
        except ApiProblem as problem:
            logger.warning("DynamoWorkerMetadata cannot be applied: %s", problem)
            if problem.lasting:
                self._refusal = (change, problem)
            self._tell(problem)
            return problem
        except Exception as error:  # nothing may end it: who writes no more is not found any more
            logger.exception("DynamoWorkerMetadata cannot be applied")
            return ApiProblem(f"{type(error).__name__}: {error}")
        finally:
            self._idle.set()
            self._end_turn()
        self.applies += 1
        self.applied_at = asyncio.get_running_loop().time()
        self.versions.append(header.resource_version)
        self._uid = header.uid
        self._applied = change
        self._refusal = None
        self._tell(None)
        self._end_turn()
        return None

    async def _pause(self, problem: ApiProblem, attempt: int) -> None:
        """Wait before the next attempt; a new change ends it, unless the server asked for patience."""
        delay = _BACKOFF.delay(attempt - 1, self._random)
        if problem.retry_after is not None:
            patience = min(problem.retry_after, _LONGEST_PATIENCE)
            await asyncio.sleep(max(delay, patience + self._random.random() * min(1.0, patience / 4)))
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._wake.wait()

    async def close(self) -> None:
        """Stop applying, and delete the object if it was ever written. Raises `ApiProblem` when that is refused or fails.

        A request under way is waited for first: the server might do it after the deletion.
        """
        self._closing = True
        self._wake.set()
        self._end_turn()
        await self._idle.wait()
        if not self._written:
            return
        options = msgspec.json.encode(
            {"apiVersion": "v1", "kind": "DeleteOptions", **({"preconditions": {"uid": self._uid}} if self._uid else {})}
        )
        for attempt in range(_GOODBYES):
            try:
                await self._remove(options)
                return
            except ApiProblem as problem:
                if problem.lasting or attempt == _GOODBYES - 1:
                    raise
            await asyncio.sleep(_BACKOFF.delay(attempt, self._random))

    async def _remove(self, options: bytes) -> None:
        try:
            await self._api.delete(self._path, options)
        except ApiProblem as problem:
            if problem.status == 409:
                return  # a successor's
            if problem.status != 403:
                raise
            await self._api.apply(self._path, _PARAMS, self._content())  # not allowed to delete: at least nothing is in it

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()
