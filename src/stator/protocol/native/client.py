"""The dialling end: opens streams, feeds their receivers, returns credit."""

from collections.abc import Callable
from struct import Struct

import msgspec

from stator.config import Secret
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
    OPEN,
    QUEUED,
    REFUSE,
    STOP,
    frame,
    pack_header,
)
from stator.protocol.native.hello import Goaway, Hello
from stator.protocol.native.incoming import Incoming
from stator.protocol.native.inputs import InputSender
from stator.protocol.native.liveness import LivenessLimits
from stator.protocol.native.outgoing import RequestSender
from stator.protocol.native.problem import decode_error
from stator.protocol.native.session import Session
from stator.protocol.stream import Phase, Receiver

__all__ = ["ClientSession", "ClientStream"]

_OPENING = Struct(">IH").pack
_MAX_HEAD = 65000
_MAX_STREAM = 2**32 - 1

_ENCODE_ERRORS = (msgspec.MsgspecError, TypeError, ValueError, RecursionError)

MakeSender = Callable[[Session, int], InputSender]

_encode_head = msgspec.json.Encoder().encode


class ClientStream(Incoming):
    """One open request; the `StreamLink` of its inbox. `sender` carries the inputs of a bidirectional one."""

    __slots__ = ("_client", "_request", "sender")

    def __init__(self, session: "ClientSession", number: int, receiver: Receiver, window: int) -> None:
        super().__init__(session, number, receiver, window)
        self._client = session
        self._request: RequestSender | None = None
        self.sender: InputSender | None = None

    # -- StreamLink

    def stop(self) -> None:
        request = self._request
        if request is not None and request.queued:  # the handler was not called yet
            self._client.kill(self)
            self.receiver.finish()
        elif not self.receiver.ended:
            if self.sender is not None:  # the stop ends the inputs too
                self.sender.close()
            self._client.outgoing.control(frame(STOP, self.number))

    def kill(self) -> None:
        self._client.kill(self)

    def send_later(self, opening: bytes, payload: bytes) -> None:
        """Queue the OPEN among the stream data: it is large, or the transport is paused."""
        self._request = RequestSender(self.number, opening, payload)
        self._client.outgoing.ready(self._request)

    def withdraw(self) -> bool | None:
        """Send no more of the request. None: it has left as a whole; else whether a part of it has left."""
        request, self._request = self._request, None
        if request is None or not request.queued:
            return None
        self._client.outgoing.remove(request)
        return request.started

    def mistyped(self, error: PeerProtocolError) -> None:
        self._client.kill(self)
        self.receiver.finish(error)


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
        secret: Secret | None = None,
    ) -> None:
        super().__init__(hello=hello, limits=limits, now=now, wake=wake, hurry=hurry, greeted=greeted, secret=secret)
        self.streams: dict[int, ClientStream] = {}
        self.killed: set[int] = set()
        self._budget = budget
        self._last = _MAX_STREAM
        self._away = away

    @property
    def open_streams(self) -> int:
        return len(self.streams)

    def open(self, path: str, envelope: RequestEnvelope, receiver: Receiver, sender: MakeSender | None = None) -> ClientStream:
        """Queue an OPEN; the answer goes to `receiver`. The peer's HELLO must have arrived. `sender` is given for a bidirectional
        request, whose envelope has no payload: it makes what its inputs are sent through.

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
        if sender is not None:
            stream.sender = sender(self, number)
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
            elif kind not in (ACCEPT, ITEMS, CREDIT, QUEUED):
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
        elif kind == QUEUED:
            stream.receiver.advance(Phase.PROLOGUE)
        elif kind == REFUSE:
            if stream.withdraw():
                self.outgoing.control(frame(KILL, number))  # the worker need not wait for the rest of the request
            self.forget(stream)
            stream.receiver.finish(decode_error(payload, instance=stream.receiver.instance))
        elif kind != CREDIT:
            self.unknown(kind, flags)
        elif stream.sender is not None:
            stream.sender.credit_frame(payload)

    def forget(self, stream: ClientStream) -> None:
        """The stream is over on both sides."""
        if self.streams.pop(stream.number, None) is not None:
            stream.release(self._budget)
            if stream.sender is not None:
                stream.sender.close()

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
