"""What discovery asks of etcd: records under keys that belong to leases (`spec/20 §4.2`). One method is one step there."""

from collections.abc import Container
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec

from stator.discovery.etcd_api import EtcdApi, WatchStream
from stator.discovery.etcd_messages import KeptAlive, KeyValue, LeaseAnswer, LeaseLife, RangeAnswer, TxnAnswer, prefix_range
from stator.discovery.etcd_problem import Refused, Unreachable

__all__ = ["EtcdStore", "Snapshot"]

_PAGE = 1000
"""keys of a range read at once"""


class Snapshot(msgspec.Struct, frozen=True):
    """All keys of a prefix, as they were at one revision of the store."""

    cluster: int
    revision: int
    keys: list[KeyValue]


class EtcdStore:
    """Typed calls. All raise `Refused` and `Unreachable`; after the latter, or cancelled, what was asked may have been done.

    `within` is how many seconds members are asked in turn; without it each is asked once.
    """

    def __init__(self, api: EtcdApi) -> None:
        self._api = api

    # leases

    async def grant(self, lease: int, ttl: int, *, within: float | None = None) -> int:
        """Make a lease of this id; the TTL it got, in seconds, which may be longer. Refused with `ALREADY_THERE` if it exists."""
        body = {"ID": str(lease), "TTL": str(ttl)}
        return (await self._api.call("/v3/lease/grant", body, LeaseAnswer, within=within)).TTL

    async def renew(self, lease: int, *, each: float) -> LeaseAnswer:
        """Give a sign of life; no TTL: there is no such lease any more. `each` bounds the time of each member."""
        line = await self._api.call("/v3/lease/keepalive", {"ID": str(lease)}, KeptAlive, each=each)
        if line.result is None:
            raise Unreachable(f"{self._api.endpoint}: {line.error.message if line.error else 'no answer'}")
        return line.result

    async def life(self, lease: int, *, keys: bool = False) -> LeaseLife:
        """What is left of a lease, and the keys that belong to it."""
        return await self._api.call("/v3/lease/timetolive", {"ID": str(lease), "keys": keys}, LeaseLife)

    async def revoke(self, lease: int, *, within: float | None = None) -> None:
        """End a lease and remove its keys."""
        await self._api.call("/v3/lease/revoke", {"ID": str(lease)}, LeaseAnswer, within=within)

    # keys

    async def create(self, key: bytes, value: bytes, *, lease: int, mine: Container[int], within: float | None = None) -> bool:
        """Write a key that is free, or that belongs to a lease of `mine`; False: somebody else has it.

        So it may be repeated when its answer was lost. Refused with `NOT_FOUND` if the lease is gone.
        """
        put = {"request_put": {"key": key, "value": value, "lease": str(lease)}}
        look = {"request_range": {"key": key}}
        compare: dict[str, Any] = {"target": "VERSION", "version": "0"}
        for _ in range(3):
            answer = await self._txn({"key": key, "result": "EQUAL", **compare}, put, look, within=within)
            if answer.succeeded:
                return True
            found = _first(answer)
            if found is None:  # it was a moment ago
                continue
            if found.lease not in mine:
                return False
            if found.lease == lease and found.value == value:
                return True
            compare = {"target": "MOD", "mod_revision": str(found.mod_revision)}
        return False

    async def delete(self, key: bytes, *, lease: int, within: float | None = None) -> None:
        """Remove a key if it belongs to `lease`."""
        compare = {"key": key, "result": "EQUAL", "target": "LEASE", "lease": str(lease)}
        await self._txn(compare, {"request_delete_range": {"key": key}}, None, within=within)

    async def _txn(
        self, compare: dict[str, Any], success: dict[str, Any], failure: dict[str, Any] | None, *, within: float | None
    ) -> TxnAnswer:
        body = {"compare": [compare], "success": [success], "failure": [failure] if failure else []}
        return await self._api.call("/v3/kv/txn", body, TxnAnswer, within=within)

    # prefixes

    async def read(self, prefix: bytes, *, within: float | None = None) -> Snapshot:
        """All keys that begin with `prefix`, at least as new as the call."""
        fields: dict[str, Any] = {**prefix_range(prefix), "limit": str(_PAGE)}
        answer = await self._api.call("/v3/kv/range", fields, RangeAnswer, within=within)
        cluster, revision, keys = answer.header.cluster_id, answer.header.revision, answer.kvs
        fields["revision"] = str(revision)
        while answer.more and answer.kvs:
            fields["key"] = answer.kvs[-1].key + b"\0"
            try:
                answer = await self._api.call("/v3/kv/range", fields, RangeAnswer, within=within)
            except Refused as error:  # compacted between two pages
                raise Unreachable(f"{error}; it is read again") from error
            keys = keys + answer.kvs
        return Snapshot(cluster, revision, keys)

    async def changed(self, prefix: bytes, *, since: int, count: int) -> tuple[bool, int]:
        """Whether anything below `prefix` changed after revision `since`, when it had `count` keys; and the revision now."""
        fields = {**prefix_range(prefix), "keys_only": True, "min_mod_revision": str(since + 1)}
        answer = await self._api.call("/v3/kv/range", fields, RangeAnswer)
        return bool(answer.kvs) or answer.count != count, answer.header.revision

    def watch_prefix(self, prefix: bytes, *, after: int) -> AbstractAsyncContextManager[WatchStream]:
        """What happens below `prefix` after revision `after`; and how far the store is, when nothing does."""
        return self._api.watch({**prefix_range(prefix), "start_revision": str(after + 1), "progress_notify": True})

    def watch_key(self, key: bytes) -> AbstractAsyncContextManager[WatchStream]:
        """What happens to `key` from now on."""
        return self._api.watch({"key": key})


def _first(answer: TxnAnswer) -> KeyValue | None:
    for part in answer.responses:
        if part.response_range is not None and part.response_range.kvs:
            return part.response_range.kvs[0]
    return None
