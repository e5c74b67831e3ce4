"""What is written to a NATS server, byte by byte."""

import pytest

from stator.protocol.ids import EndpointId, nats_subject
from stator.testing.recorded import recorded
from stator.transports.nats.wire import (
    Message,
    encode_headers,
    encode_publish,
    encode_subscribe,
    encode_unsubscribe,
    is_subject,
    nobody_there,
    read_headers,
)

pytestmark = pytest.mark.timeout(10)


def test_a_request_looks_like_the_recorded_one() -> None:
    whole = recorded("40-")
    subscription, rest = whole.split(b"\r\n", 1)
    line, rest = rest.split(b"\r\n", 1)
    _, subject, reply, header_size, size = line.decode().split()
    headers, body = rest[: int(header_size)], rest[int(header_size) : int(size)]
    assert rest[int(size) :] == b"\r\n"
    assert encode_headers(read_headers(headers)) == headers
    assert encode_publish(subject, body, reply=reply, headers=headers) == line + b"\r\n" + rest
    assert subscription.startswith(b"SUB " + reply.rpartition(".")[0].encode() + b".* ")
    assert list(read_headers(headers)) == ["request-id", "x-frontend-send-ts-ns"]


def test_the_recorded_subscription_and_acknowledgement() -> None:
    lines = recorded("42-").split(b"\r\n")
    assert encode_subscribe("demo_backend.generate-408f7a9c089eda54", "q", 10) == lines[-2] + b"\r\n"
    assert nats_subject(EndpointId("demo", "backend", "generate"), 0x408F7A9C089EDA54).encode() in lines[-2]
    acknowledgement = recorded("41-")
    reply = acknowledgement.split()[1].decode()
    assert b" ".join(encode_publish(reply, b"").split()) == b" ".join(acknowledgement.split())


def test_unsubscribing() -> None:
    assert encode_unsubscribe(3) == b"UNSUB 3\r\n"


def test_headers_cannot_break_out_of_their_line() -> None:
    block = encode_headers({"request-id": "a\r\nPUB x 0\r\n", "x": "grüße"})
    assert block == "NATS/1.0\r\nrequest-id: a  PUB x 0  \r\nx: grüße\r\n\r\n".encode()
    assert read_headers(block) == {"request-id": "a  PUB x 0", "x": "grüße"}


@pytest.mark.parametrize(
    ("block", "headers"),
    [
        (b"", {}),
        (b"NATS/1.0\r\n\r\n", {}),
        (b"NATS/1.0\r\nRequest-Id:1\r\nnonsense\r\na: b: c \r\n\r\n", {"request-id": "1", "a": "b: c"}),
        (b"NATS/1.0\r\na: \xff\r\n\r\n", {"a": "\ufffd"}),
        (b"\xff\xfe", {}),
    ],
)
def test_headers_of_strangers(block: bytes, headers: dict[str, str]) -> None:
    assert read_headers(block) == headers


@pytest.mark.parametrize("text", ["a", "demo_backend.generate-1", "my-ns_be_1.gen-8ce1", "A_b.c", "a.b.c_d", "größe.x"])
def test_subjects(text: str) -> None:
    assert is_subject(text)


@pytest.mark.parametrize(
    "text", ["", ".", "a.", ".a", "a..b", "a b", "a\r\nPUB", "a\x00", "*", "a.*", "a.>", "x" * 2000, "a\tb"]
)
def test_what_is_no_subject(text: str) -> None:
    assert not is_subject(text)


@pytest.mark.parametrize(
    ("headers", "body", "nobody"),
    [
        (b"NATS/1.0 503\r\n\r\n", b"", True),
        (b"NATS/1.0 503 No Responders\r\n\r\n", b"", True),
        (b"NATS/1.0 404\r\n\r\n", b"", False),
        (b"", b"", False),
        (b"NATS/1.0 503\r\n\r\n", b"text", False),
    ],
)
def test_nobody_there(headers: bytes, body: bytes, nobody: bool) -> None:
    assert nobody_there(Message("_INBOX.a.1", body, "", headers)) is nobody
