"""A watch as an API server serves it: changes since a version, bookmarks, a time limit, and what can go wrong on the way."""

import asyncio
import json
from typing import Any

import msgspec
from aiohttp import web

from stator.testing.kubernetes_store import Change, KubernetesStore, Resource, matches

__all__ = ["Call", "Refused", "WatchState", "Watcher"]

Object = dict[str, Any]

_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    410: "Expired",
    413: "RequestEntityTooLarge",
    415: "UnsupportedMediaType",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for, in the words of a Role."""

    verb: str
    group: str
    plural: str
    namespace: str
    name: str
    query: dict[str, str]

    @property
    def right(self) -> tuple[str, str, str]:
        """API group, resource and verb."""
        return self.group, self.plural, self.verb


class Refused(Exception):
    """A request that ends with a `Status`."""

    def __init__(self, code: int, message: str, *, retry_after: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after
        self.reason = reason or _REASONS.get(code, "Unknown")

    def status(self) -> Object:
        """The object that says so."""
        details = {"retryAfterSeconds": self.retry_after} if self.retry_after else {}
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": str(self),
            "reason": self.reason,
            "details": details,
            "code": self.code,
        }


class WatchState(msgspec.Struct, kw_only=True):
    """How the watches of a server behave. Tests change it."""

    bookmarks: float
    """seconds between two of them"""
    open: int = 0
    """watches that are open"""
    stalled: bool = False
    """they say nothing any more, bookmarks included"""
    ended: int = 0
    """counts up: those that are open end"""
    expired: int = 0
    """counts up: those that are open are told 410 Gone"""


class Watcher:
    """One watch, as seen from the server."""

    def __init__(
        self, store: KubernetesStore, state: WatchState, resource: Resource, call: Call, response: web.StreamResponse
    ) -> None:
        self._store = store
        self._state = state
        self._resource = resource
        self._call = call
        self._response = response
        self._selector = call.query.get("labelSelector", "")

    async def run(self, revision: int) -> None:
        """Tell what happened after `revision`; 0: also what is there."""
        store, state, query = self._store, self._state, self._call.query
        loop = asyncio.get_running_loop()
        end = loop.time() + float(query.get("timeoutSeconds", "1800"))
        ended, expired = state.ended, state.expired
        bookmark = loop.time() + state.bookmarks if query.get("allowWatchBookmarks") == "true" else float("inf")
        if revision == 0:
            revision = store.revision
            for object in store.select(self._call.plural, self._call.namespace, self._selector):
                await self._send("ADDED", json.dumps(object).encode())
        while loop.time() < end or state.stalled:
            if state.ended != ended:
                return
            changes = [] if state.stalled else store.since(revision)
            if changes is None or state.expired != expired:
                await self._send_expired(revision)
                return
            for change in changes:
                revision = change.revision
                if type := self._type(change):
                    await self._send(type, change.data)
            if loop.time() >= bookmark and not state.stalled:
                bookmark = loop.time() + state.bookmarks
                await self._send_bookmark(revision)
            await self._wait(min(end, bookmark) - loop.time())

    async def _wait(self, seconds: float) -> None:
        """Until something changed; at most `seconds`, and never for so long that a fault is noticed late."""
        try:
            async with asyncio.timeout(max(0.01, min(seconds, 0.05))):
                await self._store.changed()
        except TimeoutError:
            pass

    def _type(self, change: Change) -> str:
        """What the change is to this watch: an object whose labels fit no more is gone."""
        if (change.plural, change.namespace) != (self._call.plural, self._call.namespace):
            return ""
        before = change.labels_before is not None and matches(self._selector, change.labels_before)
        after = change.type != "DELETED" and matches(self._selector, change.labels)
        return {(False, True): "ADDED", (True, True): "MODIFIED", (True, False): "DELETED"}.get((before, after), "")

    async def _send(self, type: str, object: bytes) -> None:
        await self._response.write(b'{"type":"%s","object":%s}\n' % (type.encode(), object))

    async def _send_bookmark(self, revision: int) -> None:
        object = {
            "kind": self._resource.kind,
            "apiVersion": self._resource.api_version,
            "metadata": {"resourceVersion": str(revision), "creationTimestamp": None},
        }
        await self._send("BOOKMARK", json.dumps(object).encode())

    async def _send_expired(self, revision: int) -> None:
        refused = Refused(410, f"too old resource version: {revision} ({self._store.revision})")
        await self._send("ERROR", json.dumps(refused.status()).encode())
