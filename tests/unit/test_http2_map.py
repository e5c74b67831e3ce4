"""What a request is on HTTP/2: addresses, fields, status codes, bodies."""

import pytest

from stator.errors import (
    ConnectFailed,
    Disconnected,
    EngineError,
    Overloaded,
    PeerProtocolError,
    StatorError,
    Timeout,
    Unavailable,
    UsageError,
)
from stator.protocol.call_home import KILL, SENTINEL, STOP
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.http2_map import (
    BodyReader,
    HttpAddress,
    Inputs,
    Opening,
    Said,
    encode_request,
    field_value,
    field_values,
    path_of,
    status_error,
    status_of,
    target_of,
)
from stator.protocol.two_part import encode_frame

LIMIT = 100_000


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://192.0.2.2:33573/v1/rpc/generate", HttpAddress("192.0.2.2", 33573, False, "/v1/rpc/generate")),
        ("https://worker/v1/rpc/a/b?x=1", HttpAddress("worker", 443, True, "/v1/rpc/a/b?x=1")),
        ("http://[::1]:5/p", HttpAddress("::1", 5, False, "/p")),
    ],
)
def test_addresses_are_urls(url: str, address: HttpAddress) -> None:
    assert HttpAddress.parse(url, instance=1) == address


def test_an_ipv6_host_has_brackets_as_an_authority() -> None:
    assert HttpAddress("::1", 5, False, "/").authority == "[::1]:5"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://a/b",
        "http:///b",
        "http://a:b/c",
        "http://a:70000/c",
        "http://a",
        "http://u@a/b",
        "http://a/b#c",
        "http://a/b c",
    ],
)
def test_what_is_no_address_is_a_failed_connect(url: str) -> None:
    with pytest.raises(ConnectFailed, match="no usable HTTP address") as caught:
        HttpAddress.parse(url, instance=7)
    assert (caught.value.instance, caught.value.phase) == (7, "connect")


@pytest.mark.parametrize("path", ["10/generate", "ff/my endpoint", "1/ü", "1/100%"])
def test_paths_come_back_from_targets(path: str) -> None:
    target = target_of("/v1/rpc", path)
    assert target.isascii() and " " not in target
    assert path_of("/v1/rpc", target) == path
    assert path_of("/v1/rpc", target + "?trace=1") == path


@pytest.mark.parametrize("target", ["", "/", "/v1/rpc", "/v1/rpcx/1/g", "/v2/rpc/1/g", "*"])
def test_targets_elsewhere_name_nothing(target: str) -> None:
    assert path_of("/v1/rpc", target) is None


@pytest.mark.parametrize("text", ["grün", " a", "a ", "a\nb", "a\x00", "x" * 9000])
def test_what_is_no_field_value_is_left_out(text: str) -> None:
    assert field_value(text) is None


def test_the_first_field_of_a_name_counts() -> None:
    assert field_values([(b":path", b"/a"), (b"x", b"1"), (b"x", b"2"), (b"y", b"\xfc")]) == {":path": "/a", "x": "1", "y": "ü"}


# -- status codes


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("m"), 503),
        (Unavailable("m"), 503),
        (UsageError("m"), 400),
        (PeerProtocolError("m"), 400),
        (EngineError("m", kind="InvalidArgument"), 400),
        (EngineError("m"), 500),
        (Timeout("m"), 504),
        (StatorError("m"), 500),
    ],
)
def test_refusals_have_a_status(error: StatorError, status: int) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (404, Unavailable, True),
        (408, Timeout, True),
        (413, UsageError, False),
        (429, Overloaded, True),
        (431, UsageError, False),
        (500, Disconnected, True),
        (502, Disconnected, True),
        (503, Unavailable, True),
        (504, Timeout, True),
        (200, ConnectFailed, True),
        (202, ConnectFailed, True),
        (301, ConnectFailed, True),
        (401, ConnectFailed, True),
        (0, ConnectFailed, True),
    ],
)
def test_a_status_of_a_proxy_is_a_typed_error(status: int, kind: type[StatorError], retryable: bool) -> None:
    error = status_error(status, instance=3)
    assert type(error) is kind
    assert error.retryable is retryable
    assert (error.instance, error.phase) == (3, "accept")
    assert str(status) in error.message


# -- the request body


def read(*parts: bytes, limit: int = LIMIT) -> list[Opening | Inputs | Said]:
    reader = BodyReader(limit=limit)
    return [event for part in parts for event in reader.receive_data(part)]


def single(payload: bytes = b'{"n":1}', **facts: object) -> bytes:
    return encode_request(RequestEnvelope(id="r1", payload=payload, **facts), limit=LIMIT)  # type: ignore[arg-type]


MANY = encode_request(RequestEnvelope(id="r1", payload=b"", streams_in=True), limit=LIMIT)


def test_the_first_frame_byte_by_byte() -> None:
    assert single() == encode_frame(b'{"id":"r1"}', b'{"n":1}')
    assert single(metadata={"a": "ü"}) == encode_frame('{"id":"r1","metadata":{"a":"ü"}}'.encode(), b'{"n":1}')
    assert encode_frame(b'{"id":"r1","request_type":"many_in"}') == MANY


def test_a_single_request_and_its_control() -> None:
    opening, *rest = read(single(metadata={"a": "b"}) + STOP + STOP + KILL)
    assert isinstance(opening, Opening)
    assert (opening.head.id, opening.head.streams_in, opening.head.metadata) == ("r1", False, {"a": "b"})
    assert bytes(opening.payload) == b'{"n":1}'
    assert rest == [Said.STOP, Said.STOP, Said.KILL]


def test_inputs_their_end_and_a_stop_behind_it() -> None:
    opening, *rest = read(MANY + encode_frame(data=b"1") + encode_frame(data=b'"x"') + SENTINEL + STOP)
    assert isinstance(opening, Opening) and opening.head.streams_in
    assert rest == [Inputs(items=[1, "x"]), Said.END, Said.STOP]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (encode_frame(b"{}", b"1"), "request header cannot be read"),
        (encode_frame(b"", b"1"), "request header cannot be read"),
        (encode_frame(b"\xff", b"1"), "request header cannot be read"),
        (encode_frame(b'{"id":"r","request_type":"many_in"}', b"1"), "value of its own"),
        (encode_frame(b'{"id":"r","request_type":"other"}', b"1"), "request header cannot be read"),
        (encode_frame(b'{"id":"' + b"x" * 140_000 + b'"}', b"1"), "larger than the limit|allowed are 131072"),
        (single() + encode_frame(data=b"1"), "control frame of 0 bytes cannot be read"),
        (single() + SENTINEL, "an end of inputs that are not due"),
        (single() + encode_frame(b'"go"'), "control frame of 4 bytes cannot be read"),
        (single() + encode_frame(b'"stop"', b"1"), "control frame of 6 bytes cannot be read"),
        (MANY + SENTINEL + SENTINEL, "an end of inputs that are not due"),
        (MANY + encode_frame(data=b"{"), "is not json"),
        (MANY + SENTINEL + encode_frame(data=b"1"), "control frame of 0 bytes cannot be read"),
        (b"\xff" * 24, "larger than the limit"),
    ],
)
def test_a_body_that_breaks_the_format(body: bytes, text: str) -> None:
    with pytest.raises(PeerProtocolError, match=text):
        read(body, limit=200_000 if b"x" * 1000 in body else LIMIT)


def test_inputs_before_a_broken_one_are_given_out() -> None:
    reader = BodyReader(limit=LIMIT)
    got: list[object] = []
    with pytest.raises(PeerProtocolError):
        for event in reader.receive_data(MANY + encode_frame(data=b"1") + encode_frame(data=b"{")):
            got.append(event)
    assert got[1:] == [Inputs(items=[1])]


def test_a_reader_knows_what_it_holds_and_what_is_due() -> None:
    reader = BodyReader(limit=LIMIT)
    assert list(reader.receive_data(MANY[:10])) == []
    assert (reader.unfinished, reader.opened, reader.inputs_due) == (10, False, False)
    list(reader.receive_data(MANY[10:]))
    assert (reader.unfinished, reader.opened, reader.inputs_due) == (0, True, True)
    list(reader.receive_data(SENTINEL))
    assert not reader.inputs_due


@pytest.mark.parametrize(
    ("envelope", "text"),
    [
        (RequestEnvelope(id="r", payload=b"x" * LIMIT), "larger than the limit of 100000 bytes"),
        (RequestEnvelope(id="r", payload=b"1", metadata={"a": "x" * 140_000}), "exceeds the limit of 131072"),
    ],
)
def test_what_is_too_large_is_the_callers_mistake(envelope: RequestEnvelope, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        encode_request(envelope, limit=LIMIT)
