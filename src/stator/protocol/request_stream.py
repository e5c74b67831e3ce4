"""Both ends of a request stream: the inputs of a bidirectional request on the compatible plane, without the connection (`spec/10 §5`).

    client  RequestWriter   item…, then "sentinel", "stop" or "kill"  ─▶   RequestReader   worker

The worker calls home for it as for the answer, with a handshake of stream type `request`, and says nothing more. Items have no wrapper.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from stator.errors import PeerProtocolError
from stator.protocol.call_home import SENTINEL, STOP, Control
from stator.protocol.envelope import Codec
from stator.protocol.partial import Data
from stator.protocol.response_stream import MAX_ITEM_SIZE, WINDOW
from stator.protocol.stream import Receiver
from stator.protocol.two_part import TwoPartParser, encode_frame
from stator.protocol.values import DECODE_ERRORS, decode_value, encode_value

__all__ = ["RequestReader", "RequestWriter"]

_NO_WINDOW = 2**62

_decode_text = msgspec.json.Decoder(str).decode


class RequestWriter:
    """The client's end, once the worker has called. Bytes collect until `data_to_send` takes them."""

    __slots__ = ("_codec", "_out", "closed")

    def __init__(self, *, codec: Codec) -> None:
        self._codec: Codec = codec
        self._out: list[bytes] = []
        self.closed = False
        """the closing frame was written: shut the connection behind what `data_to_send` gives"""

    def send(self, value: Any) -> None:
        """One input. Raises `EngineError` when the value is outside of the data model; nothing is written then."""
        self._out.append(encode_frame(data=encode_value(value, self._codec)))

    def end(self) -> None:
        """No further inputs."""
        self._close(SENTINEL)

    def stop(self) -> None:
        """The handler is asked to end; inputs not taken yet are dropped."""
        self._out.clear()
        self._close(STOP)

    def _close(self, last: bytes) -> None:
        if not self.closed:
            self.closed = True
            self._out.append(last)

    def data_to_send(self) -> bytes:
        """Take what was written since the last call."""
        out, self._out = self._out, []
        return b"".join(out)


class RequestReader:
    """The worker's end. The receiver learns of items and of the end; what is asked of the request is the answer of each call.

    `full`: more inputs have arrived than the window takes; stop reading the connection, and call `resume` when the handler took what
    there was. `closed`: nothing more is of interest. Never raises: what is no input and no known control is a kill, as the end of the
    connection without control is.
    """

    __slots__ = ("_codec", "_frames", "_held", "_receiver", "_window", "closed")

    def __init__(self, receiver: Receiver, *, codec: Codec, limit: int = MAX_ITEM_SIZE, window: int = WINDOW) -> None:
        self._receiver = receiver
        self._codec: Codec = codec
        self._frames = TwoPartParser(limit=limit)
        self._window = window
        self._held: Iterator[tuple[bytes, Data]] | None = None
        self.closed = False

    @property
    def full(self) -> bool:
        return self._held is not None

    def receive_data(self, data: bytes) -> Control | None:
        """Take bytes. The answer is what the client asks of the request, if anything."""
        wish = self._read(_NO_WINDOW) if self._held is not None else None
        if self.closed:
            return wish
        self._held = self._frames.receive_data(data)
        return self._read(self._window)

    def resume(self) -> Control | None:
        """Go on with what has arrived, as far as the window reaches."""
        return self._read(self._window)

    def receive_eof(self) -> Control | None:
        """The connection ended, in whatever way. What has arrived is delivered first."""
        wish = self._read(_NO_WINDOW)
        return wish if self.closed else self._kill("the inputs were cut before their end")

    def _read(self, window: int) -> Control | None:
        if self._held is None:
            return None
        items: list[Any] = []
        room = window - len(self._receiver.items)
        if room <= 0:
            return None
        try:
            control = self._read_frames(self._held, items, room)
        except PeerProtocolError as error:
            self._deliver(items)
            return self._kill(f"the caller broke the protocol: {error.message}")
        self._deliver(items)
        match control:
            case "":
                return None
            case "sentinel" | "stop":
                self._close()
                self._receiver.finish()
                return None if control == "sentinel" else Control.STOP
            case "kill":
                return self._kill("killed by the caller")
            case _:
                return self._kill("the caller sent a control frame that is not known")

    def _read_frames(self, frames: Iterator[tuple[bytes, Data]], items: list[Any], room: int) -> str:
        """Decode inputs until the window is full, the bytes are used up, or a control frame comes: its text, else empty."""
        for header, data in frames:
            if header:
                if data:
                    raise PeerProtocolError("a frame with header and data")
                try:
                    return _decode_text(header) or "(empty)"
                except DECODE_ERRORS as error:
                    raise PeerProtocolError(f"control frame of {len(header)} bytes cannot be read: {error}") from error
            items.append(decode_value(data, self._codec))
            if len(items) >= room:
                return ""
        self._held = None
        return ""

    def _deliver(self, items: list[Any]) -> None:
        if items:
            self._receiver.receive(items)

    def _kill(self, reason: str) -> Control:
        self._close()
        self._receiver.cut(reason)
        return Control.KILL

    def _close(self) -> None:
        self.closed = True
        self._held = None
