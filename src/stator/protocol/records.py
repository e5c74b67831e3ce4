"""Discovery records: what is written under which key (`spec/20 §2–3`).

A record is one compact JSON object tagged by `type`. Readers ignore fields they do not know; Stator adds one field of its own,
`stator`, to endpoint records (`docs/native-plane.md`). Key and body always agree.
"""

from typing import Any

import msgspec

from stator.errors import PeerProtocolError, UsageError
from stator.protocol.ids import EndpointId, format_instance_id, parse_instance_id

__all__ = [
    "EndpointRecord",
    "EventChannelRecord",
    "EventTransport",
    "ModelRecord",
    "NativeAddress",
    "Query",
    "Record",
    "RecordKey",
    "Transport",
    "decode_record",
    "encode_record",
]


class Transport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where the instance takes requests of the compatible planes: exactly one of the fields is set."""

    tcp: str | None = None
    """`host:port/{hex}/{endpoint}`"""
    nats_tcp: str | None = None
    """a NATS subject"""
    http: str | None = None
    """a URL; 1.2.1 and this runtime know it, 1.3.1 skips a record that has it"""


class NativeAddress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The `stator` field: where and by whom the native plane is spoken (`docs/native-plane.md §2`), and what only Stator does besides."""

    plane: int
    """version of the native plane; 0: it is not spoken here, and `address` is empty"""
    address: str
    """`host:port`"""
    process: str
    """random id of the process, 32 hex digits; HELLO must repeat it"""
    pulse: str = ""
    """`host:port` of the pulse thread"""
    path: str = ""
    """Unix socket, for clients on the same host"""
    http2: int = 0
    """version of the streams that `transport.http` answers with; 0: its answers call home (`docs/http2-plane.md §2`)"""


class RecordKey(msgspec.Struct, frozen=True, order=True):
    """`{bucket}/{segments…}/{id in hex}[/{suffix}]`."""

    bucket: str
    segments: tuple[str, ...]
    id: int
    suffix: str = ""

    @property
    def path(self) -> str:
        """The key below its bucket."""
        parts = (*self.segments, format_instance_id(self.id))
        return "/".join((*parts, self.suffix) if self.suffix else parts)

    def __str__(self) -> str:
        return f"{self.bucket}/{self.path}"

    @classmethod
    def parse(cls, bucket: str, path: str) -> "RecordKey":
        """Read a key below `bucket`; `PeerProtocolError` if its id is not hex or parts are missing."""
        parts = path.split("/")
        suffix = parts.pop() if bucket == ModelRecord.bucket and len(parts) == 5 else ""
        if len(parts) < 2:
            raise PeerProtocolError(f"discovery key {bucket}/{path} has too few parts")
        try:
            return cls(bucket, tuple(parts[:-1]), parse_instance_id(parts[-1]), suffix)
        except Exception as error:
            raise PeerProtocolError(f"discovery key {bucket}/{path} does not end in an instance id") from error


class EndpointRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="Endpoint"):
    """One instance of one endpoint. Field order is the reference's."""

    component: str
    endpoint: str
    namespace: str
    instance_id: int
    transport: Transport
    device_type: str | None = None
    request_plane_codec: str | msgspec.UnsetType = msgspec.UNSET
    stator: NativeAddress | msgspec.UnsetType = msgspec.UNSET

    bucket = "v1/instances"

    @property
    def endpoint_id(self) -> EndpointId:
        return EndpointId(self.namespace, self.component, self.endpoint)

    @property
    def key(self) -> RecordKey:
        return RecordKey(self.bucket, (self.namespace, self.component, self.endpoint), self.instance_id)


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="Model"):
    """A model card published by an instance; `card_json` is typed by `stator.llm.card`."""

    namespace: str
    component: str
    endpoint: str
    instance_id: int
    card_json: dict[str, Any]
    model_suffix: str | msgspec.UnsetType = msgspec.UNSET

    bucket = "v1/mdc"

    @property
    def endpoint_id(self) -> EndpointId:
        return EndpointId(self.namespace, self.component, self.endpoint)

    @property
    def key(self) -> RecordKey:
        suffix = "" if self.model_suffix is msgspec.UNSET else self.model_suffix
        return RecordKey(self.bucket, (self.namespace, self.component, self.endpoint), self.instance_id, suffix)


class EventTransport(msgspec.Struct, frozen=True, kw_only=True):
    """`kind` is `Zmq`, `Nats` or `ZmqBroker`; `config` depends on it."""

    kind: str
    config: dict[str, Any]


class EventChannelRecord(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="EventChannel"):
    """One publisher of one topic; `component` is empty for a channel of the whole namespace."""

    namespace: str
    component: str
    topic: str
    instance_id: int
    transport: EventTransport

    bucket = "v1/event_channels"

    @property
    def key(self) -> RecordKey:
        return RecordKey(self.bucket, (self.namespace, self.component, self.topic), self.instance_id)


Record = EndpointRecord | ModelRecord | EventChannelRecord


class Query(msgspec.Struct, frozen=True):
    """Which records: all of a bucket, or those whose first key segments are exactly `segments` (never a string prefix)."""

    bucket: str
    segments: tuple[str, ...] = ()

    def matches(self, key: RecordKey) -> bool:
        return key.bucket == self.bucket and key.segments[: len(self.segments)] == self.segments


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode_record(record: Record) -> bytes:
    """Compact JSON as the reference writes it."""
    return _encoder.encode(record)


def decode_record(data: bytes) -> Record:
    """Read a record; `PeerProtocolError` says what does not fit. Unknown fields are ignored."""
    try:
        record = _decoder.decode(data)
        format_instance_id(record.instance_id)
        return record
    except (msgspec.MsgspecError, ValueError, RecursionError, UsageError) as error:
        raise PeerProtocolError(f"discovery record cannot be read: {error}") from error
