"""Request frames and their acknowledgements."""

import msgspec
import pytest

from stator.errors import ConnectFailed, Overloaded, PeerProtocolError, StatorError, Unavailable, UsageError
from stator.protocol.request_frame import (
    ACCEPTED,
    INVALID_PATH,
    MAX_MESSAGE_SIZE,
    OVERLOADED,
    SHUTTING_DOWN,
    AcknowledgementParser,
    RequestFrame,
    RequestFrameParser,
    acknowledgement_error,
    encode_acknowledgement,
    encode_request_frame,
    too_large,
    unknown_endpoint,
)
from stator.testing.recorded import recorded, recorded_names

REQUESTS = [*recorded_names("01"), *recorded_names("02"), *recorded_names("03"), *recorded_names("04"), *recorded_names("60")]


def frames_of(data: bytes, limit: int = MAX_MESSAGE_SIZE) -> list[RequestFrame]:
    return list(RequestFrameParser(limit=limit).receive_data(data))


def raw_frame(path: bytes, headers: bytes, payload: bytes) -> bytes:
    return b"".join(
        (len(path).to_bytes(2, "big"), path, len(headers).to_bytes(2, "big"), headers, len(payload).to_bytes(4, "big"), payload)
    )


@pytest.mark.parametrize("name", REQUESTS)
def test_recorded_requests_are_read_and_written_to_the_byte(name: str) -> None:
    data = recorded(name)
    (frame,) = frames_of(data)
    assert frame.path is not None
    assert frame.headers["x-endpoint-path"] == frame.path
    assert encode_request_frame(frame.path, frame.headers, frame.payload) == data


def test_requests_follow_one_another() -> None:
    data = b"".join(map(recorded, REQUESTS))
    expected = [frame for name in REQUESTS for frame in frames_of(recorded(name))]
    assert frames_of(data) == expected
    parser = RequestFrameParser()
    assert [frame for n in range(len(data)) for frame in parser.receive_data(data[n : n + 1])] == expected


@pytest.mark.parametrize(
    "headers", [b"", b"{", b"[1,2]", b"null", b'{"a":1}', b'{"a":null}', b'{"a":{"b":"c"}}', b"\xff\xfe", b"9" * 5000]
)
def test_headers_that_are_no_strings_count_as_none(headers: bytes) -> None:
    assert frames_of(raw_frame(b"1/generate", headers, b"p")) == [RequestFrame(path="1/generate", headers={}, payload=b"p")]


def test_header_names_keep_their_case() -> None:
    (frame,) = frames_of(raw_frame(b"p", b'{"Request-Id":"a","request-id":"b"}', b""))
    assert frame.headers == {"Request-Id": "a", "request-id": "b"}


def test_a_path_that_is_not_utf8_is_reported_and_the_connection_goes_on() -> None:
    data = raw_frame(b"\xff/generate", b"{}", b"p") + raw_frame(b"1/generate", b"{}", b"q")
    assert [frame.path for frame in frames_of(data)] == [None, "1/generate"]
    assert encode_acknowledgement(INVALID_PATH) == recorded("24-")


def test_the_limit_is_inclusive_and_counts_all_six_fields() -> None:
    frame = raw_frame(b"ab", b"{}", b"x" * 88)
    assert len(frame) == 100
    assert len(frames_of(frame, limit=100)) == 1
    with pytest.raises(PeerProtocolError, match=r"message too large: 101 bytes \(max: 100 bytes\)"):
        frames_of(raw_frame(b"ab", b"{}", b"x" * 89), limit=100)


def test_a_large_frame_is_refused_as_soon_as_its_length_is_known() -> None:
    parser = RequestFrameParser()
    start = raw_frame(b"123456789abcdef/generate", b"{}", b"")[:-4] + (34_603_008).to_bytes(4, "big")
    with pytest.raises(PeerProtocolError) as caught:
        list(parser.receive_data(start))
    assert too_large(caught.value) == b"Read error: message too large: 34603042 bytes (max: 33554432 bytes)"
    with pytest.raises(PeerProtocolError):
        list(parser.receive_data(b""))


def test_requests_before_a_large_one_are_given_out() -> None:
    frames = RequestFrameParser(limit=50).receive_data(raw_frame(b"a", b"", b"fine") + raw_frame(b"a", b"", b"x" * 50))
    assert next(frames).payload == b"fine"
    with pytest.raises(PeerProtocolError):
        next(frames)


def test_a_client_refuses_what_cannot_be_written() -> None:
    with pytest.raises(UsageError, match=r"path of 65536 bytes .* limit of 65535"):
        encode_request_frame("x" * 65536, {}, b"")
    with pytest.raises(UsageError, match="headers of"):
        encode_request_frame("x", {"a": "x" * 65536}, b"")
    with pytest.raises(UsageError, match=r"request of 33554433 bytes .* limit of 33554432 bytes"):
        encode_request_frame("x", {}, bytes(MAX_MESSAGE_SIZE - 10))
    assert len(encode_request_frame("x", {}, bytes(MAX_MESSAGE_SIZE - 11))) == MAX_MESSAGE_SIZE


# -- acknowledgements


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("20-", ACCEPTED),
        ("21-", unknown_endpoint("deadbeef/nope")),
        ("22-", OVERLOADED),
        ("23-", too_large(PeerProtocolError("message too large: 34603019 bytes (max: 33554432 bytes)"))),
        ("24-", INVALID_PATH),
    ],
)
def test_recorded_acknowledgements(name: str, text: bytes) -> None:
    data = recorded(name)
    assert encode_acknowledgement(text) == data
    assert list(AcknowledgementParser().receive_data(data)) == [text]


def test_acknowledgements_in_pieces() -> None:
    data = b"".join(recorded(name) for name in recorded_names("2"))
    parser = AcknowledgementParser()
    got = [text for n in range(len(data)) for text in parser.receive_data(data[n : n + 1])]
    assert got == list(AcknowledgementParser().receive_data(data))
    assert len(got) == 5


def test_a_long_acknowledgement_breaks_the_connection() -> None:
    with pytest.raises(PeerProtocolError, match="acknowledgement of 4294967295 bytes"):
        list(AcknowledgementParser().receive_data(b"\xff\xff\xff\xff"))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (OVERLOADED, Overloaded),
        (b"Server overloaded: anything", Overloaded),
        (SHUTTING_DOWN, Unavailable),
        (b"Server unavailable: worker pool channel closed", Unavailable),
        (b"Unknown endpoint: 1/generate", Unavailable),
        (INVALID_PATH, ConnectFailed),
        (b"\xff\xfe something new", ConnectFailed),
    ],
)
def test_every_text_but_the_empty_one_is_an_error_that_may_be_retried(text: bytes, kind: type[StatorError]) -> None:
    error = acknowledgement_error(text, instance=7)
    assert type(error) is kind
    assert error.retryable
    assert (error.instance, error.phase) == (7, "accept")
    assert acknowledgement_error(ACCEPTED) is None


def test_headers_are_compact_json() -> None:
    frame = encode_request_frame("p", {"a": "ü"}, b"")
    assert '{"a":"ü"}'.encode() in frame
    assert msgspec.json.decode(frame[5:15]) == {"a": "ü"}
