"""Errors there and back over the compatible wire, whatever is in them."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from stator import errors
from stator.errors import (
    ConfigError,
    ConnectFailed,
    Disconnected,
    EngineError,
    NotTrusted,
    PeerProtocolError,
    StatorError,
    StreamIncomplete,
    Timeout,
    UsageError,
)
from stator.protocol.stream import Phase
from stator.protocol.wire_errors import BACKEND_KINDS, RUNTIME_KINDS, engine_error, from_wire, is_migratable, to_wire

CLASSES = [getattr(errors, name) for name in errors.__all__]
PHASES = [phase for phase in Phase if phase is not Phase.ENDED]
TEXTS = st.text()

RENAMED = {
    StatorError: ("engine", "Unknown"),
    PeerProtocolError: ("engine", "Unknown"),
    UsageError: ("engine", "InvalidArgument"),
    ConfigError: ("engine", "InvalidArgument"),
}
"""The reference has one word for these and an engine's: the code and kind they come back with (`spec/10 §4.3`)"""


def there_and_back(error: StatorError, phase: Phase, instance: int = 0) -> StatorError:
    return from_wire(msgspec.json.decode(msgspec.json.encode(to_wire(error))), phase=phase, instance=instance)


plain = st.builds(
    lambda kind, message, phase: kind(message, phase=phase),
    st.sampled_from([kind for kind in CLASSES if kind is not EngineError]),
    TEXTS,
    st.sampled_from([phase.label for phase in Phase]) | st.just(""),
)
engine = st.builds(lambda message, kind: EngineError(message, kind=kind), TEXTS, st.sampled_from(sorted(BACKEND_KINDS)))


@given(plain | engine, st.sampled_from(PHASES), st.integers(0, 2**64 - 1))
def test_code_and_message_come_back_where_the_wire_has_words_for_them(error: StatorError, phase: Phase, instance: int) -> None:
    back = there_and_back(error, phase, instance)
    assert (back.message, back.instance) == (error.message, instance)
    if type(error) in RENAMED:
        assert isinstance(back, EngineError)
        assert (back.code, back.kind) == RENAMED[type(error)]
    elif type(error) in (Disconnected, StreamIncomplete):  # one word: whether items came before is known to the reader
        assert type(back) is (StreamIncomplete if phase is Phase.ITEMS else Disconnected)
    elif type(error) is NotTrusted:  # why there was no connection is for those who did not get it
        assert type(back) is ConnectFailed
    else:
        assert type(back) is type(error)
        assert back.code == error.code
        assert back.retryable == error.retryable
    if isinstance(error, EngineError):
        assert isinstance(back, EngineError) and back.kind == error.kind
        assert back.http_status == error.http_status
    if isinstance(error, Timeout):
        assert (back.phase == Phase.CONNECT.label) == (Phase.CONNECT.label in (error.phase, phase.label))


@given(plain | engine, st.sampled_from(PHASES))
def test_once_over_the_wire_it_stays_what_it_is(error: StatorError, phase: Phase) -> None:
    once = there_and_back(error, phase)
    twice = there_and_back(once, phase)
    assert (type(twice), twice.message) == (type(once), once.message)
    assert is_migratable(twice) == is_migratable(once)


@given(st.sampled_from(sorted(RUNTIME_KINDS)), TEXTS, st.sampled_from(PHASES))
def test_every_kind_of_the_reference_s_runtime_comes_back_as_itself(kind: str, message: str, phase: Phase) -> None:
    """Read and sent on, as a worker does that asks another one. An engine's two are sent as the engine's."""
    sent = to_wire(from_wire({"error_type": kind, "message": message}, phase=phase))
    expected: Any = {"Backend": kind} if kind in ("Unknown", "InvalidArgument") else kind
    if kind == "ResponseTimeout" and phase is Phase.CONNECT:
        expected = "ConnectionTimeout"
    assert (sent.error_type, sent.message) == (expected, message)


@given(st.sampled_from(sorted(BACKEND_KINDS)), TEXTS)
def test_every_kind_of_the_reference_s_backends_comes_back_as_itself(kind: str, message: str) -> None:
    sent = to_wire(from_wire({"error_type": {"Backend": kind}, "message": message}))
    assert (sent.error_type, sent.message) == ({"Backend": kind}, message)


@given(plain | engine)
def test_only_kinds_that_the_reference_can_read_are_sent(error: StatorError) -> None:
    kind = to_wire(error).error_type
    if isinstance(kind, dict):
        assert list(kind) == ["Backend"] and kind["Backend"] in BACKEND_KINDS
    else:
        assert kind in RUNTIME_KINDS


@given(st.sampled_from([ValueError, TypeError, TimeoutError, ConnectionError, OSError, RuntimeError, KeyError]), TEXTS)
def test_what_a_handler_raises_has_a_kind_and_its_own_words(kind: type[Exception], text: str) -> None:
    error = engine_error(kind(text))
    assert isinstance(error, EngineError) and error.kind in BACKEND_KINDS
    assert error.message == f"{kind.__name__}: {kind(text)}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KINDS = st.sampled_from(sorted(RUNTIME_KINDS | BACKEND_KINDS))
ALMOST = st.fixed_dictionaries(
    {},
    optional={
        "error_type": KINDS | JSON | st.dictionaries(st.just("Backend") | st.text(), KINDS | JSON, max_size=2),
        "message": TEXTS | JSON,
        "class": TEXTS | JSON,
        "caused_by": JSON,
    },
)


@given(JSON | ALMOST, st.none() | st.lists(TEXTS, max_size=2), st.sampled_from(PHASES))
def test_whatever_arrives_is_an_error_with_a_text(raw: Any, comments: list[str] | None, phase: Phase) -> None:
    error = from_wire(raw, comments=comments, phase=phase, instance=7)
    assert isinstance(error, StatorError)
    assert error.instance == 7 and isinstance(error.message, str)
    if isinstance(error, EngineError):
        assert error.kind in BACKEND_KINDS
