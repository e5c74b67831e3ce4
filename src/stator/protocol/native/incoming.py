"""What arrives on one stream in one direction: items, fragments, and the credit that goes back (`docs/native-plane.md §6`).

The client reads answers by it, the worker the inputs of a bidirectional request.
"""

from collections.abc import Callable
from functools import cache
from struct import Struct
from typing import Any

import msgspec

from stator.errors import PeerProtocolError
from stator.protocol.native.budget import ByteBudget
from stator.protocol.native.frames import CREDIT, LAST, MAX_PAYLOAD, MORE, frame
from stator.protocol.native.outgoing import ITEM_OVERHEAD
from stator.protocol.native.session import Session
from stator.protocol.stream import Receiver
from stator.protocol.values import DECODE_ERRORS

__all__ = ["MOST_CREDIT", "Incoming", "read_credit"]

MOST_CREDIT = 2**32 - 1
"""bytes a stream may have been granted at any time"""

_CREDIT = Struct(">I")


def read_credit(payload: bytes) -> int:
    """The bytes that a CREDIT frame grants."""
    if len(payload) != _CREDIT.size:
        raise PeerProtocolError(f"CREDIT has {len(payload)} bytes instead of {_CREDIT.size}")
    return _CREDIT.unpack(payload)[0]


@cache
def _decoders(item_type: Any) -> tuple[Callable[[bytes], list[Any]], Callable[[bytes | bytearray], Any]]:
    """How to read an ITEMS frame, and one item, of a type."""
    decoder = msgspec.json.Decoder(item_type)
    return decoder.decode_lines, decoder.decode


class Incoming:
    """The receiving half of one stream: decodes into `receiver`, counts what the application has not taken, returns credit."""

    __slots__ = ("_begun", "_lines", "_one", "_session", "_uncredited", "_unread", "_window", "number", "receiver")

    def __init__(self, session: Session, number: int, receiver: Receiver, window: int) -> None:
        self.number = number
        self.receiver = receiver
        self._session: Session = session
        self._window = window
        self._uncredited = 0
        self._unread = 0
        self._begun: bytearray | None = None
        self._lines, self._one = _decoders(receiver.item_type)

    def taken(self) -> None:
        """The application took what there was."""
        self._uncredited += self._unread
        self._unread = 0
        if self._uncredited * 2 >= self._window:
            self._grant(self._uncredited)
            self._uncredited = 0

    def _grant(self, amount: int) -> None:
        self._session.outgoing.control(frame(CREDIT, self.number, _CREDIT.pack(amount)))

    def items(self, flags: int, count: int, payload: bytes) -> None:
        """An ITEMS frame. Token path: one decode and one call into the receiver."""
        if flags & MORE or self._begun is not None:
            self._fragment(flags, count, payload)
            return
        try:
            values = self._lines(payload)
        except DECODE_ERRORS as error:
            self._undecodable(error)
            return
        if len(values) != count:
            raise PeerProtocolError(f"ITEMS frame announces {count} items and holds {len(values)}")
        self._unread += len(payload) + ITEM_OVERHEAD * count
        if self._unread > self._window + 2 * MAX_PAYLOAD:
            raise PeerProtocolError(f"stream {self.number} sent {self._unread} bytes into a window of {self._window}")
        self.receiver.receive(values)

    def _fragment(self, flags: int, count: int, payload: bytes) -> None:
        """A part of an item above one frame. It was begun under credit, so all of it comes; it is charged when it is whole."""
        if self._begun is None:
            if self._unread + self._uncredited >= self._window:
                raise PeerProtocolError(f"stream {self.number} began an item without credit")
            self._begun = bytearray()
            self.receiver.accept()
        self._begun += payload
        if flags & MORE:
            self._check_fragment(flags, count, payload)
            return
        whole, self._begun = self._begun, None
        if count != 1:
            raise PeerProtocolError(f"the last fragment of an item announces {count} items")
        self._unread += len(whole) + ITEM_OVERHEAD
        try:
            value = self._one(whole)
        except DECODE_ERRORS as error:
            self._undecodable(error)
            return
        self.receiver.receive((value,))

    def _check_fragment(self, flags: int, count: int, payload: bytes) -> None:
        if len(payload) != MAX_PAYLOAD:
            raise PeerProtocolError(f"a fragment of an item has {len(payload)} bytes instead of {MAX_PAYLOAD}")
        if count or flags & LAST:
            raise PeerProtocolError("a fragment of an item can end neither an item nor the stream")
        assert self._begun is not None
        if len(self._begun) > self._session.hello.limits.item:
            raise PeerProtocolError(f"item is larger than {self._session.hello.limits.item} bytes")

    def _undecodable(self, error: Exception) -> None:
        """Items that are JSON but not of the reader's type end this stream only; anything else is a broken peer."""
        if not isinstance(error, msgspec.ValidationError):
            raise PeerProtocolError(f"ITEMS frame of stream {self.number} is not JSON: {error}") from error
        self.mistyped(PeerProtocolError(f"item does not fit {self.receiver.item_type}: {error}"))

    def mistyped(self, error: PeerProtocolError) -> None:
        """An item is JSON and not of the reader's type."""
        raise error

    @property
    def in_mid_item(self) -> bool:
        """Whether a part of an item has arrived and its rest has not."""
        return self._begun is not None

    def release(self, budget: ByteBudget) -> None:
        """Nothing more is wanted: return the window."""
        budget.give(self._window)
        self._window = 0
        self._begun = None
