"""What a discovery is: records that processes publish, list and watch. One interface for every backend.

    async with open_file(config, clock=clock, random=random) as discovery:
        await discovery.register(record)
        async with discovery.watch(Query("v1/instances")) as watch:
            async for changes in watch: ...

`stator.testing.discovery_suite` holds every backend to what is written here.
"""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, Self

import msgspec

from stator.discovery.watch import Added, Change, Removed, Watch
from stator.protocol.records import Query, Record, RecordKey

__all__ = ["Added", "Change", "Discovery", "DiscoveryFactory", "DiscoveryStatus", "Removed", "Watch"]


class DiscoveryStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How much what we know can be trusted."""

    backend: str
    location: str = ""
    """where the records are, for people: a directory, a URL"""
    stale_since: float | None = None
    """wall-clock seconds since when the backend has not answered; None: connected. What is listed is what was known then"""
    reason: str = ""
    """why it is stale"""

    @property
    def connected(self) -> bool:
        """Whether the backend answers."""
        return self.stale_since is None


class Discovery(Protocol):
    """One process' access to the records of a cluster. Lives on one event loop.

    A backend that cannot be reached costs nothing that was known: `list` and `watch` keep the last known records, `status` says
    since when they are stale, and what this process owns is registered again when the backend is back.
    """

    @property
    def instance_id(self) -> int:
        """Unsigned 64-bit id of this process, the one its records carry."""
        ...

    @property
    def status(self) -> DiscoveryStatus:
        """Connected, or stale since when and why."""
        ...

    async def register(self, record: Record) -> bool:
        """Publish `record` under its key until `unregister` or `aclose`.

        False: this process has registered the key already; nothing was changed.

        Raises `UsageError` when a different model is registered on the endpoint or another process owns the key, `Unavailable`
        when the backend cannot be written to; nothing is registered then. Cancelled: the record may have been registered;
        `owned` and `aclose` know.
        """
        ...

    async def unregister(self, key: RecordKey) -> bool:
        """Take a record of this process back. False: this process has not registered it.

        Never fails on an unreachable backend: the record is not renewed any more and expires. Cancelled: it goes all the same.
        """
        ...

    async def list(self, query: Query) -> list[Record]:
        """The records of living owners that match, ordered by key; at least as new as the call."""
        ...

    def watch(self, query: Query) -> Watch:
        """The matching records as they change; see `Watch`."""
        ...

    async def last_seen(self, query: Query) -> dict[RecordKey, float]:
        """When the owner of each matching record last gave a sign of life, in wall-clock seconds."""
        ...

    def owned(self) -> Mapping[RecordKey, Record]:
        """What this process has registered."""
        ...

    async def aclose(self) -> None:
        """Remove everything this process owns and end its watches. Idempotent. Cancelled: the removal goes on by itself."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


DiscoveryFactory = Callable[..., Discovery]
"""What the entry points of group `stator.discovery` name: `factory(config, *, clock: Clock, random: Random)`.

The answer is entered with `async with`. The annotation of the first parameter is the backend's `Config` struct, which
`stator.settings.load` fills. Its class variable `location`, if it has one, names the field that is set by the rest of a setting
`discovery = name://rest`.
"""
