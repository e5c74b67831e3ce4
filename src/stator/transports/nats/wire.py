"""What we write to a NATS server ourselves, and how headers and subjects look. Sans-IO; the library reads."""

import re
from collections.abc import Mapping

import msgspec

__all__ = [
    "PING",
    "Message",
    "encode_headers",
    "encode_publish",
    "encode_subscribe",
    "encode_unsubscribe",
    "is_subject",
    "nobody_there",
    "read_headers",
]

PING = b"PING\r\n"

_VERSION = "NATS/1.0"
_NO_RESPONDERS = b"NATS/1.0 503"
_SUBJECT = re.compile(r"[^\s.*>\x00-\x20]+(\.[^\s.*>\x00-\x20]+)*")
_LONGEST = 1024
"""bytes of a subject; a server closes the connection for control lines above 4096"""
_NO_BREAKS = str.maketrans("\r\n", "  ")


class Message(msgspec.Struct, gc=False):
    """What arrived. `reply` is "" when nobody waits for an answer; `headers` as they came, `read_headers` reads them."""

    subject: str
    body: bytes
    reply: str
    headers: bytes


def is_subject(text: str) -> bool:
    """Whether messages can be sent to `text`: parts between dots, no blanks, no wildcards, not endless."""
    return _SUBJECT.fullmatch(text) is not None and len(text.encode(errors="replace")) <= _LONGEST


def encode_headers(headers: Mapping[str, str]) -> bytes:
    """A header block. Line breaks in values become blanks; names are ours."""
    lines = "".join(f"{name}: {value.translate(_NO_BREAKS)}\r\n" for name, value in headers.items())
    return f"{_VERSION}\r\n{lines}\r\n".encode(errors="replace")


def read_headers(block: bytes) -> dict[str, str]:
    """The headers of a block, names in lower case. A line that is none is left out."""
    headers: dict[str, str] = {}
    for line in block.decode(errors="replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    return headers


def nobody_there(message: Message) -> bool:
    """Whether the server says in place of an answer that nobody listens to the subject."""
    return not message.body and message.headers.startswith(_NO_RESPONDERS)


def encode_publish(subject: str, body: bytes, *, reply: str = "", headers: bytes = b"") -> bytes:
    """One message. `subject` and `reply` are subjects."""
    if headers:
        line = f"HPUB {subject} {reply} {len(headers)} {len(headers) + len(body)}\r\n"
        return b"".join((line.encode(), headers, body, b"\r\n"))
    return b"".join((f"PUB {subject} {reply} {len(body)}\r\n".encode(), body, b"\r\n"))


def encode_subscribe(subject: str, queue: str, number: int) -> bytes:
    """Messages of `subject` come under `number`; those of a `queue` group go to one of its members."""
    return f"SUB {subject} {queue} {number}\r\n".encode()


def encode_unsubscribe(number: int) -> bytes:
    return f"UNSUB {number}\r\n".encode()
