"""The directories of a file discovery, kept up to date: signs of life for our records, an eye on those of others.

Nothing here waits or knows a thread: `step` does what is due, `due` says when to call it again, `fileno` when to do so sooner.

Silence is judged only while we ran ourselves. After a pause of this process or a jump of the clock everybody else gets time to
give a sign of life first, so that a process that wakes up neither forgets nor removes its living peers.
"""

import errno
import logging
import os
import stat
from collections.abc import Callable
from random import Random

import msgspec

from stator.clock import Clock
from stator.discovery.file_config import FileDiscoveryConfig
from stator.discovery.inotify import FileEvent, Inotify
from stator.discovery.model_conflict import check_model, models_beside
from stator.discovery.record_directory import RecordDirectory
from stator.errors import ConfigError, Unavailable, UsageError
from stator.protocol.records import ModelRecord, Query, Record, RecordKey
from stator.settings import user_root
from stator.tasks import Backoff

__all__ = ["FileStore"]

logger = logging.getLogger(__name__)

_SETTLE = 0.02
"""seconds a deletion waits before it is believed: `rm -r` removes the files first, and last the directory, which says it was no
goodbye of their owners"""
_SECOND_LOOK = 0.25
"""seconds before a file that made no sense is read again"""
_CLOCK_JUMP = 1.0
"""seconds by which wall clock and monotonic clock may drift apart between two steps"""


class _Bucket(msgspec.Struct):
    """A directory with its schedule (monotonic seconds). `watch` is None where inotify does not serve and names are polled."""

    directory: RecordDirectory
    watch: int | None = None
    next_scan: float = 0.0
    scanned: float = float("-inf")
    polled: bool = False


class FileStore:
    """Everything one file discovery knows and owns on disk. Used by one thread."""

    def __init__(self, config: FileDiscoveryConfig, *, clock: Clock, random: Random) -> None:
        self.root = config.root
        self.stale_since: float | None = None
        self.reason = ""
        self._config = config
        self._clock = clock
        self._random = random
        self._period = config.ttl / 3
        self._patience = 1.5 * self._period
        self._backoff = Backoff(first=min(0.1, self._period), most=min(5.0, self._period))
        self._failures = 0
        self._retry_at = 0.0
        self._buckets: dict[str, _Bucket] = {}
        self._inotify: Inotify | None = None
        self._next_touch = clock.monotonic() + self._period
        self._patient_until = clock.monotonic() + self._patience
        self._stepped = (clock.monotonic(), clock.wall())
        self._planned = float("inf")

    # Opening and closing

    def open(self) -> str:
        """Make the root and start listening; the answer is the root. `ConfigError` when it cannot be used."""
        self.root = self.root or str(user_root() / "discovery")
        try:
            os.makedirs(self.root, mode=0o700, exist_ok=True)
            mode = os.stat(self.root).st_mode
            usable = os.access(self.root, os.R_OK | os.W_OK | os.X_OK)
        except OSError as error:
            raise ConfigError(
                f"discovery root {self.root!r}: {error.strerror}; set STATOR_FILE_ROOT to a directory of yours"
            ) from error
        if not usable:
            raise ConfigError(f"discovery root {self.root!r} is not writable; set STATOR_FILE_ROOT to a directory of yours")
        if mode & stat.S_IWOTH:
            logger.warning("everybody on this machine may write to the discovery root %s; `chmod o-w` it", self.root)
        if self._config.watching == "auto":
            try:
                self._inotify = Inotify()
            except OSError as error:
                logger.warning(
                    "no inotify (%s); %s is polled every %g s. If a limit was hit, raise fs.inotify.max_user_instances",
                    error.strerror,
                    self.root,
                    self._config.poll_interval,
                )
        return self.root

    def close(self) -> None:
        """Remove our records and stop listening. Never raises OSError: what cannot be removed expires."""
        for bucket in self._buckets.values():
            for key in bucket.directory.own_keys:
                self._withdraw(bucket, key)
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def fileno(self) -> int | None:
        """Readable when `step` has something to do before it is due; None without inotify."""
        return None if self._inotify is None else self._inotify.fileno()

    # What callers ask for

    def publish(self, record: Record) -> bool:
        """`Discovery.register`."""
        key = record.key
        bucket = self._bucket(key.bucket)
        if isinstance(record, ModelRecord):
            self._check_model(record, bucket)
        if bucket.directory.owns(key):
            return False
        try:
            bucket.directory.create(record, self._clock.wall())
        except FileExistsError as error:
            raise UsageError(f"discovery key {key} is registered by another owner") from error
        except OSError as error:
            raise Unavailable(f"cannot register {key} in {self.root}: {error.strerror}") from error
        if isinstance(record, ModelRecord):
            try:
                self._check_model(record, bucket)  # two workers may have passed the first check at once
            except UsageError:
                self._withdraw(bucket, key)
                raise
        return True

    def withdraw(self, key: RecordKey) -> bool:
        """`Discovery.unregister`."""
        bucket = self._buckets.get(key.bucket)
        if bucket is None or not bucket.directory.owns(key):
            return False
        self._withdraw(bucket, key)
        return True

    def sync(self, bucket: str) -> None:
        """Know everything that happened in `bucket` before this call. Does nothing while the root cannot be read."""
        self._sync(self._bucket(bucket))

    def last_seen(self, query: Query) -> dict[RecordKey, float]:
        """`Discovery.last_seen`."""
        found = self._bucket(query.bucket)
        found.next_scan = 0.0
        self._sync(found)
        return {key: at for key, at in sorted(found.directory.last_seen().items()) if query.matches(key)}

    def take_changes(self) -> dict[RecordKey, Record | None]:
        """What changed since the last call, by key (None: gone)."""
        changes: dict[RecordKey, Record | None] = {}
        for bucket in self._buckets.values():
            if bucket.directory.changes:
                changes.update(bucket.directory.changes)
                bucket.directory.changes = {}
        return changes

    # Keeping up

    def due(self) -> float:
        """When `step` wants to be called next, in monotonic seconds."""
        if self.stale_since is not None:
            self._planned = self._retry_at
        else:
            # Also without records of ours there is a step each period: a pause is noticed by a step that comes late.
            scans = [min(bucket.next_scan, self._next_touch) for bucket in self._buckets.values()]
            self._planned = min(scans, default=float("inf"))
        return self._planned

    def step(self) -> None:
        """Take in what inotify reports and do what is due. Trouble with the disk ends in `stale_since`, not in an exception."""
        now = self._clock.monotonic()
        self._notice_pause(now)
        errors = self._guarded(self._read_events)
        retry = self.stale_since is not None
        if retry and now < self._retry_at:
            return
        if retry:
            self._patient_until = now + self._patience
        touch = retry or now >= self._next_touch
        if touch:
            self._next_touch = now + self._period
        for bucket in self._buckets.values():
            if retry or now >= bucket.next_scan:
                errors += self._guarded(self._scan, bucket)
            if touch:
                errors += self._guarded(bucket.directory.touch, self._clock.wall())
        if errors:
            self._lost(errors[0])
        elif retry:
            self._found()

    def _notice_pause(self, now: float) -> None:
        wall = self._clock.wall()
        before, wall_before = self._stepped
        self._stepped = (now, wall)
        jump = abs((wall - wall_before) - (now - before))
        if now - self._planned > self._period or jump > _CLOCK_JUMP:
            self._patient_until = now + self._patience

    @property
    def _patient(self) -> bool:
        return self._clock.monotonic() < self._patient_until

    def _bucket(self, name: str) -> _Bucket:
        bucket = self._buckets.get(name)
        if bucket is None:
            directory = RecordDirectory(self.root, name, ttl=self._config.ttl, random=self._random)
            bucket = self._buckets[name] = _Bucket(directory=directory)
            self._try(self._scan, bucket)
        return bucket

    def _sync(self, bucket: _Bucket) -> None:
        if self.stale_since is not None:
            return
        self._try(self._read_events)
        if bucket.watch is None or bucket.next_scan <= self._clock.monotonic() + _SETTLE:
            self._try(self._scan, bucket)

    def _check_model(self, record: ModelRecord, bucket: _Bucket) -> None:
        query = models_beside(record)
        self._sync(bucket)
        check_model(record, [other for other in bucket.directory.records() if query.matches(other.key)])

    def _withdraw(self, bucket: _Bucket, key: RecordKey) -> None:
        try:
            bucket.directory.withdraw(key)
        except OSError as error:
            logger.warning("record %s could not be removed from %s (%s); it expires", key, self.root, error.strerror)

    # Looking

    def _read_events(self) -> None:
        events = [] if self._inotify is None else self._inotify.read()
        buckets = {bucket.watch: bucket for bucket in self._buckets.values() if bucket.watch is not None}
        for event in events:
            if event.overflow:
                for bucket in self._buckets.values():
                    bucket.next_scan = 0.0
            elif (bucket := buckets.get(event.watch)) is not None:
                self._take(event, bucket)
        for watch in {event.watch for event in events}:
            if (bucket := buckets.get(watch)) is not None:
                self._schedule(bucket)

    def _take(self, event: FileEvent, bucket: _Bucket) -> None:
        if event.lost:
            if bucket.watch is not None and self._inotify is not None:
                self._inotify.remove(bucket.watch)
            bucket.directory.lose()
            bucket.watch = None
            bucket.next_scan = 0.0
        elif event.appeared:
            bucket.directory.look(event.name, self._clock.wall(), patient=self._patient)
        elif bucket.directory.knows(event.name):
            bucket.next_scan = min(bucket.next_scan, self._clock.monotonic() + _SETTLE)

    def _scan(self, bucket: _Bucket) -> None:
        replaced = bucket.directory.settle()
        if replaced or bucket.watch is None:
            self._subscribe(bucket)  # before the look, so that nothing falls between the two
        bucket.directory.scan(self._clock.wall(), patient=self._patient, replaced=replaced)
        bucket.scanned = self._clock.monotonic()
        bucket.next_scan = float("inf")
        self._schedule(bucket)

    def _subscribe(self, bucket: _Bucket) -> None:
        """Be told of changes, or poll where that is refused."""
        if self._inotify is None:
            return
        try:
            watch = self._inotify.add(bucket.directory.path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise
            if not bucket.polled:
                logger.warning(
                    "cannot watch %s (%s); it is polled every %g s. If a limit was hit, raise fs.inotify.max_user_watches",
                    bucket.directory.path,
                    error.strerror,
                    self._config.poll_interval,
                )
            bucket.polled = True
            return
        if bucket.watch is not None and bucket.watch != watch:
            self._inotify.remove(bucket.watch)
        bucket.watch = watch

    def _schedule(self, bucket: _Bucket) -> None:
        """Scan again when the next owner may have died, or else once in a while: inotify does not see everything."""
        now, wall = self._clock.monotonic(), self._clock.wall()
        at = bucket.scanned + (self._config.ttl if bucket.watch is not None else self._config.poll_interval)
        if (expiry := bucket.directory.next_expiry()) is not None:
            at = min(at, max(now + (expiry - wall), self._patient_until) + 0.001)
        if now < self._patient_until:
            at = min(at, self._patient_until)
        if bucket.directory.doubtful:
            at = min(at, now + _SECOND_LOOK)
        bucket.next_scan = min(bucket.next_scan, at)

    # Trouble

    @staticmethod
    def _guarded(work: Callable[..., None], *arguments: object) -> list[OSError]:
        try:
            work(*arguments)
        except OSError as error:
            return [error]
        return []

    def _try(self, work: Callable[..., None], *arguments: object) -> None:
        for error in self._guarded(work, *arguments):
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        now = self._clock.monotonic()
        self.reason = f"{error.strerror} ({error.filename or self.root})"
        if self.stale_since is None:
            self.stale_since = self._clock.wall()
            self._failures = 0
            logger.warning("discovery root %s: %s; known records are kept, trying again", self.root, self.reason)
        else:
            self._failures += 1
        self._retry_at = now + self._backoff.delay(self._failures, self._random)

    def _found(self) -> None:
        assert self.stale_since is not None
        logger.warning("discovery root %s is back after %.1f s", self.root, self._clock.wall() - self.stale_since)
        self.stale_since = None
        self.reason = ""
