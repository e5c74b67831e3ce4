"""What a request is on HTTP/2, without HTTP/2: addresses, header fields, status codes and the frames of both bodies
(`docs/http2-plane.md`).

    client  head, "stop"                     ─▶ request body     BodyReader   worker
            head, input…, "sentinel"         ─▶
    client  ResponseReader   response body   ◀─ prologue, item…, final, "sentinel"   ResponseWriter   worker

Both bodies are TwoPart frames. The response body is the response stream of the compatible plane without its handshake, so that the
meaning has one implementation; the request body begins with a frame of its own, for there is nothing to call home to.
"""

from collections.abc import Iterable, Iterator
from enum import Enum
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import quote, unquote, urlsplit

import msgspec

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
from stator.protocol.control_message import MAX_CONTROL_MESSAGE_SIZE
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.partial import Data
from stator.protocol.stream import Phase
from stator.protocol.two_part import TwoPartParser, encode_frame
from stator.protocol.values import DECODE_ERRORS, decode_value

__all__ = [
    "DRAINING",
    "NOT_FOUND",
    "PUSH_TYPE",
    "STREAM_TYPE",
    "VERSION",
    "BodyReader",
    "Fields",
    "HttpAddress",
    "Inputs",
    "Opening",
    "RequestHead",
    "Said",
    "encode_request",
    "field_value",
    "field_values",
    "path_of",
    "status_error",
    "status_of",
    "target_of",
]

VERSION = 1
"""of the body-stream variant; what a record's `stator.http2` names"""

STREAM_TYPE = "application/x-stator-stream"
"""content type of both bodies of the body-stream variant"""

PUSH_TYPE = "application/octet-stream"
"""content type of a request whose answer calls home (`spec/10 §7`)"""

NOT_FOUND = b"Endpoint not found"
"""body of a 404 to a request whose answer calls home"""

DRAINING = "stator: the worker is draining"
"""the reason of a GOAWAY that means the worker itself, not one connection of a proxy"""

_MOST_IN_FIELD = 8192
"""bytes of a header field's value; what is longer does not travel as one"""

Fields = Iterable[tuple[bytes, bytes]]
"""a header block, pseudo fields first"""


# -- addresses --------------------------------------------------------------------------------------------------------------


class HttpAddress(msgspec.Struct, frozen=True):
    """The `http` value of a record: where to connect to, and what to ask for."""

    host: str
    port: int
    secure: bool
    target: str
    """path and query, as a request names it"""

    @property
    def authority(self) -> str:
        """`host:port`, with brackets around IPv6."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, instance: int) -> "HttpAddress":
        """Read a URL; `ConnectFailed` when it is none that can be used."""
        try:
            return _parse(text)
        except (ValueError, PeerProtocolError) as error:
            raise ConnectFailed(
                f"the instance has no usable HTTP address: {error}", instance=instance, phase="connect"
            ) from error


@lru_cache(maxsize=4096)
def _parse(text: str) -> HttpAddress:
    url = urlsplit(text)
    if url.scheme not in ("http", "https"):
        raise PeerProtocolError(f"{text!r} is neither http nor https")
    if not url.hostname or not url.path or not text.isascii() or not text.isprintable() or " " in text:
        raise PeerProtocolError(f"{text!r} has no host, no path, or characters that no URL has")
    if url.username is not None or url.fragment:
        raise PeerProtocolError(f"{text!r} has a user name or a fragment")
    port = url.port or (443 if url.scheme == "https" else 80)
    target = f"{url.path}?{url.query}" if url.query else url.path
    return HttpAddress(url.hostname, port, url.scheme == "https", target)


def target_of(root: str, path: str) -> str:
    """What a request for the endpoint `path` (`{hex}/{endpoint}`) asks for."""
    return f"{root}/{quote(path, safe='/')}"


def path_of(root: str, target: str) -> str | None:
    """The endpoint path that a request names; None when it is not below `root`."""
    path = target.partition("?")[0]
    if not path.startswith(root) or path[len(root) : len(root) + 1] != "/":
        return None
    return unquote(path[len(root) + 1 :], errors="replace")


# -- header fields ----------------------------------------------------------------------------------------------------------


def field_value(text: str) -> str | None:
    """`text` as the value of a header field, or None when it can be none: they are a help for logs, traces and proxies."""
    if text.isascii() and text.isprintable() and text == text.strip() and len(text) <= _MOST_IN_FIELD:
        return text
    return None


def field_values(fields: Fields) -> dict[str, str]:
    """The fields by name; the first one of a name counts. Values are Latin-1, as HTTP has it."""
    values: dict[str, str] = {}
    for name, value in fields:
        values.setdefault(name.decode("latin-1"), value.decode("latin-1"))
    return values


# -- status codes -----------------------------------------------------------------------------------------------------------


def status_of(error: StatorError) -> int:
    """The status of a refusal. Its body says the same in full; the status is what proxies and their metrics understand."""
    if isinstance(error, Overloaded | Unavailable):
        return 503
    if isinstance(error, UsageError | PeerProtocolError) or (
        isinstance(error, EngineError) and error.kind == "InvalidArgument"
    ):
        return 400
    return 504 if isinstance(error, Timeout) else 500


def status_error(status: int, *, instance: int = 0, phase: str = Phase.ACCEPT.label) -> StatorError:
    """What a status means that came without a stream of ours: from a proxy, or from somebody else at that address."""
    text = f"HTTP status {status}"
    match status:
        case 404:
            return Unavailable(f"{text}: no such endpoint there", instance=instance, phase=phase)
        case 429:
            return Overloaded(f"{text}: too many requests", instance=instance, phase=phase)
        case 503:
            return Unavailable(f"{text}: nobody takes the request", instance=instance, phase=phase)
        case 408 | 504:
            return Timeout(f"{text}: somebody on the way waited in vain", instance=instance, phase=phase)
        case 413 | 414 | 431:
            return UsageError(f"{text}: the request is larger than somebody on the way takes", instance=instance, phase=phase)
        case 500 | 502:
            return Disconnected(f"{text}: somebody on the way lost the worker", instance=instance, phase=phase)
        case _:
            why = "no stream of the runtime behind it" if 200 <= status < 300 else "the request was not let through"
            return ConnectFailed(f"{text}: {why}", instance=instance, phase=phase)


# -- the request body -------------------------------------------------------------------------------------------------------


class RequestHead(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The header of the first frame; its data is the request's value as JSON, and empty for a request of many inputs."""

    id: str
    request_type: Literal["single_in", "many_in"] = "single_in"
    metadata: dict[str, str] = {}

    @property
    def streams_in(self) -> bool:
        """Whether inputs follow."""
        return self.request_type == "many_in"


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame has arrived."""

    head: RequestHead
    payload: Data


class Inputs(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs of a request that streams in, decoded."""

    items: list[Any]


class Said(Enum):
    """A control frame of the caller."""

    END = "sentinel"
    """no further inputs"""
    STOP = "stop"
    KILL = "kill"


_encode = msgspec.json.Encoder().encode
_decode_head = msgspec.json.Decoder(RequestHead).decode
_decode_text = msgspec.json.Decoder(str).decode


def encode_request(envelope: RequestEnvelope, *, limit: int) -> bytes:
    """The first frame. Raises `UsageError` when it or its header is too large."""
    request_type: Literal["single_in", "many_in"] = "many_in" if envelope.streams_in else "single_in"
    header = _encode(RequestHead(id=envelope.id, request_type=request_type, metadata=envelope.metadata))
    if len(header) > MAX_CONTROL_MESSAGE_SIZE:
        raise UsageError(
            f"request header of {len(header)} bytes exceeds the limit of {MAX_CONTROL_MESSAGE_SIZE} bytes;"
            " shorten the request id or the metadata"
        )
    size = len(header) + len(envelope.payload)
    if size > limit:
        raise UsageError(
            f"request of {size} bytes is larger than the limit of {limit} bytes (http2.max_request, on both sides)"
        )
    return encode_frame(header, b"" if envelope.streams_in else envelope.payload)


class _Stage(Enum):
    HEAD = 0
    INPUTS = 1
    CONTROL = 2
    """behind the head of a single request, or the end of the inputs: nothing but "stop" and "kill" comes here"""


class BodyReader:
    """The worker's end of a request body."""

    __slots__ = ("_frames", "_stage")

    def __init__(self, *, limit: int) -> None:
        """`limit`: most bytes of the first frame, and of one input."""
        self._frames = TwoPartParser(limit=limit)
        self._stage = _Stage.HEAD

    @property
    def opened(self) -> bool:
        """Whether the first frame has been given out."""
        return self._stage is not _Stage.HEAD

    @property
    def unfinished(self) -> int:
        """Bytes held of a frame that is not complete."""
        return self._frames.unfinished

    @property
    def inputs_due(self) -> bool:
        """Whether inputs, or the word that there are none left, are still to come."""
        return self._stage is _Stage.INPUTS

    def receive_data(self, data: bytes) -> Iterator[Opening | Inputs | Said]:
        """What `data` completed, in order; run it to its end, or never use the reader again.

        Raises `PeerProtocolError` at the first frame that is none of these; what came before it was given out.
        """
        items: list[Any] = []
        try:
            for header, payload in self._frames.receive_data(data):
                if not header and self._stage is _Stage.INPUTS:
                    items.append(decode_value(payload, "json"))
                    continue
                if items:
                    yield Inputs(items=items)
                    items = []
                yield self._read_head(header, payload) if self._stage is _Stage.HEAD else self._read_control(header, payload)
        except PeerProtocolError:
            if items:
                yield Inputs(items=items)
            raise
        if items:
            yield Inputs(items=items)

    def _read_head(self, header: bytes, payload: Data) -> Opening:
        if len(header) > MAX_CONTROL_MESSAGE_SIZE:
            raise PeerProtocolError(f"request header of {len(header)} bytes, allowed are {MAX_CONTROL_MESSAGE_SIZE}")
        try:
            head = _decode_head(header)
        except DECODE_ERRORS as error:
            raise PeerProtocolError(f"request header cannot be read: {error}") from error
        if head.streams_in and payload:
            raise PeerProtocolError("a bidirectional request has a value of its own")
        self._stage = _Stage.INPUTS if head.streams_in else _Stage.CONTROL
        return Opening(head=head, payload=payload)

    def _read_control(self, header: bytes, payload: Data) -> Said:
        try:
            if payload:
                raise ValueError("it has data")
            said = Said(_decode_text(header))
        except DECODE_ERRORS as error:
            raise PeerProtocolError(f"control frame of {len(header)} bytes cannot be read: {error}") from error
        if said is Said.END and self._stage is not _Stage.INPUTS:
            raise PeerProtocolError("an end of inputs that are not due")
        self._stage = _Stage.CONTROL
        return said
