"""etcd discovery: the processes of many machines share a store that knows by leases who died (`spec/20 §4.2`, `docs/discovery.md`).

Keys and values are the reference's, so that its processes can share the store. etcd may go, come back, or come back empty: what is
known stays in use, and nobody restarts. etcd's client is imported when a discovery is opened.
"""

import asyncio
from collections.abc import Mapping
from random import Random
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self

from stator.clock import Clock
from stator.discovery.etcd_config import EtcdConfig
from stator.discovery.etcd_contact import EtcdContact
from stator.discovery.interface import DiscoveryStatus
from stator.discovery.view import View
from stator.discovery.watch import Watch
from stator.errors import UsageError
from stator.protocol.records import Query, Record, RecordKey
from stator.tasks import Scope

if TYPE_CHECKING:
    import ssl

    from stator.discovery.etcd_session import EtcdSession

__all__ = ["EtcdConfig", "EtcdDiscovery", "open_etcd"]


class EtcdDiscovery:
    """`stator.discovery.Discovery` over etcd. No wait for etcd is longer than `answer_timeout`, the start than `start_timeout`.

    The instance id is also the id of the first lease, as with the reference. Later leases have other ids; the instance keeps its own.
    """

    def __init__(self, config: EtcdConfig, *, clock: Clock, random: Random) -> None:
        self._config = config
        self._clock = clock
        self._random = random
        self._instance_id = random.getrandbits(63) or 1
        self._contact = EtcdContact(",".join(config.urls), clock=clock)
        self._view = View()
        self._entered = False
        self._session: EtcdSession | None = None
        self._farewell = Scope("etcd farewell")
        self._leaving: asyncio.Task[None] | None = None

    @property
    def instance_id(self) -> int:
        return self._instance_id

    @property
    def status(self) -> DiscoveryStatus:
        return self._contact.status

    async def register(self, record: Record) -> bool:
        session = self._opened()
        _check_key(record.key)
        return await session.register(record)

    async def unregister(self, key: RecordKey) -> bool:
        return await self._opened().unregister(key)

    async def list(self, query: Query) -> list[Record]:
        await self._opened().sync(query.bucket)
        return [*self._view.select(query).values()]

    def watch(self, query: Query) -> Watch:
        async def prepare() -> None:
            await self._opened().sync(query.bucket)

        return self._view.watch(query, prepare)

    async def last_seen(self, query: Query) -> dict[RecordKey, float]:
        return await self._opened().last_seen(query)

    def owned(self) -> Mapping[RecordKey, Record]:
        return MappingProxyType({} if self._session is None else self._session.owned)

    async def aclose(self) -> None:
        self._view.close()
        session, self._session = self._session, None
        if session is not None:
            self._leaving = self._farewell.spawn(session.close(), name="etcd farewell")
        if self._leaving is not None:
            await asyncio.wait({self._leaving})

    async def __aenter__(self) -> Self:
        if self._entered:
            raise UsageError("a discovery is opened once")
        self._entered = True
        make, context, file_times = await asyncio.to_thread(_prepare, self._config)
        session = make(
            self._config,
            context=context,
            file_times=file_times,
            view=self._view,
            contact=self._contact,
            lease=self._instance_id,
            clock=self._clock,
            random=self._random,
        )
        await session.open()
        self._session = session
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _opened(self) -> "EtcdSession":
        if self._session is None:
            raise UsageError("the discovery is not open; enter it with `async with`")
        return self._session


def _check_key(key: RecordKey) -> None:
    """Raise `UsageError` for names that make another key, or none."""
    try:
        str(key).encode()
        exact = RecordKey.parse(key.bucket, key.path) == key
    except UnicodeEncodeError as error:
        raise UsageError(f"the names in {str(key)!r} are not valid text") from error
    if not exact:
        raise UsageError(f"the names in {key} must not contain '/'")


def _prepare(config: EtcdConfig) -> "tuple[type[EtcdSession], ssl.SSLContext | None, tuple[float, ...]]":
    """All that reads the disk: etcd's client and certificates. Not for the event loop."""
    from stator.discovery.etcd_session import EtcdSession
    from stator.discovery.etcd_tls import client_context, file_times

    times = file_times(config)
    return EtcdSession, client_context(config), times


def open_etcd(config: EtcdConfig, *, clock: Clock, random: Random) -> EtcdDiscovery:
    """A discovery to be entered with `async with`; `Unavailable` or `ConfigError` from there when etcd cannot be used."""
    return EtcdDiscovery(config, clock=clock, random=random)
