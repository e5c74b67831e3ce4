"""Both ends of a response stream over a call-home connection, without the connection (`spec/10 §3, §4.1, §4.2`).

    worker  ResponseWriter   handshake, prologue, item…, final, sentinel  ─▶   ResponseReader   client
                                                            stop, kill    ◀─

The reader decides nothing about the meaning: it turns frames into calls of `stator.protocol.stream.Receiver`.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Any

from stator.errors import PeerProtocolError, StatorError
from stator.protocol.call_home import (
    KILL,
    PROLOGUE,
    SENTINEL,
    SENTINEL_HEADER,
    STOP,
    Control,
    ControlReader,
    encode_handshake,
    encode_refusal,
    read_prologue,
)
from stator.protocol.envelope import Codec
from stator.protocol.item_frame import FINAL, ItemFrame, encode_error_item, item_decoder, write_item
from stator.protocol.partial import Data
from stator.protocol.stream import Phase, Receiver
from stator.protocol.two_part import TwoPartParser, encode_frame
from stator.protocol.values import DECODE_ERRORS
from stator.protocol.wire_errors import from_wire, to_wire

__all__ = ["MAX_ITEM_SIZE", "ResponseReader", "ResponseWriter"]

MAX_ITEM_SIZE = 134_217_728
"""Default limit of one frame of a response stream, in bytes. The reference has none."""

_EMPTY = encode_frame()

_NO_WINDOW = 2**62

WINDOW = 64
"""Items decoded ahead of the application; what lies behind them stays undecoded and the socket unread (`spec/10 §3.7`)."""


class ResponseWriter:
    """The worker's end. Bytes collect in `out` until `data_to_send` takes them.

    Calls come in the order accept, send…, end; or refuse alone. The handshake is there from the beginning.
    """

    __slots__ = ("_codec", "_control", "_large", "_left", "_other", "out", "sent_items")

    def __init__(self, *, subject: str, codec: Codec) -> None:
        self._codec: Codec = codec
        self._control = ControlReader()
        self._large = False
        self.out: list[bytes] = [encode_handshake(subject)]
        self.sent_items = 0
        """items written"""
        self._left = 0
        self._other = len(self.out[0])

    @property
    def sent_bytes(self) -> int:
        """Bytes of the bodies of items and final frame: not handshake, prologue, sentinel and framing (`spec/30 §6`)."""
        return self._left + sum(map(len, self.out)) - self._other - len(_EMPTY) * self.sent_items

    def accept(self) -> None:
        """The positive prologue."""
        self.out.append(PROLOGUE)
        self._other += len(PROLOGUE)

    def refuse(self, error: StatorError) -> None:
        """The negative prologue and the sentinel."""
        refusal = encode_refusal(error)
        self.out += (refusal, SENTINEL)
        self._other += len(refusal) + len(SENTINEL)

    def send(self, value: Any) -> None:
        """One item. Raises `EngineError` when the value is outside of the data model; nothing is written then."""
        if write_item(self.out, value, self._codec):
            self._large = True
        self.sent_items += 1

    def skip(self) -> None:
        """A frame that readers skip; only after `accept` and before `end`."""
        self.out.append(_EMPTY)
        self._other += len(_EMPTY)

    def end(self, error: StatorError | None = None) -> None:
        """Final frame and sentinel, after an error item if there is an error."""
        if error is not None:
            self.out.append(encode_error_item(to_wire(error), self._codec))
            self._other += len(_EMPTY)
        self.out += (FINAL[self._codec], SENTINEL)
        self._other += len(_EMPTY) + len(SENTINEL)

    def receive_data(self, data: bytes) -> list[Control]:
        """What the client wishes, in order of arrival."""
        return self._control.receive_data(data)

    def data_to_send(self) -> list[bytes]:
        """Take what was written since the last call: one piece, unless there is a large item, which is not copied into one."""
        out = self.out
        if not out:
            return out
        self.out = []
        if self._large:
            self._large = False
            self._left += sum(map(len, out))
            return out
        whole = out if len(out) == 1 else [b"".join(out)]
        self._left += len(whole[0])
        return whole


class _Stage(Enum):
    """Which frames may come next."""

    PROLOGUE = 0
    ITEMS = 1
    FINAL = 2
    """the final frame came, the sentinel is due"""
    FAILED = 3
    """an error item came; what follows up to the sentinel is of no interest"""


_ITEMS = _Stage.ITEMS
"""A global is looked up faster than an enum's member."""


class _BadItem(PeerProtocolError):
    """An item that cannot be read: the stream ends with this error, for no other instance would be asked differently."""


class ResponseReader:
    """The client's end, behind the handshake. One per request, made before the request is sent.

    `full`: more frames have arrived than the receiver's window takes; stop reading the connection, and call `resume` when the
    application took what there was. `closed`: send what `data_to_send` gives and close the connection.
    """

    __slots__ = ("_decode", "_frames", "_held", "_out", "_receiver", "_stage", "_stopping", "_window", "closed")

    def __init__(
        self,
        receiver: Receiver,
        *,
        codec: Codec = "json",
        limit: int = MAX_ITEM_SIZE,
        window: int = WINDOW,
    ) -> None:
        self._receiver = receiver
        self._decode = item_decoder(codec, receiver.item_type)
        self._frames = TwoPartParser(limit=limit)
        self._window = window
        self._held: Iterator[tuple[bytes, Data]] | None = None
        self._out: list[bytes] = []
        self._stage = _Stage.PROLOGUE
        self._stopping = False
        self.closed = False

    # -- from the worker --------------------------------------------------------------------------------------------------

    def connected(self) -> None:
        """The worker called home with the right subject."""
        self._receiver.advance(Phase.PROLOGUE)

    def receive_data(self, data: bytes) -> None:
        """Take bytes; the receiver learns what they mean.

        Raises `PeerProtocolError` when they break the format: the stream has ended, the kill is queued and `closed` is set.
        """
        if self._held is not None:
            self._read(_NO_WINDOW)
        if not self.closed:
            self._held = self._frames.receive_data(data)
            self._read(self._window)

    @property
    def full(self) -> bool:
        return self._held is not None

    @property
    def writes(self) -> bool:
        """Whether `data_to_send` has something."""
        return bool(self._out)

    def resume(self) -> None:
        """Go on with frames that have arrived, as far as the window reaches. Raises like `receive_data`."""
        self._read(self._window)

    def receive_eof(self) -> None:
        """The connection ended, in whatever way. What has arrived is delivered first. Raises like `receive_data`."""
        self._read(_NO_WINDOW)
        if not self.closed:
            self._ended()

    def _read(self, window: int) -> None:
        """Run the frames held through the window; whatever goes wrong, the items before it are delivered."""
        if self._held is None:
            return
        items: list[Any] = []
        try:
            self._read_frames(self._held, items, window - len(self._receiver.items))
        except PeerProtocolError as error:
            self._deliver(items)
            if isinstance(error, _BadItem):
                self._receiver.finish(error)
            else:
                self._receiver.cut(f"the worker broke the protocol: {error.message}")
            self.kill()
            raise
        self._deliver(items)

    def _read_frames(self, frames: Iterator[tuple[bytes, Data]], items: list[Any], room: int) -> None:
        """Token path: one decode per item, one call into the receiver per chunk."""
        decode = self._decode
        if room <= 0 and self._stage is _ITEMS:
            return
        for header, payload in frames:
            if header or self._stage is not _ITEMS:
                self._deliver(items)
                self._read_other(header, payload)
                if self.closed:
                    return
            elif payload:
                try:
                    frame = decode(payload)
                except DECODE_ERRORS as error:
                    raise _BadItem(f"item frame of {len(payload)} bytes cannot be read: {error}") from error
                if isinstance(frame, tuple):
                    frame = ItemFrame(data=frame[0], complete_final=frame[1])
                item = frame.data
                if (
                    item is not None
                    and item.event is None
                    and item.error is None
                    and item.id is None
                    and item.comment is None
                    and not frame.complete_final
                ):
                    items.append(item.data)
                else:
                    self._read_special(frame, items)
                if len(items) >= room:
                    return
        self._held = None

    def _read_special(self, frame: ItemFrame[Any], items: list[Any]) -> None:
        """An item frame that is the last one, an error, annotated, or empty."""
        item = frame.data
        if item is None:
            if not frame.complete_final:
                raise _BadItem("an item frame without an item")
        elif item.event == "error" or item.error is not None:
            self._deliver(items)
            receiver = self._receiver
            receiver.finish(from_wire(item.error, comments=item.comment, phase=receiver.phase, instance=receiver.instance))
            self._stage = _Stage.FAILED
            return
        else:
            items.append(item.value)
        if frame.complete_final:
            self._stage = _Stage.FINAL

    def _read_other(self, header: bytes, payload: Data) -> None:
        """A frame that is no item, or stands where none may stand."""
        if self._stage is _Stage.PROLOGUE:
            self._read_prologue(header, payload)
        elif header:
            if header != SENTINEL_HEADER or payload:
                raise PeerProtocolError(f"control frame {header[:40]!r} with {len(payload)} bytes of data is not for a client")
            self._ended()
        elif payload and self._stage is _Stage.FINAL:
            raise _BadItem("an item frame after the final one")

    def _read_prologue(self, header: bytes, payload: Data) -> None:
        refusal = read_prologue(header, payload, instance=self._receiver.instance)
        if refusal is not None:
            self._receiver.finish(refusal)
            self._close()
            return
        self._stage = _Stage.ITEMS
        self._receiver.accept()
        if self._stopping:
            self._out.append(STOP)

    def _deliver(self, items: list[Any]) -> None:
        if items:
            self._receiver.receive(items)
            items.clear()

    def _ended(self) -> None:
        """The sentinel came or the connection ended: decide the outcome (`spec/10 §3.4, §3.5`)."""
        if self._stage is _Stage.FINAL or self._stopping:
            self._receiver.finish()
        elif self._stage is _Stage.PROLOGUE:
            self._receiver.cut("the worker disconnected before the response stream was established")
        else:
            self._receiver.cut("the stream ended before generation was complete")
        self._close()

    def _close(self) -> None:
        self.closed = True
        self._held = None

    # -- from the application -----------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask for a graceful end, at once or as soon as the handler runs. An end without final frame is no error then."""
        if not self._stopping:
            self._stopping = True
            if self._stage is not _Stage.PROLOGUE and not self.closed:
                self._out.append(STOP)

    def kill(self) -> None:
        """Want nothing more. The receiver is left alone: its owner has ended it."""
        if not self.closed:
            self._out.append(KILL)
            self._close()

    def data_to_send(self) -> bytes:
        """Take what is to be written to the worker."""
        out, self._out = self._out, []
        return b"".join(out)
