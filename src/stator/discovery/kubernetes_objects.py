"""What is read from and written to the API server: lists, events, and the three kinds of objects (`spec/20 §4.4`)."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from stator.discovery.kubernetes_identity import Identity, object_name
from stator.discovery.kubernetes_problem import ApiProblem
from stator.errors import PeerProtocolError
from stator.protocol.records import (
    EndpointRecord,
    EventChannelRecord,
    ModelRecord,
    Record,
    RecordKey,
    decode_record,
    encode_record,
)

__all__ = [
    "Event",
    "Header",
    "Metadata",
    "Page",
    "maps_of",
    "metadata_object",
    "read_event",
    "read_header",
    "read_metadata",
    "read_page",
    "read_pod",
    "read_slice",
]

logger = logging.getLogger(__name__)

BUCKETS: Mapping[str, str] = {
    "endpoints": EndpointRecord.bucket,
    "model_cards": ModelRecord.bucket,
    "event_channels": EventChannelRecord.bucket,
}
"""The maps of a metadata object, and what is in them"""
_MAPS = {bucket: name for name, bucket in BUCKETS.items()}
_UNREADABLE = 500
"""an answer without sense counts as the server's failure: it leads to another list"""


# Lists and events


class Header(msgspec.Struct, frozen=True, rename="camel"):
    """`metadata` of an object, as far as it matters."""

    name: str = ""
    resource_version: str = ""
    uid: str = ""


class _Headed(msgspec.Struct, frozen=True):
    metadata: Header


class _ListHeader(msgspec.Struct, frozen=True, rename={"proceed": "continue", "resource_version": "resourceVersion"}):
    resource_version: str = ""
    proceed: str | None = None


class Page(msgspec.Struct, frozen=True):
    """One answer to a list."""

    metadata: _ListHeader
    items: list[msgspec.Raw] | None = None


class Event(msgspec.Struct, frozen=True):
    """One line of a watch: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR."""

    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct, frozen=True):
    code: int = 0
    message: str = ""


_pages = msgspec.json.Decoder(Page)
_events = msgspec.json.Decoder(Event)
_headed = msgspec.json.Decoder(_Headed)
_statuses = msgspec.json.Decoder(_Status)


def read_page(data: bytes) -> Page:
    """Raises `ApiProblem`."""
    try:
        return _pages.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ApiProblem(f"a list cannot be read: {error}", status=_UNREADABLE) from error


def read_event(line: bytes) -> Event:
    """Raises `ApiProblem`: for what cannot be read, and the server's own problem for an ERROR."""
    try:
        event = _events.decode(line)
        status = _statuses.decode(event.object) if event.type == "ERROR" else None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ApiProblem(f"a watch event cannot be read: {error}", status=_UNREADABLE) from error
    if status is not None:
        raise ApiProblem(f"{status.code} {status.message}", status=status.code or 500)
    return event


def read_header(raw: msgspec.Raw | bytes) -> Header:
    """Raises `ApiProblem`."""
    try:
        return _headed.decode(raw).metadata
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ApiProblem(f"an object cannot be read: {error}", status=_UNREADABLE) from error


# DynamoWorkerMetadata


class Metadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a metadata object says. Of what stopped making sense the last valid content stays."""

    records: dict[RecordKey, Record]
    bad: frozenset[str] = frozenset()
    """what is ignored, so that it is reported once; "" stands for the whole object"""


class _RawMaps(msgspec.Struct, frozen=True):
    endpoints: dict[str, msgspec.Raw] = {}
    model_cards: dict[str, msgspec.Raw] = {}
    event_channels: dict[str, msgspec.Raw] = {}


class _RawSpec(msgspec.Struct, frozen=True):
    data: _RawMaps


class _MetadataObject(msgspec.Struct, frozen=True):
    spec: _RawSpec


_metadata_objects = msgspec.json.Decoder(_MetadataObject)


def read_metadata(raw: msgspec.Raw, previous: Metadata | None) -> Metadata:
    """The records in a metadata object. What makes no sense is reported and replaced by what `previous` had."""
    known = previous or Metadata(records={})
    name = read_header(raw).name
    try:
        data = _metadata_objects.decode(raw).spec.data
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        if "" not in known.bad:
            logger.warning("ignored the content of DynamoWorkerMetadata %s: %s", name, error)
        return Metadata(records=known.records, bad=known.bad | {""})
    records: dict[RecordKey, Record] = {}
    bad: set[str] = set()
    for place, bucket in BUCKETS.items():
        entries: dict[str, msgspec.Raw] = getattr(data, place)
        for path, entry in entries.items():
            try:
                key = RecordKey.parse(bucket, path)
                record: Record | None = None
                try:
                    record = _read_record(key, entry)
                except PeerProtocolError:
                    record = known.records.get(key)
                    raise
                finally:
                    if record is not None:
                        records[key] = record
            except PeerProtocolError as error:
                bad.add(f"{place}/{path}")
                if f"{place}/{path}" not in known.bad:
                    logger.warning("ignored %s of %s in DynamoWorkerMetadata %s: %s", path, place, name, error)
    return Metadata(records=records, bad=frozenset(bad))


def _read_record(key: RecordKey, raw: msgspec.Raw) -> Record:
    try:
        record = decode_record(bytes(raw))
    except PeerProtocolError:
        record = None
    if record is None or record.key != key:
        record = decode_record(_with_exact_id(key, bytes(raw)))
    if record.key != key:
        raise PeerProtocolError(f"its content belongs under {record.key}")
    return record


def _with_exact_id(key: RecordKey, raw: bytes) -> bytes:
    """API servers keep integers beyond 63 bits as doubles; the key has the id in full. Anything else is left alone."""
    try:
        body: Any = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return raw
    if not isinstance(body, dict):
        return raw
    table = cast("dict[str, Any]", body)
    if isinstance(table.get("instance_id"), float) and table["instance_id"] == float(key.id):
        table["instance_id"] = key.id
        return msgspec.json.encode(table)
    return raw


def maps_of(records: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """The three maps of a metadata object, always all of them, ordered by key."""
    maps: dict[str, dict[str, Record]] = {name: {} for name in BUCKETS}
    for record in sorted(records, key=lambda record: record.key):
        maps[_MAPS[record.bucket]][record.key.path] = record
    return maps


def metadata_object(identity: Identity, records: Iterable[Record]) -> bytes:
    """The whole object of this process, as server-side apply takes it. It goes when the pod does."""
    owner = {
        "apiVersion": "v1",
        "blockOwnerDeletion": False,
        "controller": not identity.container,
        "kind": "Pod",
        "name": identity.pod,
        "uid": identity.uid,
    }
    maps = {
        name: {path: msgspec.Raw(encode_record(record)) for path, record in entries.items()}
        for name, entries in maps_of(records).items()
    }
    return msgspec.json.encode(
        {
            "apiVersion": "nvidia.com/v1alpha1",
            "kind": "DynamoWorkerMetadata",
            "metadata": {"name": identity.name, "ownerReferences": [owner]},
            "spec": {"data": maps},
        }
    )


# Readiness


class _Conditions(msgspec.Struct, frozen=True):
    ready: bool | None = None


class _Target(msgspec.Struct, frozen=True):
    kind: str = "Pod"
    name: str = ""


class _SliceEndpoint(msgspec.Struct, frozen=True, rename="camel"):
    conditions: _Conditions | None = None
    target_ref: _Target | None = None


class _Slice(msgspec.Struct, frozen=True):
    endpoints: list[_SliceEndpoint] | None = None


class _ContainerStatus(msgspec.Struct, frozen=True):
    name: str
    ready: bool = False


class _PodStatus(msgspec.Struct, frozen=True, rename="camel"):
    container_statuses: list[_ContainerStatus] | None = None


class _Pod(msgspec.Struct, frozen=True):
    metadata: Header
    status: _PodStatus | None = None


_slices = msgspec.json.Decoder(_Slice)
_pods = msgspec.json.Decoder(_Pod)


def read_slice(raw: msgspec.Raw, previous: frozenset[str] | None) -> frozenset[str]:
    """The metadata objects whose pods an EndpointSlice calls ready; those of before where it makes no sense."""
    try:
        endpoints = _slices.decode(raw).endpoints or ()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        logger.warning("ignored an EndpointSlice: %s", error)
        return previous or frozenset()
    return frozenset(
        endpoint.target_ref.name
        for endpoint in endpoints
        if endpoint.conditions is not None
        and endpoint.conditions.ready is True
        and endpoint.target_ref is not None
        and endpoint.target_ref.kind == "Pod"
    )


def read_pod(raw: msgspec.Raw, previous: frozenset[str] | None) -> frozenset[str]:
    """The metadata objects of a pod's ready containers; those of before where it makes no sense."""
    try:
        pod = _pods.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        logger.warning("ignored a Pod: %s", error)
        return previous or frozenset()
    statuses = (pod.status.container_statuses if pod.status is not None else None) or ()
    return frozenset(object_name(pod.metadata.name, status.name) for status in statuses if status.ready)
