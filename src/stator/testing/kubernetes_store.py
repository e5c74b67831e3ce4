"""What an API server remembers: objects, versions, and the last changes, for those who watch."""

import asyncio
import itertools
import json
from collections import deque
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import msgspec

__all__ = ["RESOURCES", "Change", "KubernetesStore", "Resource", "matches"]

Object = dict[str, Any]


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of objects, all of them in namespaces."""

    group: str
    version: str
    kind: str
    plural: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


METADATA = Resource(group="nvidia.com", version="v1alpha1", kind="DynamoWorkerMetadata", plural="dynamoworkermetadatas")
SLICES = Resource(group="discovery.k8s.io", version="v1", kind="EndpointSlice", plural="endpointslices")
PODS = Resource(group="", version="v1", kind="Pod", plural="pods")
RESOURCES = (METADATA, SLICES, PODS)

Key = tuple[str, str, str]
"""plural, namespace, name"""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the history."""

    type: str
    """ADDED, MODIFIED or DELETED"""
    plural: str
    namespace: str
    revision: int
    labels: dict[str, str]
    labels_before: dict[str, str] | None
    data: bytes
    """the object"""


class KubernetesStore:
    """Objects by kind, namespace and name. Every change has a revision, which is the object's `resourceVersion`."""

    def __init__(self, *, history: int = 20_000) -> None:
        self.objects: dict[Key, Object] = {}
        self.managers: dict[Key, dict[str, frozenset[tuple[str, ...]]]] = {}
        self.revision = 1000
        self.compacted = 1000
        """changes up to this revision are forgotten"""
        self._history = history
        self._log: deque[Change] = deque()
        self._uids = itertools.count(1)
        self._owned: dict[str, set[Key]] = {}
        """uid of an owner → what it owns"""
        self._changed = asyncio.Event()

    # -- reading

    def select(self, plural: str, namespace: str, selector: str = "") -> list[Object]:
        """The objects of one kind in one namespace, by name."""
        return [
            self.objects[key]
            for key in sorted(self.objects)
            if key[:2] == (plural, namespace) and matches(selector, labels_of(self.objects[key]))
        ]

    def since(self, revision: int) -> list[Change] | None:
        """What happened after `revision`; None when that is not known any more."""
        if revision < self.compacted:
            return None
        found: list[Change] = []
        for change in reversed(self._log):
            if change.revision <= revision:
                break
            found.append(change)
        found.reverse()
        return found

    async def changed(self) -> None:
        """Wait for the next change."""
        await self._changed.wait()

    # -- writing

    def put(self, resource: Resource, namespace: str, object: Object) -> Object:
        """Create or replace; an object that stays as it was keeps its version. The answer is the object as stored."""
        name = object["metadata"]["name"]
        key = (resource.plural, namespace, name)
        before = self.objects.get(key)
        stored = as_stored(object)
        metadata = stored["metadata"]
        stored = {"apiVersion": resource.api_version, "kind": resource.kind, **stored, "metadata": metadata}
        metadata["namespace"] = namespace
        metadata["uid"] = before["metadata"]["uid"] if before else metadata.get("uid") or f"uid-{next(self._uids):06d}"
        metadata["resourceVersion"] = before["metadata"]["resourceVersion"] if before else ""
        if before is not None and before == stored:
            return before
        metadata["resourceVersion"] = str(self.revision + 1)
        self.objects[key] = stored
        for uid in owners_of(stored):
            self._owned.setdefault(uid, set()).add(key)
        self._record("MODIFIED" if before else "ADDED", resource.plural, namespace, stored, before)
        return stored

    def delete(self, plural: str, namespace: str, name: str) -> Object | None:
        """Delete, and with it everything that it owns. None: it was not there."""
        object = self.objects.pop((plural, namespace, name), None)
        self.managers.pop((plural, namespace, name), None)
        if object is None:
            return None
        gone = deepcopy(object)
        gone["metadata"]["resourceVersion"] = str(self.revision + 1)
        self._record("DELETED", plural, namespace, gone, object)
        uid = object["metadata"]["uid"]
        for key in sorted(self._owned.pop(uid, ())):
            if key in self.objects and owners_of(self.objects[key]) == [uid]:
                self.delete(*key)
        return object

    def compact(self) -> None:
        """Forget the history: nobody can resume a watch from before."""
        self._log.clear()
        self.compacted = self.revision

    def empty(self) -> None:
        """Lose everything, as a server restored from nothing: versions start again."""
        self.objects.clear()
        self.managers.clear()
        self._owned.clear()
        self._log.clear()
        self.revision = self.compacted = 1000

    def _record(self, type: str, plural: str, namespace: str, object: Object, before: Object | None) -> None:
        self.revision += 1
        self._log.append(
            Change(
                type=type,
                plural=plural,
                namespace=namespace,
                revision=self.revision,
                labels=labels_of(object),
                labels_before=labels_of(before) if before is not None else None,
                data=json.dumps(object, separators=(",", ":")).encode(),
            )
        )
        while len(self._log) > self._history:
            self.compacted = self._log.popleft().revision
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def labels_of(object: Object) -> dict[str, str]:
    """Its labels."""
    return object["metadata"].get("labels") or {}


def owners_of(object: Object) -> list[str]:
    """The uids of its owners."""
    return [str(owner.get("uid")) for owner in object["metadata"].get("ownerReferences") or ()]


def matches(selector: str, labels: Mapping[str, str]) -> bool:
    """Whether labels satisfy a selector of the forms `a=b`, `a==b`, `a!=b`, `a`, joined by commas."""
    return all(_satisfies(part, labels) for part in filter(None, selector.split(",")))


def _satisfies(part: str, labels: Mapping[str, str]) -> bool:
    if "!=" in part:
        name, value = part.split("!=", 1)
        return labels.get(name.strip()) != value.strip()
    if "=" in part:
        name, value = part.split("=", 1)
        return labels.get(name.strip()) == value.removeprefix("=").strip()
    return part.strip() in labels


def as_stored(value: Any) -> Any:
    """A deep copy in which integers beyond 64 signed bits are doubles, which is all that API servers keep of them."""
    if isinstance(value, dict):
        return {key: as_stored(inner) for key, inner in _items(value)}
    if isinstance(value, list):
        return [as_stored(inner) for inner in _elements(value)]
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return float(value)
    return value


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items()


def _elements(value: Any) -> Iterable[Any]:
    return value
