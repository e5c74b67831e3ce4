"""An open etcd discovery: the connections, our records, and the buckets that somebody has asked about."""

import asyncio
import logging
import ssl
from collections.abc import Coroutine, Mapping
from random import Random
from typing import Any, TypeVar

from stator.clock import Clock
from stator.discovery.etcd_api import EtcdApi
from stator.discovery.etcd_config import EtcdConfig
from stator.discovery.etcd_contact import EtcdContact
from stator.discovery.etcd_follower import EtcdFollower
from stator.discovery.etcd_owner import EtcdOwner, stator_error
from stator.discovery.etcd_problem import REFUSED_USER, Refused, Unreachable
from stator.discovery.etcd_store import EtcdStore
from stator.discovery.view import View
from stator.errors import UsageError
from stator.protocol.records import Query, Record, RecordKey
from stator.tasks import Backoff, Scope

__all__ = ["EtcdSession"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LEASES_ASKED = 256
"""leases that `last_seen` asks about; the owners of more records count as seen now"""


class EtcdSession:
    """`open` once, `close` once."""

    def __init__(
        self,
        config: EtcdConfig,
        *,
        context: ssl.SSLContext | None,
        file_times: tuple[float, ...],
        view: View,
        contact: EtcdContact,
        lease: int,
        clock: Clock,
        random: Random,
    ) -> None:
        third = config.lease_ttl / 3
        self._backoff = Backoff(first=min(config.reconnect_first, third), most=min(config.reconnect_most, third))
        self._config = config
        self._view = view
        self._contact = contact
        self._clock = clock
        self._random = random
        self._scope = Scope("etcd discovery")
        self._api = EtcdApi(config, context=context, file_times=file_times, clock=clock, random=random)
        self._store = EtcdStore(self._api)
        self._owner = EtcdOwner(
            self._store,
            config,
            lease=lease,
            contact=contact,
            backoff=self._backoff,
            clock=clock,
            random=random,
            at_revision=self._at_revision,
        )
        self._followers: dict[str, EtcdFollower] = {}
        self._writes: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Connect and get a lease. Raises `Unavailable` or `ConfigError`; nothing is left open then."""
        try:
            await self._owner.open()
        except BaseException:
            await self._api.aclose()
            raise
        self._scope.spawn(self._owner.keep(), name="etcd lease")
        self._scope.spawn(self._owner.guard(), name="etcd guard")

    async def close(self) -> None:
        """Remove our records, within `request_timeout`, and cut the connections."""
        await self._scope.aclose()
        for follower in self._followers.values():
            follower.close()
        await self._owner.close(within=self._config.request_timeout)
        await self._api.aclose()

    # Records of ours

    @property
    def owned(self) -> Mapping[RecordKey, Record]:
        """What this process has registered."""
        return self._owner.records

    async def register(self, record: Record) -> bool:
        """`Discovery.register`."""
        return await self._to_its_end(self._owner.register(record), name="etcd register")

    async def unregister(self, key: RecordKey) -> bool:
        """`Discovery.unregister`."""
        return await self._to_its_end(self._owner.unregister(key), name="etcd unregister")

    async def _to_its_end(self, work: Coroutine[Any, Any, bool], *, name: str) -> bool:
        """Do `work` even when whoever waits for it is cancelled."""
        task = self._scope.spawn(_outcome(work), name=name)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        await asyncio.wait({task})
        if task.cancelled():
            raise UsageError("the discovery was closed meanwhile")
        outcome = task.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    # Records of everybody

    async def sync(self, bucket: str) -> None:
        """Bring the view up to date, as far as etcd answers; at once while there is no contact."""
        follower = self._follow(bucket)
        if not self._contact.connected:
            return
        within = self._config.answer_timeout
        try:
            async with asyncio.timeout(within):
                if self._writes:
                    await asyncio.wait(set(self._writes))  # what we were asked to write before
                await follower.sync(within=within)
        except (Refused, Unreachable, TimeoutError) as error:
            if isinstance(error, Refused) and error.code in REFUSED_USER:
                raise stator_error(f"cannot read {bucket} in etcd", error) from error
            logger.warning("discovery answers what it knew: %s", str(error) or f"etcd did not answer within {within:g} s")
            self._owner.doubt()

    def _follow(self, bucket: str) -> EtcdFollower:
        """Who keeps the view up to date about `bucket`."""
        follower = self._followers.get(bucket)
        if follower is None:
            follower = self._followers[bucket] = EtcdFollower(
                bucket,
                store=self._store,
                view=self._view,
                contact=self._contact,
                backoff=self._backoff,
                clock=self._clock,
                random=self._random,
            )
            self._scope.spawn(follower.run(), name=f"etcd {bucket}")
        return follower

    def _at_revision(self, revision: int) -> None:
        for follower in self._followers.values():
            if follower.is_behind(revision):
                self._scope.spawn(_outcome(follower.check()), name="etcd check")

    async def last_seen(self, query: Query) -> dict[RecordKey, float]:
        """`Discovery.last_seen`: exact to a second, by the leases; now for records without one."""
        await self.sync(query.bucket)
        leases = self._follow(query.bucket).leases(query)
        seen = await self._renewals(sorted({*leases.values()} - {0})[:_LEASES_ASKED])
        now = self._clock.wall()
        return {key: seen.get(leases.get(key, 0), now) for key in self._view.select(query)}

    async def _renewals(self, leases: list[int]) -> dict[int, float]:
        """When each lease was renewed last, in wall-clock seconds, as far as etcd answers."""
        seen: dict[int, float] = {}

        async def ask(lease: int) -> None:
            life = await self._store.life(lease)
            if life.TTL >= 0:
                seen[lease] = self._clock.wall() - (life.grantedTTL - life.TTL)

        if self._contact.connected:
            await asyncio.gather(*(_outcome(ask(lease)) for lease in leases))
        return seen


async def _outcome(work: Coroutine[Any, Any, T]) -> T | Exception:
    """What came of `work`. An error has somebody who is told of it, or nobody needs to know: the scope does not log it."""
    try:
        return await work
    except Exception as error:
        return error
