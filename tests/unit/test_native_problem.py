"""Errors travel by their code, both ways; what nobody knows becomes `internal`."""

import msgspec
import pytest

from stator import errors
from stator.errors import EngineError, StatorError
from stator.protocol.native.frames import MAX_PAYLOAD
from stator.protocol.native.problem import decode_error, encode_error

CLASSES = [getattr(errors, name) for name in errors.__all__ if name != "EngineError"]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_keeps_its_class_message_and_phase(kind: type[StatorError]) -> None:
    read = decode_error(encode_error(kind("it's like this: ü 🙂", phase="items")), instance=7)
    assert type(read) is kind
    assert (read.message, read.phase, read.instance) == ("it's like this: ü 🙂", "items", 7)


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in [*CLASSES, EngineError]]
    assert len(set(codes)) == len(codes)


def test_an_engine_error_keeps_its_kind() -> None:
    read = decode_error(encode_error(EngineError("ValueError: no", kind="InvalidArgument", phase="first item")), instance=3)
    assert isinstance(read, EngineError)
    assert (read.kind, read.message, read.phase, read.instance) == ("InvalidArgument", "ValueError: no", "first item", 3)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"code": "from_the_future", "message": "hello"}, "hello"),
        ({"message": "no code"}, "no code"),
        ({"code": "internal", "message": "", "colour": "red"}, ""),
        ({}, ""),
    ],
)
def test_unknown_codes_are_internal(sent: dict[str, str], message: str) -> None:
    read = decode_error(msgspec.json.encode(sent))
    assert type(read) is StatorError and read.code == "internal" and not read.retryable
    assert read.message == message


def test_an_engine_error_without_kind_is_of_kind_unknown() -> None:
    read = decode_error(b'{"code": "engine", "message": "x"}')
    assert isinstance(read, EngineError) and read.kind == "Unknown"


@pytest.mark.parametrize("bad", [b"", b"{", b"null", b"[]", b"7", b"\xff", b'{"code": 5}', b'{"message": {}}', b"[" * 60_000])
def test_what_cannot_be_read_is_internal(bad: bytes) -> None:
    read = decode_error(bad, instance=5)
    assert type(read) is StatorError and read.instance == 5


@pytest.mark.parametrize("text", ["x" * 10**6, "\x00" * 10**6, "🙂" * 10**6, "\ud800" * 10**6, '"\\' * 10**6])
def test_any_error_fits_in_a_frame_and_is_json(text: str) -> None:
    error = EngineError(text, kind=text, phase=text)
    data = encode_error(error)
    assert len(data) <= MAX_PAYLOAD
    read = decode_error(data)
    assert isinstance(read, EngineError)
    assert len(read.message) == 8192 and len(read.kind) == len(read.phase) == 64
