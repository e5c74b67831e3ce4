"""One bucket of the file backend: a directory with one file per record (`spec/20 §4.1`).

An owner keeps its files alive by setting their modification time; a file that is older than the TTL belongs to a dead owner.
Everything here is synchronous file I/O for the worker thread (`stator.discovery.file_keeper`); `now` is wall-clock seconds.
"""

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from random import Random

import msgspec

from stator.discovery.file_names import file_name, is_temporary, read_file_name, temporary_name
from stator.errors import PeerProtocolError
from stator.protocol.records import Record, RecordKey, decode_record, encode_record

__all__ = ["RecordDirectory"]

logger = logging.getLogger(__name__)

_MAX_RECORD = 4 * 2**20
"""bytes of a record; a longer file is not read"""
_TRIES = 16
"""temporary names tried before giving up"""


class _Own(msgspec.Struct):
    """A record of ours, which is to be there whatever happens to its file."""

    record: Record
    touched: float
    restored: float = float("-inf")


class _Seen(msgspec.Struct):
    """A file of somebody else, as last looked at. `record` is None until the content made sense once."""

    record: Record | None
    mtime: float
    inode: int
    size: int
    failures: int = 0
    """reads since the content made sense last"""
    orphaned: bool = False
    """the file went together with its directory; its owner has until the TTL to write it again"""


class RecordDirectory:
    """The files of one bucket: ours, and what we know of those of others.

    `changes` collects what a reader must be told (None: gone) until somebody takes it. Methods raise OSError when the directory
    as a whole cannot be used; what is known stays as it was then.
    """

    def __init__(self, root: str, bucket: str, *, ttl: float, random: Random) -> None:
        self.bucket = bucket
        self.path = os.path.join(root, bucket)
        self.changes: dict[RecordKey, Record | None] = {}
        self._root = root
        self._ttl = ttl
        self._random = random
        self._identity: tuple[int, int] | None = None
        self._own: dict[str, _Own] = {}
        self._seen: dict[str, _Seen] = {}

    # What is known

    def records(self) -> Iterator[Record]:
        """The records of living owners, ours included."""
        yield from (own.record for own in self._own.values())
        yield from (seen.record for seen in self._seen.values() if seen.record is not None)

    def last_seen(self) -> dict[RecordKey, float]:
        """When each record's file was touched last."""
        touched = {own.record.key: own.touched for own in self._own.values()}
        return touched | {seen.record.key: seen.mtime for seen in self._seen.values() if seen.record is not None}

    def owns(self, key: RecordKey) -> bool:
        """Whether we registered `key`."""
        own = self._own.get(file_name(key))
        return own is not None and own.record.key == key

    @property
    def own_keys(self) -> list[RecordKey]:
        """The keys we registered."""
        return [own.record.key for own in self._own.values()]

    def knows(self, name: str) -> bool:
        """Whether a file of this name was there at the last look."""
        return name in self._seen or name in self._own

    def next_expiry(self) -> float | None:
        """When the first owner will have been silent for the TTL, as known so far."""
        return min((seen.mtime for seen in self._seen.values()), default=float("inf")) + self._ttl if self._seen else None

    @property
    def doubtful(self) -> bool:
        """Whether a file made no sense at its only look, so that it may have been caught half-written."""
        return any(seen.failures == 1 for seen in self._seen.values())

    # The directory

    def make(self) -> tuple[int, int]:
        """Make the directory if it is missing; the answer identifies it. What we create only we can enter."""
        path = self._root
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            for part in self.bucket.split("/"):
                path = os.path.join(path, part)
                os.makedirs(path, mode=0o700, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from error
        found = os.stat(path)
        return (found.st_dev, found.st_ino)

    def settle(self) -> bool:
        """Look whether the directory is the one we knew, and know it from now on; True: it is another one."""
        identity = self.make()
        replaced = identity != self._identity
        self._identity = identity
        return replaced

    def lose(self) -> None:
        """The directory is gone: whatever is found under its path is another one."""
        self._identity = None

    # Our files

    def create(self, record: Record, now: float) -> None:
        """Publish a record as ours; FileExistsError when a living owner has its key."""
        name = file_name(record.key)
        self.make()
        self._publish(name, encode_record(record), now)
        self._own[name] = _Own(record=record, touched=now)
        self._seen.pop(name, None)
        self.changes[record.key] = record

    def withdraw(self, key: RecordKey) -> None:
        """Remove a record of ours. It is not ours any more even if the file cannot be removed (OSError)."""
        name = file_name(key)
        del self._own[name]
        self.changes[key] = None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._at(name))

    def touch(self, now: float) -> None:
        """Give a sign of life for every record of ours, as far as possible. A file that is missing is written again."""
        failure: OSError | None = None
        for name, own in self._own.items():
            try:
                self._touch(name, own, now)
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure

    def _touch(self, name: str, own: _Own, now: float) -> None:
        try:
            os.utime(self._at(name), (now, now))
        except FileNotFoundError:
            self._restore(name, own, now)
        own.touched = now

    def _restore(self, name: str, own: _Own, now: float) -> None:
        self.make()
        with contextlib.suppress(FileExistsError):
            self._publish(name, encode_record(own.record), now)
        own.restored = now
        logger.warning("record %s was removed by another process; it is registered again", own.record.key)

    def _publish(self, name: str, data: bytes, now: float) -> None:
        """Let the complete file appear under `name` at once; FileExistsError when a living owner's file is there."""
        temporary = self._write_temporary(data, now)
        try:
            try:
                os.link(temporary, self._at(name))
            except FileExistsError:
                if now - os.lstat(self._at(name)).st_mtime <= self._ttl:
                    raise
                os.rename(temporary, self._at(name))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def _write_temporary(self, data: bytes, now: float) -> str:
        path, descriptor = self._open_temporary()
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.utime(descriptor, (now, now))
        except BaseException:
            os.unlink(path)
            raise
        return path

    def _open_temporary(self) -> tuple[str, int]:
        for _ in range(_TRIES):
            path = self._at(temporary_name(self._random))
            with contextlib.suppress(FileExistsError):
                return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        raise OSError(errno.EAGAIN, "no free temporary name", self.path)

    # The files of others

    def scan(self, now: float, *, patient: bool, replaced: bool) -> None:
        """Look at every file, and write those of ours again that are missing.

        `replaced`: the directory is not the one of the last scan, so a missing file says nothing about its owner yet.
        `patient`: we cannot judge who is silent (we did not run ourselves): nobody listed is declared dead, nothing is removed.
        """
        names = set(os.listdir(self.path))
        for name in names:
            self.look(name, now, patient=patient)
        for name in self._seen.keys() - names:
            seen = self._seen[name]
            seen.orphaned |= replaced
            if not (seen.orphaned and (patient or now - seen.mtime <= self._ttl)):
                self._forget(name)
        for name in self._own.keys() - names:
            own = self._own[name]
            if abs(now - own.restored) >= self._ttl / 3:  # else somebody fights us, and the next touch is soon enough
                self._restore(name, own, now)

    def look(self, name: str, now: float, *, patient: bool) -> None:
        """Bring what we know of one file up to date."""
        if name in self._own:
            return
        try:
            found = os.lstat(self._at(name))
        except FileNotFoundError:
            self._forget(name)
            return
        if not stat.S_ISREG(found.st_mode):
            self._forget(name)
        elif now - found.st_mtime > self._ttl and not (patient and self._is_listed(name)):
            self._forget(name)
            if not patient:
                self._remove_leftover(name)
        elif not is_temporary(name):
            self._read(name, found)

    def _is_listed(self, name: str) -> bool:
        seen = self._seen.get(name)
        return seen is not None and seen.record is not None

    def _remove_leftover(self, name: str) -> None:
        """Remove the file of a dead owner. Not being allowed to is no harm: it stays hidden."""
        with contextlib.suppress(OSError):
            os.unlink(self._at(name))

    def _forget(self, name: str) -> None:
        seen = self._seen.pop(name, None)
        if seen is not None and seen.record is not None:
            self.changes[seen.record.key] = None

    def _read(self, name: str, found: os.stat_result) -> None:
        """Read the file unless its content is known already. Content that makes no sense leaves the previous record."""
        seen = self._seen.get(name)
        touched = seen is None or found.st_mtime != seen.mtime
        rewritten = seen is None or (found.st_ino, found.st_size) != (seen.inode, seen.size)
        if seen is None:
            seen = self._seen[name] = _Seen(record=None, mtime=0.0, inode=0, size=0)
        seen.mtime, seen.inode, seen.size, seen.orphaned = found.st_mtime, found.st_ino, found.st_size, False
        if rewritten or seen.failures == 1 or (seen.failures and touched):
            self._parse(name, seen)

    def _parse(self, name: str, seen: _Seen) -> None:
        try:
            key = read_file_name(self.bucket, name)
            record = decode_record(self._content(name))
            if record.key != key:
                raise PeerProtocolError(f"its content belongs under {record.key}")
        except FileNotFoundError:
            self._forget(name)
            return
        except Exception as error:  # anybody may write here, and nothing they write may stop us
            seen.failures += 1
            if seen.failures == 2:  # the first look may have come before the writer was done
                logger.warning("ignored file %r in %s: %s", name, self.path, error)
            return
        seen.failures = 0
        if record != seen.record:
            seen.record = record
            self.changes[record.key] = record

    def _content(self, name: str) -> bytes:
        descriptor = os.open(self._at(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            data = file.read(_MAX_RECORD + 1) or b""
        if len(data) > _MAX_RECORD:
            raise PeerProtocolError(f"it is longer than {_MAX_RECORD} bytes")
        return data

    def _at(self, name: str) -> str:
        return os.path.join(self.path, name)
