"""Handshake, prologue and control frames."""

import pytest

from stator.errors import ConnectFailed, EngineError, Overloaded, PeerProtocolError, StatorError
from stator.protocol.call_home import (
    KILL,
    PROLOGUE,
    SENTINEL,
    STOP,
    Control,
    ControlReader,
    Handshake,
    HandshakeReader,
    encode_handshake,
    encode_refusal,
    read_prologue,
)
from stator.protocol.two_part import TwoPartParser, encode_frame
from stator.testing.recorded import recorded, recorded_names


def frame_of(data: bytes) -> tuple[bytes, bytes]:
    (frame,) = TwoPartParser(limit=10_000).receive_data(data)
    return frame


def prologue_error(data: bytes) -> StatorError | None:
    return read_prologue(*frame_of(data), instance=4)


@pytest.mark.parametrize("name", recorded_names("3"))
def test_recorded_handshakes(name: str) -> None:
    data = recorded(name)
    found = HandshakeReader().receive_data(data)
    assert found is not None
    handshake, rest = found
    assert handshake.subject.startswith("subj-")
    assert handshake.stream_type == ("request" if name.startswith("37") else "response")
    assert encode_handshake(handshake.subject, handshake.stream_type) + rest == data


def test_a_handshake_in_pieces_leaves_what_is_behind_it() -> None:
    data = recorded("30-")
    whole = HandshakeReader().receive_data(data)
    assert whole is not None
    length = len(data) - len(whole[1])
    reader = HandshakeReader()
    for n in range(length - 1):
        assert reader.receive_data(data[n : n + 1]) is None
    assert reader.receive_data(data[length - 1 : length + 7]) == (whole[0], data[length : length + 7])


@pytest.mark.parametrize(
    "data",
    [
        encode_frame(b"", b"data"),
        encode_frame(b'{"subject":"s","stream_type":"response"}', b"data"),
        encode_frame(b"{"),
        encode_frame(b'{"subject":"s"}'),
        encode_frame(b'{"subject":1,"stream_type":"response"}'),
        encode_frame(b'{"subject":"s","stream_type":"sideways"}'),
        encode_frame(b"\xff"),
        encode_frame(b""),
    ],
)
def test_bad_handshakes(data: bytes) -> None:
    with pytest.raises(PeerProtocolError, match="malformed handshake"):
        HandshakeReader().receive_data(data)


def test_a_large_handshake_is_refused_before_it_arrives() -> None:
    with pytest.raises(PeerProtocolError, match="larger than the limit of 65536"):
        HandshakeReader().receive_data(encode_frame(b"x" * 65_537)[:24])


def test_unknown_fields_of_a_handshake_are_ignored() -> None:
    found = HandshakeReader().receive_data(encode_frame(b'{"subject":"s","stream_type":"request","v":2}'))
    assert found == (Handshake(subject="s", stream_type="request"), b"")


# -- prologue


def test_recorded_prologues() -> None:
    _, prologue, *_ = TwoPartParser(limit=1000).receive_data(recorded("30-"))
    assert encode_frame(*prologue) == PROLOGUE
    assert read_prologue(*prologue) is None
    refused = list(TwoPartParser(limit=1000).receive_data(recorded("34-")))[1]
    error = read_prologue(*refused, instance=4)
    assert isinstance(error, ConnectFailed)
    assert "Generate Error: RuntimeError: sync raise" in error.message
    assert (error.instance, error.phase) == (4, "prologue")


@pytest.mark.parametrize("header", [b"{}", b'{"error":null}', b'{"ok":1}'])
def test_an_object_without_error_says_yes(header: bytes) -> None:
    assert read_prologue(header, b"") is None


@pytest.mark.parametrize(
    ("header", "data"),
    [(b"", b""), (b"", b"data"), (b'{"error":null}', b"x"), (b"{", b""), (b'"sentinel"', b""), (b'{"error":1}', b"")],
)
def test_malformed_prologues(header: bytes, data: bytes) -> None:
    with pytest.raises(PeerProtocolError, match="malformed prologue"):
        read_prologue(header, data)


def test_a_refusal_keeps_its_type_and_its_text() -> None:
    error = prologue_error(encode_refusal(Overloaded("no slot")))
    assert type(error) is Overloaded
    assert error.message == "no slot"
    error = prologue_error(encode_refusal(EngineError("TypeError: x", kind="InvalidArgument")))
    assert isinstance(error, EngineError)
    assert (error.kind, error.instance) == ("InvalidArgument", 4)
    assert b'{"error":"Generate Error: TypeError: x",' in encode_refusal(EngineError("TypeError: x"))


def test_a_refusal_recorded_from_1_6_1() -> None:
    header = (
        b'{"error":"Generate Error: RuntimeError: sync raise","typed_error":{"error_type":"Unknown","class":"Internal",'
        b'"reason":"runtime.unclassified","message":"RuntimeError: sync raise","diagnostic":"RuntimeError: sync raise"}}'
    )
    error = read_prologue(header, b"")
    assert isinstance(error, EngineError)
    assert error.message == "RuntimeError: sync raise"


# -- control


def test_recorded_controls() -> None:
    assert recorded("05-") == STOP
    assert recorded("06-") == KILL
    assert ControlReader().receive_data(STOP + KILL) == [Control.STOP, Control.KILL]
    assert recorded("30-").endswith(SENTINEL)


@pytest.mark.parametrize(
    "data",
    [
        SENTINEL,
        encode_frame(b'"pause"'),
        encode_frame(b"stop"),
        encode_frame(b'"stop"', b"data"),
        encode_frame(b"", b"data"),
        encode_frame(),
        encode_frame(b"\xff"),
        b"\xff" * 24,
    ],
)
def test_everything_that_is_not_stop_is_kill(data: bytes) -> None:
    assert ControlReader().receive_data(data) == [Control.KILL]


def test_controls_in_pieces() -> None:
    reader = ControlReader()
    data = STOP + KILL
    assert [wish for n in range(len(data)) for wish in reader.receive_data(data[n : n + 1])] == [Control.STOP, Control.KILL]
