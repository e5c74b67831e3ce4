"""The dialling end: opens streams, feeds their receivers, returns credit."""

from collections.abc import Callable
from functools import cache
from struct import Struct
from typing import Any

import msgspec

from stator.errors import Disconnected, Overloaded, PeerProtocolError, UsageError
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.native.budget import ByteBudget
from stator.protocol.native.frames import (
    ACCEPT,
    CREDIT,
    END,
    ITEMS,
    KILL,
    LAST,
    MAX_PAYLOAD,
    MORE,
    OPEN,
    REFUSE,
    STOP,
    frame,
    pack_header,
)
from stator.protocol.native.hello import Goaway, Hello
from stator.protocol.native.liveness import LivenessLimits
from stator.protocol.native.outgoing import ITEM_OVERHEAD, RequestSender
from stator.protocol.native.problem import decode_error
from stator.protocol.native.session import Session
from stator.protocol.stream import Phase, Receiver
from stator.protocol.values import DECODE_ERRORS

__all__ = ["ClientSession", "ClientStream"]

_CREDIT = Struct(">I").pack
_OPENING = Struct(">IH").pack
_MAX_HEAD = 65000
_MAX_STREAM = 2**32 - 1

_ENCODE_ERRORS = (msgspec.MsgspecError, TypeError, ValueError, RecursionError)

_encode_head = msgspec.json.Encoder().encode


@cache
def _decoders(item_type: Any) -> tuple[Callable[[bytes], list[Any]], Callable[[bytes], Any]]:
    """How to read an ITEMS frame, and one item, of a type."""
    decoder = msgspec.json.Decoder(item_type)
    return decoder.decode_lines, decoder.decode


class ClientStream:
    """One open request; the `StreamLink` of its inbox."""

    __slots__ = (
        "_fragments",
        "_lines",
        "_one",
        "_request",
        "_session",
        "_uncredited",
        "_unread",
        "_window",
        "number",
        "receiver",
    )

    def __init__(self, session: "ClientSession", number: int, receiver: Receiver, window: int) -> None:
        self.number = number
        self.receiver = receiver
        self._session = session
        self._window = window
        self._uncredited = 0
        self._unread = 0
        self._fragments: list[bytes] | None = None
        self._request: RequestSender | None = None
        self._lines, self._one = _decoders(receiver.item_type)

    # -- StreamLink

    def stop(self) -> None:
        request = self._request
        if request is not None and request.queued:  # the handler was not called yet
            self._session.kill(self)
            self.receiver.finish()
        elif not self.receiver.ended:
            self._session.outgoing.control(frame(STOP, self.number))

    def kill(self) -> None:
        self._session.kill(self)

    def taken(self) -> None:
        self._uncredited += self._unread
        self._unread = 0
        if self._uncredited * 2 >= self._window:
            self._return_credit()

    def send_later(self, opening: bytes, payload: bytes) -> None:
        """Queue the OPEN among the stream data: it is large, or the transport is paused."""
        self._request = RequestSender(self.number, opening, payload)
        self._session.outgoing.ready(self._request)

    def withdraw(self) -> bool | None:
        """Send no more of the request. None: it has left as a whole; else whether a part of it has left."""
        request, self._request = self._request, None
        if request is None or not request.queued:
            return None
        self._session.outgoing.remove(request)
        return request.started

    # -- frames

    def items(self, flags: int, count: int, payload: bytes) -> None:
        """An ITEMS frame. Token path: one decode and one call into the receiver."""
        if flags & MORE or self._fragments is not None:
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
        if self._fragments is None:
            if self._unread + self._uncredited >= self._window:
                raise PeerProtocolError(f"stream {self.number} began an item without credit")
            self._fragments = []
            self.receiver.accept()
        self._fragments.append(payload)
        if flags & MORE:
            self._check_fragment(flags, count, payload)
            return
        whole = b"".join(self._fragments)
        self._fragments = None
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
        assert self._fragments is not None
        if len(self._fragments) * MAX_PAYLOAD > self._session.hello.limits.item:
            raise PeerProtocolError(f"item is larger than {self._session.hello.limits.item} bytes")

    def _return_credit(self) -> None:
        self._session.outgoing.control(frame(CREDIT, self.number, _CREDIT(self._uncredited)))
        self._uncredited = 0

    def _undecodable(self, error: Exception) -> None:
        """Items that are JSON but not of the caller's type end this stream only; anything else is a broken peer."""
        if not isinstance(error, msgspec.ValidationError):
            raise PeerProtocolError(f"ITEMS frame of stream {self.number} is not JSON: {error}") from error
        self._session.kill(self)
        self.receiver.finish(PeerProtocolError(f"item does not fit {self.receiver.item_type}: {error}"))

    @property
    def in_mid_item(self) -> bool:
        """Whether a part of an item has arrived and its rest has not."""
        return self._fragments is not None

    def release(self, budget: ByteBudget) -> None:
        """The stream is over for the client: return its window."""
        budget.give(self._window)
        self._window = 0
        self._fragments = None


class ClientSession(Session):
    """Streams of one connection, seen from the client.

    `streams` are open; `killed` are ids whose END has not come yet. Both together are limited by the peer's HELLO.
    """

    def __init__(
        self,
        *,
        hello: Hello,
        limits: LivenessLimits,
        now: float,
        wake: Callable[[], None],
        hurry: Callable[[], None],
        greeted: Callable[[], None],
        budget: ByteBudget,
        away: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(hello=hello, limits=limits, now=now, wake=wake, hurry=hurry, greeted=greeted)
        self.streams: dict[int, ClientStream] = {}
        self.killed: set[int] = set()
        self._budget = budget
        self._last = _MAX_STREAM
        self._away = away

    @property
    def open_streams(self) -> int:
        return len(self.streams)

    def open(self, path: str, envelope: RequestEnvelope, receiver: Receiver) -> ClientStream:
        """Queue an OPEN; the answer goes to `receiver`. The peer's HELLO must have arrived.

        Raises `UsageError` when the request is larger than the peer takes or its head cannot be written, `Overloaded` when the
        connection has no stream id left. Nothing was queued then.
        """
        peer = self.peer
        assert peer is not None, "open() before the peer's HELLO"
        if len(envelope.payload) > peer.limits.request:
            raise UsageError(f"the request has {len(envelope.payload)} bytes, the instance accepts {peer.limits.request}")
        if len(self.streams) + len(self.killed) >= peer.limits.streams:
            raise Overloaded(f"all {peer.limits.streams} streams of the connection are in use", instance=receiver.instance)
        try:
            head = _encode_head((path, envelope.id, envelope.metadata, envelope.headers, envelope.deadline))
        except _ENCODE_ERRORS as error:
            raise UsageError(f"request id, metadata or headers cannot be written as JSON: {error}") from error
        if len(head) > _MAX_HEAD:
            raise UsageError(f"request id, metadata and headers have {len(head)} bytes, allowed are {_MAX_HEAD}")
        number = self._number()
        window = self._budget.window()
        stream = self.streams[number] = ClientStream(self, number, receiver, window)
        opening = _OPENING(window, len(head)) + head
        size = len(opening) + len(envelope.payload)
        if size <= MAX_PAYLOAD and self.outgoing.writable:
            self.outgoing.control(b"".join((pack_header(size, OPEN, 0, 0, number), opening, envelope.payload)))
        else:
            stream.send_later(opening, envelope.payload)
        receiver.phase = Phase.ACCEPT
        return stream

    def _number(self) -> int:
        number = self._last
        while True:
            number = (number + 2) & _MAX_STREAM
            if number not in self.streams and number not in self.killed:
                self._last = number
                return number

    def stream_frame(self, kind: int, flags: int, count: int, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if stream is None:
            if kind in (END, REFUSE) or (kind == ITEMS and flags & LAST):
                self.killed.discard(number)
            elif kind not in (ACCEPT, ITEMS, CREDIT):
                self.unknown(kind, flags)
        elif kind == ITEMS:
            if flags & LAST:
                stream.items(flags, count, payload)
                self.forget(stream)
                stream.receiver.finish()
                if self.killed:  # its items may have been refused by their reader
                    self.killed.discard(number)
            else:
                stream.items(flags, count, payload)
        elif kind == END:
            if stream.in_mid_item and not payload:
                raise PeerProtocolError(f"stream {number} ended in the middle of an item")
            self.forget(stream)
            stream.receiver.finish(decode_error(payload, instance=stream.receiver.instance) if payload else None)
        elif kind == ACCEPT:
            stream.receiver.accept()
        elif kind == REFUSE:
            if stream.withdraw():
                self.outgoing.control(frame(KILL, number))  # the worker need not wait for the rest of the request
            self.forget(stream)
            stream.receiver.finish(decode_error(payload, instance=stream.receiver.instance))
        elif kind != CREDIT:
            self.unknown(kind, flags)

    def forget(self, stream: ClientStream) -> None:
        """The stream is over on both sides."""
        if self.streams.pop(stream.number, None) is not None:
            stream.release(self._budget)

    def kill(self, stream: ClientStream) -> None:
        """The stream is over for us; its id stays taken until the worker's END, unless nothing of the request had left."""
        if stream.number in self.streams:
            self.forget(stream)
            if stream.withdraw() is not False:
                self.killed.add(stream.number)
                self.outgoing.control(frame(KILL, stream.number))

    def went_away(self, goaway: Goaway) -> None:
        """A draining worker answers what is open; one that saw broken bytes or is full answers nothing more."""
        if not goaway.drains:
            self.close(f"the worker closed the connection: {goaway.reason}")
        elif self._away is not None:
            self._away()

    def close(self, reason: str) -> None:
        """The connection is over: cut every stream."""
        self.killed.clear()
        streams = list(self.streams.values())
        for stream in streams:
            self.forget(stream)
            stream.receiver.cut(reason)

    def refuse_unaccepted(self, instance: int, reason: str) -> None:
        """The instance left discovery: fail what it has not accepted, leave the rest alone."""
        for stream in list(self.streams.values()):
            receiver = stream.receiver
            if receiver.instance == instance and receiver.phase < Phase.FIRST_ITEM:
                self.kill(stream)
                receiver.finish(Disconnected(reason, instance=instance, phase=receiver.phase.label))
