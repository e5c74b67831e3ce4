"""The API keys in force: found by what a request presents, and read again when their file changes."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from stator.clock import Clock
from stator.errors import ConfigError
from stator.frontend.errors import Rejected, unauthorized
from stator.frontend.file_watch import FileWatch
from stator.frontend.key_account import KeyAccount
from stator.frontend.key_file import KeyRecord, permission_problem, read_keys
from stator.frontend.key_metrics import KeyMetrics
from stator.frontend.presented_key import presented_key
from stator.security.key_hashes import KeyIndex

__all__ = ["KeyRing"]

logger = logging.getLogger(__name__)

_QUIET = 10.0
"""seconds between two lines of the log that say that requests had no good key"""


class KeyRing:
    """All keys of one file. `shares` frontends divide the limits between them."""

    def __init__(self, path: Path, *, clock: Clock, shares: int, metrics: KeyMetrics) -> None:
        self._path = path
        self._clock = clock
        self._shares = shares
        self._metrics = metrics
        self._watch = FileWatch(path)
        self._index: KeyIndex[KeyAccount] = KeyIndex()
        self._accounts: dict[str, KeyAccount] = {}
        self._failures: dict[str, int] = {}
        self._said_at = float("-inf")
        self._complaint = ""

    def __len__(self) -> int:
        return len(self._accounts)

    async def open(self) -> None:
        """Read the file for the first time. Raises `KeyFileError`."""
        await self._watch.mark()
        self.install(await asyncio.to_thread(read_keys, self._path))
        await self._look_at_permissions()
        logger.info("%d API keys of %s in force", len(self), self._path)

    async def follow(self) -> None:
        """Read the file whenever it changed, within a second, until cancelled. While it is wrong the old keys stay in force."""
        while True:
            await self._watch.changed()
            try:
                records = await asyncio.to_thread(read_keys, self._path)
            except ConfigError as error:
                self._metrics.reloads.labels("failed").inc()
                logger.warning("%s; the keys read before stay in force", error.message)
                continue
            gone = self.install(records)
            self._metrics.reloads.labels("ok").inc()
            logger.info("%s changed: %d API keys in force, %d gone", self._path, len(self), gone)
            await self._look_at_permissions()

    def install(self, records: Sequence[KeyRecord]) -> int:
        """These are the keys from now on; how many are gone. A key that stays keeps what it has used; running requests go on."""
        now, old = self._clock.monotonic(), self._accounts
        gone = old.keys() - {record.name for record in records}
        self._metrics.forget(gone)
        accounts: dict[str, KeyAccount] = {}
        for record in records:
            account = old.get(record.name)
            if account is None:
                counters = self._metrics.of(record.name)
                account = KeyAccount(record, shares=self._shares, counters=counters, now=now)
            else:
                account.change(record, now)
            accounts[record.name] = account
        self._accounts = accounts
        self._index = KeyIndex((account.record.digest, account) for account in accounts.values())
        self._metrics.keys.set(len(accounts))
        return len(gone)

    def account_of(self, headers: Mapping[str, str], peer: str) -> KeyAccount:
        """Whose request it is. Raises `Rejected` with 401; `peer` is where it comes from, for the log."""
        key = presented_key(headers)
        if not key:
            raise self._unauthorized("missing", peer)
        account = self._index.find(key)
        if account is None:
            raise self._unauthorized("invalid", peer)
        expires = account.record.expires
        if expires is not None and self._clock.wall() >= expires:
            raise self._unauthorized("expired", peer)
        return account

    def _unauthorized(self, reason: str, peer: str) -> Rejected:
        """Counted, and told of in the log once in a while: nobody can fill it with wrong keys."""
        self._metrics.failures.labels(reason).inc()
        self._failures[reason] = self._failures.get(reason, 0) + 1
        now = self._clock.monotonic()
        if now - self._said_at >= _QUIET:
            counts = ", ".join(f"{count} {reason}" for reason, count in self._failures.items())
            logger.warning("requests refused for their API key: %s; the last one from %s", counts, peer)
            self._said_at = now
            self._failures.clear()
        return Rejected(unauthorized(reason))

    async def _look_at_permissions(self) -> None:
        """Warn of a file that is too open, once per state of it."""
        complaint = await asyncio.to_thread(permission_problem, self._path)
        if complaint and complaint != self._complaint:
            logger.warning("%s", complaint)
        self._complaint = complaint
