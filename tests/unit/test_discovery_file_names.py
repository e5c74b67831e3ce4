"""File names are the reference's, byte for byte."""

from random import Random

import pytest

from stator.discovery.file_names import file_name, is_temporary, read_file_name, temporary_name
from stator.errors import PeerProtocolError, UsageError
from stator.protocol.records import RecordKey

INSTANCES, MODELS, CHANNELS = "v1/instances", "v1/mdc", "v1/event_channels"

CAPTURED = [
    (INSTANCES, ("demo-ns", "my_comp", "gen-x"), 0xFB3126A17E7EAAFB, "", "demo%2Dns%2Fmy%5Fcomp%2Fgen%2Dx%2Ffb3126a17e7eaafb"),
    (CHANNELS, ("demo", "", "kv_metrics"), 0xC4E869BD7F6B97C3, "", "demo%2F%2Fkv%5Fmetrics%2Fc4e869bd7f6b97c3"),
    (MODELS, ("demo", "backend", "generate"), 1, "my_lora-a_1", "demo%2Fbackend%2Fgenerate%2F1%2Fmy%5Flora%2Da%5F1"),
    (INSTANCES, ("a.b", "C D", "é"), 0, "", "a%2Eb%2FC%20D%2F%C3%A9%2F0"),
]


@pytest.mark.parametrize(("bucket", "segments", "instance", "suffix", "name"), CAPTURED)
def test_names(bucket: str, segments: tuple[str, ...], instance: int, suffix: str, name: str) -> None:
    key = RecordKey(bucket, segments, instance, suffix)
    assert file_name(key) == name
    assert read_file_name(bucket, name) == key


@pytest.mark.parametrize(
    "name",
    [
        "",
        "README",
        "demo",
        "demo%2Fbackend%2Fgenerate%2Fnothex",
        "demo%2Fbackend%2Fgenerate%2F10000000000000000",
        "demo%2fbackend%2fgenerate%2f1",
        "demo%2Fbackend%2Fgenerate%2F01",
        "demo%2Fbackend%2Fgen.erate%2F1",
        "demo%2Fbackend%2Fgenerate%2F1%",
        "demo%2Fbackend%2F%FF%2F1",
        "demo%2Fbackend%2F\udcff%2F1",
    ],
)
def test_other_names_are_nobodys(name: str) -> None:
    with pytest.raises(PeerProtocolError):
        read_file_name(INSTANCES, name)


def test_names_too_long_for_a_file_are_refused() -> None:
    fits = RecordKey(INSTANCES, ("n" * 240, "c", "e"), 1)
    assert len(file_name(fits)) <= 255
    with pytest.raises(UsageError, match="too long"):
        file_name(RecordKey(INSTANCES, ("n" * 250, "c", "e"), 1))
    with pytest.raises(UsageError, match="not valid text"):
        file_name(RecordKey(INSTANCES, ("\ud800", "c", "e"), 1))


def test_temporary_names() -> None:
    name = temporary_name(Random(1))
    assert name.startswith(".tmp_")
    assert len(name) == len(".tmp_") + 16
    assert int(name.removeprefix(".tmp_"), 16) == Random(1).getrandbits(64)
    assert is_temporary(name)
    assert not is_temporary(file_name(RecordKey(INSTANCES, (".tmp_x", "c", "e"), 1)))
