"""Discovery records as the reference writes them, and what cannot be one."""

import json

import pytest

from stator.errors import PeerProtocolError, UsageError
from stator.protocol.ids import EndpointId, endpoint_path, nats_subject, parse_instance_id, slug
from stator.protocol.records import (
    EndpointRecord,
    ModelRecord,
    NativeAddress,
    Query,
    RecordKey,
    Transport,
    decode_record,
    encode_record,
)
from stator.testing.recorded import recorded

FIELDS = {"component": "b", "endpoint": "g", "namespace": "n", "instance_id": 10, "transport": {"tcp": "127.0.0.1:1/a/g"}}


@pytest.mark.parametrize("name", ["50-instance-tcp.json", "51-instance-nats.json", "52-instance-tcp-1.6.1.json"])
def test_recorded_instances_are_read_and_written_to_the_byte(name: str) -> None:
    data = recorded(name).rstrip(b"\n")
    assert encode_record(decode_record(data)) == data


def test_our_field_is_one_more_field_to_others() -> None:
    native = NativeAddress(plane=1, address="127.0.0.1:5", process="a" * 32)
    record = EndpointRecord(
        component="b", endpoint="g", namespace="n", instance_id=2**64 - 1, transport=Transport(tcp="x"), stator=native
    )
    plain = json.loads(encode_record(record))
    assert plain.pop("stator") == {"plane": 1, "address": "127.0.0.1:5", "process": "a" * 32}
    assert list(plain) == ["type", "component", "endpoint", "namespace", "instance_id", "transport", "device_type"]
    assert decode_record(encode_record(record)) == record


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"type":"Endpoint"}',
        b'{"type":"Other"}',
        json.dumps({"type": "Endpoint", **FIELDS, "instance_id": 2**64}).encode(),
        json.dumps({"type": "Endpoint", **FIELDS, "instance_id": -1}).encode(),
        json.dumps({"type": "Endpoint", **FIELDS, "instance_id": 1.5}).encode(),
        b'{"type":"Model","card_json":' + b'{"a":' * 100_000,
    ],
)
def test_what_is_no_record_is_a_peer_protocol_error(data: bytes) -> None:
    with pytest.raises(PeerProtocolError, match="cannot be read"):
        decode_record(data)


def test_keys_are_read_back() -> None:
    record = decode_record(json.dumps({"type": "Endpoint", **FIELDS}).encode())
    assert str(record.key) == "v1/instances/n/b/g/a"
    assert RecordKey.parse("v1/instances", "n/b/g/a") == record.key
    assert RecordKey.parse("v1/mdc", "n/b/g/a/lora") == RecordKey(ModelRecord.bucket, ("n", "b", "g"), 10, "lora")
    assert RecordKey.parse("v1/event_channels", "demo//kv_metrics/c4e8").segments == ("demo", "", "kv_metrics")
    for bad in ("", "n", "n/b/g/xyz", "n/b/g/", "n/b/g/-1", "n/b/g/1_0", "n/b/g/" + "f" * 17):
        with pytest.raises(PeerProtocolError):
            RecordKey.parse("v1/instances", bad)


def test_queries_match_whole_segments_only() -> None:
    key = RecordKey("v1/instances", ("demo", "backend", "generate2"), 1)
    assert Query("v1/instances").matches(key)
    assert Query("v1/instances", ("demo", "backend")).matches(key)
    assert not Query("v1/instances", ("demo", "backend", "generate")).matches(key)
    assert not Query("v1/instances", ("dem",)).matches(key)
    assert not Query("v1/mdc", ("demo",)).matches(key)


def test_names_and_paths() -> None:
    id = EndpointId.parse("dyn://outer.inner.backend.generate")
    assert (id.namespace, id.component, id.name, id.url) == (
        "outer.inner",
        "backend",
        "generate",
        "dyn://outer.inner.backend.generate",
    )
    assert endpoint_path(0x123, "generate") == "123/generate"
    assert nats_subject(EndpointId("my-ns", "be_1", "gen"), 0x8CE1) == "my-ns_be_1.gen-8ce1"
    assert slug("/models/tiny") == "models_tiny"
    assert slug("my/Model-Name_1.0") == "my_model-name_1_0"
    for bad in ("generate", "a.b", "a..b.c", ".a.b.c", "a.b.", "a/x.b.c", "a.b.c/d", ""):
        with pytest.raises(UsageError):
            EndpointId.parse(bad)
    assert parse_instance_id("FFFFFFFFFFFFFFFF") == 2**64 - 1
