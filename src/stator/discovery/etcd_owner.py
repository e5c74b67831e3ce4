"""Our records in etcd, and the lease that all of them belong to (`spec/20 §4.2`).

The lease is renewed every third of its TTL. Each time the keys that belong to it are compared with the records that should be
there: what is missing is written again, what is too much (a registration whose answer was lost, a deletion that did not get
through) is removed. A lease that is gone, for whatever reason, is replaced by another one; nothing else changes for anybody.
One of our keys is watched, so that a lease that was taken away is noticed at once.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from random import Random

from stator.clock import Clock
from stator.discovery.etcd_config import EtcdConfig
from stator.discovery.etcd_contact import EtcdContact
from stator.discovery.etcd_problem import ALREADY_THERE, NOT_FOUND, REFUSED_USER, Refused, Unreachable
from stator.discovery.etcd_store import EtcdStore
from stator.discovery.model_conflict import check_model, models_beside
from stator.errors import ConfigError, PeerProtocolError, StatorError, Unavailable, UsageError
from stator.protocol.records import ModelRecord, Record, RecordKey, decode_record, encode_record
from stator.tasks import Backoff

__all__ = ["EtcdOwner", "lease_id"]

logger = logging.getLogger(__name__)

_PART = "lease"
_LEASES = 16
"""former leases of ours that we still recognise"""


def lease_id(random: Random) -> int:
    """A positive number of 63 bits, as etcd's own lease ids are."""
    return random.getrandbits(63) or 1


class EtcdOwner:
    """`open` once, then `keep` and `guard` as tasks; `close` in the end. `records` is what should be there."""

    def __init__(
        self,
        store: EtcdStore,
        config: EtcdConfig,
        *,
        lease: int,
        contact: EtcdContact,
        backoff: Backoff,
        clock: Clock,
        random: Random,
        at_revision: Callable[[int], None],
    ) -> None:
        """`at_revision` is told where the store is, at each sign of life."""
        self.records: dict[RecordKey, Record] = {}
        self.lease = lease
        self._store = store
        self._config = config
        self._contact = contact
        self._backoff = backoff
        self._clock = clock
        self._random = random
        self._at_revision = at_revision
        self._ttl = config.lease_ttl
        self._mine: deque[int] = deque(maxlen=_LEASES)
        self._turns: dict[RecordKey, asyncio.Future[None]] = {}
        self._waking = asyncio.Event()
        self._replaced = asyncio.Event()
        self._owning = asyncio.Event()
        self._refused: set[RecordKey] = set()

    # The lease

    async def open(self) -> None:
        """Get the first lease. Raises `Unavailable` after `start_timeout`, `ConfigError` where waiting cannot help."""
        config = self._config
        deadline = self._clock.monotonic() + config.start_timeout
        attempt = 0
        while True:
            try:
                return await self._grant()
            except Refused as error:
                raise ConfigError(f"cannot use etcd at {self._contact.status.location}: {error}") from error
            except Unreachable as error:
                text = f"cannot reach etcd at {self._contact.status.location} ({error})"
                if error.hopeless:
                    raise ConfigError(text) from error
                delay = self._backoff.delay(attempt, self._random)
                attempt += 1
                if self._clock.monotonic() + delay >= deadline:
                    raise Unavailable(
                        f"{text} within {config.start_timeout:g} s; look at ETCD_ENDPOINTS, or start etcd"
                    ) from error
                await asyncio.sleep(delay)

    async def _grant(self) -> None:
        """Make the lease; if its id is taken, make one of another id."""
        while True:
            self._mine.append(self.lease)
            try:
                granted = await self._store.grant(self.lease, self._config.lease_ttl)
            except Refused as error:
                if error.code != ALREADY_THERE:
                    raise
                self._mine.remove(self.lease)
                self.lease = lease_id(self._random)
                continue
            self._ttl = granted
            self._contact.ttl = granted
            return

    async def keep(self) -> None:
        """Give signs of life until cancelled."""
        failures = 0
        while True:
            await self._nap(self._backoff.delay(failures - 1, self._random) if failures else self._ttl / 3)
            try:
                await self._renew()
                await self._reconcile()
            except (Refused, Unreachable) as error:
                failures += 1
                self._contact.lost(_PART, str(error))
            except Exception:
                failures += 1
                logger.exception("renewing the lease in etcd failed unexpectedly; it goes on")
            else:
                failures = 0
                self._contact.found(_PART)

    def doubt(self) -> None:
        """Something may be wrong: give a sign of life now."""
        self._waking.set()

    async def _nap(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._waking.wait()
        except TimeoutError:
            pass
        self._waking.clear()

    async def _renew(self) -> None:
        answer = await self._store.renew(self.lease, each=min(self._config.request_timeout, self._ttl / 3))
        if answer.TTL > 0:
            self._at_revision(answer.header.revision)
            return
        gone = self.lease
        self.lease = lease_id(self._random)
        await self._grant()
        self._replaced.set()
        self._replaced = asyncio.Event()
        logger.warning("lease %x in etcd is gone; %d records are registered under %x", gone, len(self.records), self.lease)

    async def _reconcile(self) -> None:
        """Let etcd have exactly our records."""
        held = set((await self._store.life(self.lease, keys=True)).keys)
        wanted = {str(key).encode() for key in (*self.records, *self._turns)}
        for raw in held - wanted:
            async with self._turn(_key_of(raw)) as key:
                if key not in self.records:
                    await self._store.delete(raw, lease=self.lease)
        missing = [key for key in self.records if str(key).encode() not in held]
        for key in missing:
            if key in self._turns:
                continue  # whoever has the turn may wait for us
            async with self._turn(key):
                record = self.records.get(key)
                if record is not None:
                    self._note(key, await self._create(record, within=None))

    def _note(self, key: RecordKey, created: bool) -> None:
        """Say once when somebody else has a key of ours."""
        if created:
            self._refused.discard(key)
        elif key not in self._refused:
            self._refused.add(key)
            logger.warning("record %s cannot be registered again: somebody else has its key", key)

    async def guard(self) -> None:
        """Watch one of our keys until cancelled: when it is deleted and not by us, so is the lease, as a rule."""
        attempt = 0
        while True:
            while not self.records:
                self._owning.clear()
                await self._owning.wait()
            key = next(iter(self.records))
            try:
                async with self._store.watch_key(str(key).encode()) as stream:
                    async for answer in stream:
                        attempt = 0
                        if key not in self.records or answer.canceled:
                            break
                        if any(event.type == "DELETE" for event in answer.events) and key not in self._turns:
                            self.doubt()
            except (Refused, Unreachable) as error:
                logger.debug("the watch of our own record ended: %s", error)
            except Exception:
                logger.exception("watching our own record in etcd failed unexpectedly; it goes on")
            await asyncio.sleep(self._backoff.delay(attempt, self._random))
            attempt += 1

    # Records

    @asynccontextmanager
    async def _turn(self, key: RecordKey) -> AsyncGenerator[RecordKey, None]:
        """One at a time does something about a key."""
        while (other := self._turns.get(key)) is not None:
            await asyncio.wait({other})
        mine = self._turns[key] = asyncio.get_running_loop().create_future()
        try:
            yield key
        finally:
            del self._turns[key]
            mine.set_result(None)

    async def register(self, record: Record) -> bool:
        """`Discovery.register`. Cancelled: it may be there until the next `_reconcile`."""
        key = record.key
        async with self._turn(key):
            with _saying(f"cannot register {key} in etcd"):
                if isinstance(record, ModelRecord):
                    await self._check_model(record)
                if key in self.records:
                    return False
                try:
                    if not await self._create_under_some_lease(record):
                        raise UsageError(f"discovery key {key} is registered by another owner")
                    self.records[key] = record
                    self._owning.set()
                    if isinstance(record, ModelRecord):
                        await self._check_model(record)  # two workers may have passed the first check at once
                except UsageError:
                    if self.records.pop(key, None) is not None:
                        await self._delete(key)
                    raise
                except BaseException:  # what came of it is not known; `_reconcile` will remove it
                    self.records.pop(key, None)
                    self.doubt()
                    raise
        return True

    async def _create_under_some_lease(self, record: Record) -> bool:
        within = self._config.answer_timeout
        replaced = self._replaced
        try:
            return await self._create(record, within=within)
        except Refused as error:
            if error.code != NOT_FOUND:
                raise
            self.doubt()
            try:
                async with asyncio.timeout(within):
                    await replaced.wait()
            except TimeoutError as late:
                raise Unreachable(f"{error}, and no other lease within {within:g} s") from late
        return await self._create(record, within=within)

    async def _create(self, record: Record, *, within: float | None) -> bool:
        raw, value = str(record.key).encode(), encode_record(record)
        return await self._store.create(raw, value, lease=self.lease, mine=self._mine, within=within)

    async def _check_model(self, record: ModelRecord) -> None:
        query = models_beside(record)
        prefix = "/".join((query.bucket, *query.segments, "")).encode()
        found: list[Record] = []
        for kv in (await self._store.read(prefix, within=self._config.answer_timeout)).keys:
            try:
                found.append(decode_record(kv.value))
            except PeerProtocolError:
                continue  # who follows the bucket warns
        check_model(record, found)

    async def unregister(self, key: RecordKey) -> bool:
        """`Discovery.unregister`."""
        async with self._turn(key):
            if self.records.pop(key, None) is None:
                return False
            self._refused.discard(key)
            await self._delete(key)
        return True

    async def _delete(self, key: RecordKey) -> None:
        """Remove our key; without etcd, when it is back. Never fails."""
        try:
            within = self._config.answer_timeout if self._contact.connected else None
            await self._store.delete(str(key).encode(), lease=self.lease, within=within)
        except (Refused, Unreachable) as error:
            logger.warning("record %s is removed when etcd answers (%s), or expires with its lease", key, error)
            self.doubt()

    async def close(self, *, within: float) -> None:
        """Revoke the lease, and with it remove our records. Never fails; `keep` has ended."""
        self.records.clear()
        try:
            async with asyncio.timeout(within):
                await self._store.revoke(self.lease, within=within)
        except (Refused, Unreachable, TimeoutError) as error:
            if not isinstance(error, Refused) or error.code != NOT_FOUND:
                text = str(error) or f"no answer within {within:g} s"
                logger.warning("our lease in etcd could not be ended (%s); it expires within %d s", text, self._ttl)


def _key_of(raw: bytes) -> RecordKey:
    """The key that `raw` spells; we have written it."""
    bucket, _, path = raw.decode().partition("/")
    name, _, path = path.partition("/")
    return RecordKey.parse(f"{bucket}/{name}", path)


class _saying:
    """Turns what etcd says into `StatorError`, with what was being done."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Refused | Unreachable):
            raise stator_error(self._doing, error) from error


def stator_error(doing: str, error: Refused | Unreachable) -> StatorError:
    """What a caller of discovery is told."""
    if isinstance(error, Refused) and error.code in REFUSED_USER:
        return ConfigError(
            f"{doing}: {error}; look at etcd.username (ETCD_AUTH_USERNAME), who needs permission to read and write keys "
            "that begin with v1/"
        )
    return Unavailable(f"{doing}: {error}")
