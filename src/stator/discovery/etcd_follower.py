"""One bucket of etcd, followed into the view: a range read, then a watch from the next revision, and again when that breaks.

Every (re)connection reads the whole bucket and applies the difference, so that compaction, another member and a store that was
emptied need no case of their own. What a range or an event says is true of `_entries` at once; a record that is gone may be shown
a little longer (`_missing`): after an event for `_SETTLE` seconds, because an owner whose lease was taken away is back by then, and
after a silence of etcd until `EtcdContact.patient_until`.
"""

import asyncio
import logging
from random import Random

import msgspec

from stator.clock import Clock
from stator.discovery.etcd_api import WatchStream
from stator.discovery.etcd_contact import EtcdContact
from stator.discovery.etcd_messages import KeyValue, WatchAnswer
from stator.discovery.etcd_problem import Refused, Unreachable
from stator.discovery.etcd_store import EtcdStore, Snapshot
from stator.discovery.view import View
from stator.errors import PeerProtocolError
from stator.protocol.records import Query, Record, RecordKey, decode_record
from stator.tasks import Backoff

__all__ = ["EtcdFollower"]

logger = logging.getLogger(__name__)

_SETTLE = 0.2
"""seconds until a deletion told by the watch is believed"""
_STEADY = 1.0
"""seconds that a watch must have lasted for the next one to be opened without delay"""
_TRIES = 3
"""watches that may fail one after the other, although ranges are answered, before contact counts as lost"""


class _Entry(msgspec.Struct, frozen=True):
    """A key in etcd. `record` is None as long as its value never made sense."""

    mod_revision: int
    lease: int
    record: Record | None


class EtcdFollower:
    """`run` keeps the view up to date until it is cancelled; `sync` brings it up to date now."""

    def __init__(
        self,
        bucket: str,
        *,
        store: EtcdStore,
        view: View,
        contact: EtcdContact,
        backoff: Backoff,
        clock: Clock,
        random: Random,
    ) -> None:
        self.bucket = bucket
        self._prefix = f"{bucket}/".encode()
        self._store = store
        self._view = view
        self._contact = contact
        self._backoff = backoff
        self._clock = clock
        self._random = random
        self._entries: dict[bytes, _Entry] = {}
        self._warned: set[bytes] = set()
        self._missing: dict[RecordKey, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._cluster = 0
        self._revision = 0
        """what the entries reflect: every event up to it has been applied"""
        self._behind_since: float | None = None
        self._stream: WatchStream | None = None
        self._live = False
        """whether the watch has told something"""
        self._answered: float | None = None
        """when the range was read that this watch begins with"""
        self._opened: float | None = None
        """when the watch told something first"""
        self._reading = asyncio.Lock()
        self._asked = 0
        self._served = 0
        contact.tell(self._wait_longer)

    # Reading

    async def sync(self, *, within: float) -> None:
        """Know everything that happened before this call. Raises `Refused`, `Unreachable`; callers at the same time share a read."""
        self._asked += 1
        wanted = self._asked
        async with self._reading:
            if self._served < wanted:
                await self._read(within=within)

    async def _read(self, *, within: float | None) -> None:
        serves = self._asked
        snapshot = await self._store.read(self._prefix, within=within)
        self._served = serves
        if not self._live or snapshot.revision >= self._revision:  # else the watch was faster than the range
            self._take_all(snapshot)

    async def run(self) -> None:
        """Follow until cancelled."""
        failures = 0
        while True:
            self._opened = self._answered = None
            reason = "it ends every watch"
            try:
                await self._follow()
            except (Refused, Unreachable) as error:
                reason = str(error)
            except Exception:
                logger.exception("following %s in etcd failed unexpectedly; it goes on", self.bucket)
                reason = "an unexpected failure; see the log"
            self._live, self._stream = False, None
            if self._opened is not None and self._clock.monotonic() - self._opened >= _STEADY:
                failures = 0
                continue
            failures += 1
            if self._answered is None or failures > _TRIES:
                self._contact.lost(self.bucket, reason)
            await asyncio.sleep(self._backoff.delay(failures - 1, self._random))

    async def _follow(self) -> None:
        async with self._reading:
            await self._read(within=None)
        self._answered = self._clock.monotonic()
        async with self._store.watch_prefix(self._prefix, after=self._revision) as stream:
            self._stream = stream
            async for answer in stream:
                if answer.canceled or answer.compact_revision:
                    logger.debug(
                        "the watch of %s ends at etcd: %s %d", self.bucket, answer.cancel_reason, answer.compact_revision
                    )
                    return
                if not self._live:
                    self._live = True
                    self._opened = self._clock.monotonic()
                    self._behind_since = None
                    self._contact.found(self.bucket)
                self._take_events(answer)

    def is_behind(self, revision: int) -> bool:
        """Whether the watch has been silent for a TTL although the store has come to `revision`. Other keys may be what has changed."""
        now = self._clock.monotonic()
        if not self._live or revision <= self._revision:
            self._behind_since = None
        elif self._behind_since is None:
            self._behind_since = now
        return self._behind_since is not None and now - self._behind_since >= self._contact.ttl

    async def check(self) -> None:
        """Find out whether the watch has missed something; it is opened again then. Raises `Refused` and `Unreachable`."""
        self._behind_since = None
        known = self._revision
        changed, revision = await self._store.changed(self._prefix, since=known, count=len(self._entries))
        if self._stream is None or self._revision != known:
            return
        if changed:
            logger.info("the watch of %s has missed changes; it is opened again", self.bucket)
            self._stream.close()
        else:
            self._revision = max(known, revision)

    # What etcd says

    def _take_all(self, snapshot: Snapshot) -> None:
        """The bucket is exactly this."""
        if self._cluster and (snapshot.cluster != self._cluster or snapshot.revision < self._revision):
            logger.warning("etcd has lost its history; records that are missing are kept until their owners had time to return")
            self._contact.be_patient()
        self._cluster, self._revision = snapshot.cluster, snapshot.revision
        changes: dict[RecordKey, Record | None] = {}
        for raw in self._entries.keys() - {kv.key for kv in snapshot.keys}:
            self._remove(raw, changes, settle=0.0)
        for kv in snapshot.keys:
            known = self._entries.get(kv.key)
            if known is None or known.mod_revision != kv.mod_revision or known.record is None:
                self._put(kv, changes)
        for key in [key for key, at in self._missing.items() if at != float("inf") and self._contact.patient_until < at]:
            del self._missing[key]  # the range has confirmed what an event said
            changes[key] = None
        self._view.apply(changes)

    def _take_events(self, answer: WatchAnswer) -> None:
        changes: dict[RecordKey, Record | None] = {}
        for event in answer.events:
            if event.kv.mod_revision <= self._revision:
                continue  # a range was faster
            if event.type == "DELETE":
                self._remove(event.kv.key, changes, settle=_SETTLE)
            else:
                self._put(event.kv, changes)
        if answer.events:
            self._revision = max(self._revision, answer.events[-1].kv.mod_revision)
        elif not answer.created:
            self._revision = max(self._revision, answer.header.revision)
        self._view.apply(changes)

    def _put(self, kv: KeyValue, changes: dict[RecordKey, Record | None]) -> None:
        record = self._decode(kv)
        if record is None and (known := self._entries.get(kv.key)) is not None:
            record = known.record  # what makes no sense leaves what did
        self._entries[kv.key] = _Entry(kv.mod_revision, kv.lease, record)
        if record is not None:
            self._missing.pop(record.key, None)
            changes[record.key] = record

    def _decode(self, kv: KeyValue) -> Record | None:
        """The record, or None after a warning, which is given once for each key until it makes sense."""
        try:
            record = decode_record(kv.value)
            if str(record.key).encode() != kv.key:
                raise PeerProtocolError(f"its content belongs under {record.key}")
        except Exception as error:  # anybody may write there, and nothing they write may stop us
            if kv.key not in self._warned:
                self._warned.add(kv.key)
                logger.warning("ignored the value of %r in etcd: %s", kv.key.decode(errors="replace"), error)
            return None
        self._warned.discard(kv.key)
        return record

    def _remove(self, raw: bytes, changes: dict[RecordKey, Record | None], *, settle: float) -> None:
        self._warned.discard(raw)
        known = self._entries.pop(raw, None)
        if known is None or known.record is None:
            return
        key = known.record.key
        now = self._clock.monotonic()
        believed = max(now + settle, self._contact.patient_until)
        if believed <= now:
            changes[key] = None
        else:
            changes.pop(key, None)
            self._missing[key] = believed
            self._schedule(believed)

    # What is missing

    @property
    def missing(self) -> int:
        """Records that are shown although etcd does not have them, until their owners had time to return."""
        return len(self._missing)

    def _wait_longer(self) -> None:
        """The owners of what is missing get the time that everybody gets."""
        at = self._contact.patient_until
        for key in self._missing:
            self._missing[key] = at
        if self._missing:
            self._schedule(at)

    def _schedule(self, at: float) -> None:
        """Look at what is missing then, if not sooner."""
        if at == float("inf"):
            return
        if self._timer is None or at < self._timer_at:
            self.close()  # the timer that is set
            self._timer_at = at
            self._timer = asyncio.get_running_loop().call_later(max(0.0, at - self._clock.monotonic()), self._believe)

    def _believe(self) -> None:
        """Stop showing those whose owners had their time."""
        self._timer = None
        now = self._clock.monotonic()
        changes: dict[RecordKey, Record | None] = {key: None for key, at in self._missing.items() if at <= now}
        for key in changes:
            del self._missing[key]
        self._view.apply(changes)
        if self._missing:
            self._schedule(min(self._missing.values()))

    def close(self) -> None:
        """Stop the clock of what is missing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def leases(self, query: Query) -> dict[RecordKey, int]:
        """The lease of each record that is in etcd and matches; 0: none."""
        found = {entry.record.key: entry.lease for entry in self._entries.values() if entry.record is not None}
        return {key: found[key] for key in sorted(found) if query.matches(key)}
