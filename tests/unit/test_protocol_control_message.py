"""The request control message."""

import msgspec
import pytest

from stator.errors import PeerProtocolError, UsageError
from stator.protocol.control_message import (
    MAX_CONTROL_MESSAGE_SIZE,
    CallHomeAddress,
    ConnectionInfo,
    ControlMessage,
    decode_control_message,
    encode_control_message,
    parse_address,
    read_call_home,
)
from stator.protocol.request_frame import RequestFrameParser
from stator.protocol.two_part import decode_message
from stator.protocol.values import decode_value
from stator.testing.recorded import recorded

ADDRESS = CallHomeAddress(address="127.0.0.1:9", subject="s", context="c")


def control_of(name: str) -> tuple[bytes, bytes]:
    (frame,) = RequestFrameParser().receive_data(recorded(name))
    return decode_message(frame.payload)


@pytest.mark.parametrize("name", ["01-", "02-", "03-", "04-", "60-"])
def test_recorded_messages_are_read_and_written_to_the_byte(name: str) -> None:
    header, _ = control_of(name)
    message = decode_control_message(header)
    assert encode_control_message(message) == header
    address = read_call_home(header)
    assert address.context == message.id
    assert address.stream_type == "response"
    assert ConnectionInfo.of(address) == message.connection_info
    assert message.streams_in is (name == "04-")


@pytest.mark.parametrize("name", ["01-", "02-", "60-"])
def test_recorded_values_follow_the_codec(name: str) -> None:
    header, data = control_of(name)
    codec = decode_control_message(header).codec
    assert codec == ("json" if name == "01-" else "msgpack")
    assert decode_value(data, codec) == {"n": 2, "prompt": "hi"}


def test_metadata_and_the_second_connection() -> None:
    assert decode_control_message(control_of("03-")[0]).metadata == {"a": "b", "tenant": "t1"}
    second = decode_control_message(control_of("04-")[0]).request_stream_connection_info
    assert isinstance(second, ConnectionInfo)
    assert msgspec.json.decode(second.info)["stream_type"] == "request"


def test_older_releases_name_no_codec_and_unknown_fields_are_ignored() -> None:
    fields = msgspec.to_builtins(ControlMessage(id="c", connection_info=ConnectionInfo.of(ADDRESS)))
    del fields["payload_codec"]
    message = decode_control_message(msgspec.json.encode({**fields, "new": [1]}))
    assert message.codec == "json"
    assert message.metadata is msgspec.UNSET


def test_an_unknown_codec_is_named() -> None:
    message = ControlMessage(id="c", connection_info=ConnectionInfo.of(ADDRESS), payload_codec="protobuf")
    with pytest.raises(PeerProtocolError, match="'protobuf'"):
        _ = message.codec


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"id":1}', b"\xff", b"[" * 5000])
def test_unreadable_messages(data: bytes) -> None:
    with pytest.raises(PeerProtocolError, match="control message"):
        decode_control_message(data)
    with pytest.raises(PeerProtocolError, match="where to answer"):
        read_call_home(data)


def test_where_to_answer_can_be_read_from_a_broken_message() -> None:
    broken = msgspec.json.encode({"id": 5, "metadata": [], "connection_info": ConnectionInfo.of(ADDRESS)})
    with pytest.raises(PeerProtocolError):
        decode_control_message(broken)
    assert read_call_home(broken) == ADDRESS


def test_another_response_transport_is_named() -> None:
    info = ConnectionInfo(transport="quic-response", info="{}")
    with pytest.raises(PeerProtocolError, match="quic-response"):
        read_call_home(encode_control_message(ControlMessage(id="c", connection_info=info)))


def test_the_size_limit_of_a_client() -> None:
    def message(metadata: int) -> ControlMessage:
        return ControlMessage(id="c", connection_info=ConnectionInfo.of(ADDRESS), metadata={"m": "x" * metadata})

    room = MAX_CONTROL_MESSAGE_SIZE - len(encode_control_message(message(0)))
    assert len(encode_control_message(message(room))) == MAX_CONTROL_MESSAGE_SIZE
    with pytest.raises(UsageError, match="131073 bytes exceeds limit 131072"):
        encode_control_message(message(room + 1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.2:37689", ("192.0.2.2", 37689)),
        ("::1:42745", ("::1", 42745)),
        ("[::1]:42745", ("::1", 42745)),
        ("worker-0.svc:1", ("worker-0.svc", 1)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":1", "host", "host:", "host:0", "host:65536", "host:-1", "host:1x", "host:١", "host:" + "9" * 5000]
)
def test_texts_that_are_no_addresses(text: str) -> None:
    with pytest.raises(PeerProtocolError, match="host:port"):
        parse_address(text)
