"""Errors on the compatible wire, both ways."""

import asyncio
from typing import Any

import msgspec
import pytest

from stator import errors
from stator.errors import (
    Cancelled,
    ConnectFailed,
    Disconnected,
    EngineError,
    Overloaded,
    PeerProtocolError,
    StatorError,
    StreamIncomplete,
    Timeout,
    Unavailable,
    UsageError,
)
from stator.protocol.stream import Phase
from stator.protocol.wire_errors import BACKEND_KINDS, engine_error, from_wire, is_migratable, to_wire


def over_the_wire(error: StatorError, phase: Phase = Phase.ITEMS) -> StatorError:
    return from_wire(msgspec.json.decode(msgspec.json.encode(to_wire(error))), phase=phase, instance=5)


class Odd(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ValueError("v"), "InvalidArgument", "ValueError: v"),
        (UnicodeDecodeError("utf-8", b"", 0, 0, "why"), "InvalidArgument", "UnicodeDecodeError: "),
        (TypeError("t"), "InvalidArgument", "TypeError: t"),
        (TimeoutError("late"), "ConnectionTimeout", "TimeoutError: late"),
        (TimeoutError(), "ConnectionTimeout", "TimeoutError: "),
        (ConnectionResetError("c"), "Disconnected", "ConnectionResetError: c"),
        (asyncio.CancelledError("x"), "Cancelled", "CancelledError: x"),
        (GeneratorExit(), "EngineShutdown", "engine shutting down"),
        (RuntimeError("r"), "Unknown", "RuntimeError: r"),
        (KeyError("k"), "Unknown", "KeyError: 'k'"),
        (OSError("o"), "Unknown", "OSError: o"),
        (MemoryError(), "Unknown", "MemoryError: "),
        (Odd(), "Unknown", "Odd: (its text cannot be made)"),
    ],
)
def test_what_a_handler_raises(raised: BaseException, kind: str, message: str) -> None:
    error = engine_error(raised, instance=3)
    assert isinstance(error, EngineError)
    assert error.kind == kind
    assert error.message.startswith(message)
    assert error.instance == 3
    back = over_the_wire(error)
    assert isinstance(back, EngineError)
    assert (back.kind, back.message, back.instance) == (kind, error.message, 5)


def test_our_own_errors_stay_what_they_are() -> None:
    error = Overloaded("full")
    assert engine_error(error) is error


def test_a_kind_the_reference_cannot_read_is_not_sent() -> None:
    assert to_wire(EngineError("m", kind="Brand.New")).error_type == {"Backend": "Unknown"}


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (Overloaded("m"), "ResourceExhausted"),
        (Unavailable("m"), "Unavailable"),
        (ConnectFailed("m"), "CannotConnect"),
        (Disconnected("m"), "Disconnected"),
        (StreamIncomplete("m"), "Disconnected"),
        (Timeout("m", phase="connect"), "ConnectionTimeout"),
        (Timeout("m", phase="items"), "ResponseTimeout"),
        (Cancelled("m"), "Cancelled"),
        (UsageError("m"), "InvalidArgument"),
        (PeerProtocolError("m"), "Unknown"),
        (StatorError("m"), "Unknown"),
    ],
)
def test_errors_of_our_own_have_the_reference_s_words(error: StatorError, name: str) -> None:
    wire = to_wire(error)
    assert wire.error_type == name
    back = over_the_wire(error)
    assert back.message == "m"
    if type(error) not in (Disconnected, UsageError, PeerProtocolError, StatorError):
        assert type(back) is type(error)


def test_a_lost_connection_means_incomplete_only_after_the_first_item() -> None:
    lost = {"error_type": "Disconnected", "message": "gone"}
    assert type(from_wire(lost, phase=Phase.ITEMS)) is StreamIncomplete
    assert type(from_wire(lost, phase=Phase.FIRST_ITEM)) is Disconnected


@pytest.mark.parametrize("kind", sorted(BACKEND_KINDS))
def test_backend_kinds_are_the_engine_s(kind: str) -> None:
    error = from_wire({"error_type": {"Backend": kind}, "message": "m", "caused_by": {"error_type": "Unknown", "message": "n"}})
    assert type(error) is EngineError
    assert error.kind == kind
    assert not error.retryable
    assert is_migratable(error) is (kind == "EngineShutdown")


@pytest.mark.parametrize(
    ("raw", "kind", "text"),
    [
        (
            {"error_type": "Later", "message": "m", "class": "InvalidRequest", "reason": "r", "diagnostic": "d"},
            EngineError,
            "m",
        ),
        ({"error_type": "Later", "message": "m", "class": "Unavailable"}, Unavailable, "m"),
        ({"error_type": "Later", "message": "m", "class": "DeadlineExceeded"}, Timeout, "m"),
        ({"error_type": "Later", "message": "m", "class": "Other"}, EngineError, "m"),
        ({"error_type": "Later", "message": "m", "class": None}, EngineError, "m"),
        ({"error_type": {"Frontend": "x"}, "message": "m"}, EngineError, "m"),
        ({"error_type": {"Backend": "Later"}, "message": "m"}, EngineError, "m"),
        ({"error_type": {"Backend": 5}, "message": "m"}, EngineError, "m"),
        ({"error_type": "InvalidArgument", "message": "m"}, EngineError, "m"),
        ({"message": "m"}, EngineError, "m"),
        ({"error_type": "Cancelled"}, Cancelled, "unknown error"),
        ({}, EngineError, "unknown error"),
        ([], EngineError, "unknown error"),
        ("text", EngineError, "unknown error"),
        (5, EngineError, "unknown error"),
        (None, EngineError, "a, b"),
    ],
)
def test_whatever_arrives_is_an_error_with_a_text(raw: Any, kind: type[StatorError], text: str) -> None:
    error = from_wire(raw, comments=["a", "b"], instance=9)
    assert type(error) is kind
    assert (error.message, error.instance) == (text, 9)


def test_an_error_event_with_nothing_in_it() -> None:
    assert from_wire(None).message == "unknown error"


def test_which_errors_may_be_continued_elsewhere() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    migratable = {kind.__name__ for kind in kinds if is_migratable(kind("m"))}
    connection = {"ConnectFailed", "NotTrusted", "Disconnected", "StreamIncomplete"}
    assert migratable == connection | {"Overloaded", "Timeout", "Unavailable"}
