"""The messages of etcd's JSON gateway: bytes are base64, whole numbers are texts, what has its default is absent.

Numbers are read in msgspec's lax mode, which takes both texts and numbers. Only the fields we use are named.
"""

from typing import Any

import msgspec

__all__ = [
    "Authenticated",
    "Header",
    "KeptAlive",
    "KeyValue",
    "LeaseAnswer",
    "LeaseLife",
    "Problem",
    "RangeAnswer",
    "TxnAnswer",
    "WatchAnswer",
    "WatchLine",
    "prefix_range",
]


class Header(msgspec.Struct, frozen=True):
    """What every answer begins with."""

    cluster_id: int = 0
    revision: int = 0
    """of the whole store, when the request was applied"""


class KeyValue(msgspec.Struct, frozen=True):
    """A key as it is stored. In a deletion only `key` and `mod_revision` are set."""

    key: bytes = b""
    value: bytes = b""
    mod_revision: int = 0
    lease: int = 0


class RangeAnswer(msgspec.Struct):
    """`/v3/kv/range`: keys in order. `count` is of all keys in the range, whatever was left out of `kvs`."""

    header: Header = Header()
    kvs: list[KeyValue] = []
    more: bool = False
    count: int = 0


class TxnPart(msgspec.Struct):
    """One answer inside a transaction's; only that of a range is looked at."""

    response_range: RangeAnswer | None = None


class TxnAnswer(msgspec.Struct):
    """`/v3/kv/txn`."""

    header: Header = Header()
    succeeded: bool = False
    responses: list[TxnPart] = []


class LeaseAnswer(msgspec.Struct):
    """`/v3/lease/grant`, and a line of `/v3/lease/keepalive`: there no TTL means that the lease is gone."""

    header: Header = Header()
    TTL: int = 0


class LeaseLife(msgspec.Struct):
    """`/v3/lease/timetolive`. `TTL` is what is left in seconds; -1: there is no such lease."""

    header: Header = Header()
    TTL: int = 0
    grantedTTL: int = 0
    keys: list[bytes] = []


class Authenticated(msgspec.Struct):
    """`/v3/auth/authenticate`."""

    token: str = ""


class Problem(msgspec.Struct):
    """Why etcd refuses: gRPC's code, and a text for people. Its streams call the code `grpc_code`."""

    code: int = 0
    grpc_code: int = 0
    message: str = ""
    error: Any = None
    """the text as well, or all of this again"""

    @property
    def number(self) -> int:
        """gRPC's code, wherever it is."""
        return self.code or self.grpc_code


class KeptAlive(msgspec.Struct):
    """A line of `/v3/lease/keepalive`."""

    result: LeaseAnswer | None = None
    error: Problem | None = None


class WatchEvent(msgspec.Struct, frozen=True):
    """`PUT` or `DELETE` of a key."""

    kv: KeyValue
    type: str = "PUT"


class WatchAnswer(msgspec.Struct):
    """A message of a watch. Without events it says how far the watch has come (`created`, progress), or why it ends."""

    header: Header = Header()
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    """not 0: what was asked for has been compacted away; the first revision that is still there"""
    cancel_reason: str = ""
    events: list[WatchEvent] = []


class WatchLine(msgspec.Struct):
    """A line of `/v3/watch`."""

    result: WatchAnswer | None = None
    error: Problem | None = None


def prefix_range(prefix: bytes) -> dict[str, bytes]:
    """The fields `key` and `range_end` of a request for all keys that begin with `prefix`, which ends in a slash."""
    return {"key": prefix, "range_end": prefix[:-1] + bytes((prefix[-1] + 1,))}
