"""The answering end: takes OPENs to their endpoint, sends items and ends under the client's credit."""

import logging
from collections.abc import Callable
from struct import Struct
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from stator.config import Secret
from stator.errors import Cancelled, EngineError, Overloaded, PeerProtocolError, StatorError, Unavailable
from stator.protocol.envelope import IncomingRequest
from stator.protocol.native.budget import ByteBudget
from stator.protocol.native.frames import CREDIT, END, ITEMS, KILL, MAX_PAYLOAD, MORE, OPEN, QUEUED, REFUSE, STOP, frame
from stator.protocol.native.hello import Goaway, Hello
from stator.protocol.native.incoming import MOST_CREDIT, read_credit
from stator.protocol.native.inputs import InputReader
from stator.protocol.native.liveness import LivenessLimits
from stator.protocol.native.outgoing import Sender
from stator.protocol.native.problem import encode_error
from stator.protocol.native.session import Session
from stator.protocol.stream import Receiver
from stator.protocol.values import decode_value

__all__ = ["ServerSession", "ServerStream"]

logger = logging.getLogger(__name__)

_OPENING = Struct(">IH")
_Head = tuple[str, str, dict[str, str], dict[str, str], float | None]
_decode_head = msgspec.json.Decoder(_Head).decode


class Control(Protocol):
    """What may be done to a running request (`stator.transports.plane.RequestControl`)."""

    def stop(self) -> None: ...

    def kill(self) -> None: ...


class Sink(Protocol):
    """Who takes the requests of an endpoint (`stator.transports.plane.RequestSink`)."""

    def __call__(self, request: IncomingRequest, responder: Any, /) -> Control: ...

    def malformed(self, size: int, kind: Literal["deserialization"]) -> None: ...


class ServerStream(Sender):
    """One request being answered. `accept`, `end` and `refuse` are the sans-IO half of a `Responder`."""

    __slots__ = ("_session", "control", "dead", "inputs")

    def __init__(self, session: "ServerSession", number: int, credit: int) -> None:
        super().__init__(session.outgoing, number, credit)
        self.control: Control | None = None
        """the running request, which has this as its responder: let go of at the end, or each request were a cycle for the collector"""
        self.dead = False
        """nothing more leaves: ended, refused, killed or cut"""
        self.inputs: InputReader | None = None
        """a bidirectional request's, until it is over"""
        self._session = session

    def take_back_oversized(self) -> None:
        """`EngineError` when the item pushed last is larger than the client accepts: it is not sent."""
        peer = self._session.peer
        if peer is not None and (size := self.take_back(above=peer.limits.item)):
            raise EngineError(f"an item has {size} bytes, the caller accepts {peer.limits.item}")

    def accept(self) -> None:
        if not self.dead:
            if self.inputs is not None:
                self.inputs.open(self._session.budget.window())
            self.accepting = True
            if not self.queued:
                self.queued = True
                self.outgoing.ready(self)

    def wait(self) -> None:
        if not self.dead:
            self.outgoing.control(frame(QUEUED, self.number))

    def start(self) -> None:
        """Nothing is held back while a request waits."""

    def refuse(self, error: StatorError) -> None:
        if not self.dead:
            self._close()
            self.control = None
            self.outgoing.control(frame(REFUSE, self.number, encode_error(error)))

    def end(self, error: StatorError | None = None) -> None:
        if not self.dead:
            self._close()
            self.control = None
            self.finish(b"" if error is None else encode_error(error))

    def cancel(self) -> None:
        """KILL arrived: answer it, drop what is queued, tell the handler."""
        if not self.dead:
            self._close()
            self.drop()
            self.outgoing.control(frame(END, self.number, encode_error(Cancelled("killed by the client"))))
            self.abandon()

    def abandon(self) -> None:
        """Nobody listens any more: tell the handler."""
        self.dead = True
        self._end_inputs()
        self.credited()
        control, self.control = self.control, None
        if control is not None:
            control.kill()

    def _close(self) -> None:
        self.dead = True
        self._session.streams.pop(self.number, None)
        self._end_inputs()
        self.credited()  # who waits for leave to send: the stream is forgotten here, nobody else will tell

    def _end_inputs(self) -> None:
        inputs, self.inputs = self.inputs, None
        if inputs is not None:
            inputs.release(self._session.budget)
            inputs.receiver.finish(Cancelled("the request has ended"))


S = TypeVar("S", bound=ServerStream)


class _Arriving:
    """An OPEN of several frames. `refused`: its rest is skipped."""

    __slots__ = ("body", "refused")

    def __init__(self) -> None:
        self.body = bytearray()
        self.refused = False

    def refuse(self) -> int:
        """Let go of what has arrived; returns its bytes."""
        size = len(self.body)
        self.body = bytearray()
        self.refused = True
        return size


def _plain_inputs(session: Session, number: int) -> InputReader:
    return InputReader(session, number, Receiver())


class ServerSession(Session):
    """Streams of one connection, seen from the worker. `lookup(path)` finds the sink of an endpoint, `make` builds its responder and
    `make_inputs` what its inputs are read with, whose receiver is the body of a bidirectional request.
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
        lookup: Callable[[str], Sink | None],
        make: Callable[["ServerSession", int, int], ServerStream] = ServerStream,
        make_inputs: Callable[[Session, int], InputReader] = _plain_inputs,
        secret: Secret | None = None,
    ) -> None:
        super().__init__(hello=hello, limits=limits, now=now, wake=wake, hurry=hurry, greeted=greeted, secret=secret)
        self.streams: dict[int, ServerStream] = {}
        self.last = 0
        """the stream id taken last"""
        self.draining = False
        self.budget = budget
        self._lookup = lookup
        self._make = make
        self._make_inputs = make_inputs
        self._arriving: dict[int, _Arriving] = {}

    @property
    def open_streams(self) -> int:
        return len(self.streams) + len(self._arriving)

    def stream_frame(self, kind: int, flags: int, count: int, number: int, payload: bytes) -> None:
        if kind == OPEN:
            self._open_frame(flags, number, payload)
            return
        stream = self.streams.get(number)
        if kind == CREDIT:
            amount = read_credit(payload)
            if stream is not None:
                stream.grant(amount)
                if stream.credit > MOST_CREDIT:
                    raise PeerProtocolError(
                        f"stream {number} was granted {stream.credit} bytes in all, allowed are {MOST_CREDIT}"
                    )
        elif kind == KILL:
            if stream is not None:
                stream.cancel()
            else:
                self._kill_arriving(number)
        elif kind == STOP:
            if stream is not None and stream.control is not None:
                stream.control.stop()
        elif kind == ITEMS:
            if stream is not None and stream.inputs is not None:
                stream.inputs.input_frame(flags, count, payload)
        elif kind == END:
            if stream is not None and stream.inputs is not None:
                if payload:  # the caller could not make its inputs: as if killed
                    stream.cancel()
                else:
                    stream.inputs.end()
        else:
            self.unknown(kind, flags)

    def _open_frame(self, flags: int, number: int, payload: bytes) -> None:
        if not number & 1:
            raise PeerProtocolError(f"stream id {number} is even")
        if number in self.streams:
            raise PeerProtocolError(f"stream id {number} is in use")
        arriving = self._arriving.get(number)
        if arriving is None and not flags & MORE:
            self._open(number, payload)
            return
        if flags & MORE and len(payload) != MAX_PAYLOAD:
            raise PeerProtocolError(f"a fragment of OPEN has {len(payload)} bytes instead of {MAX_PAYLOAD}")
        if arriving is None:
            if self.open_streams >= self.hello.limits.streams:
                raise PeerProtocolError(f"more than {self.hello.limits.streams} streams")
            arriving = self._arriving[number] = _Arriving()
        if not arriving.refused:
            self._collect(arriving, number, payload)
        if not flags & MORE and not self._drop_arriving(number).refused:
            self._open(number, memoryview(arriving.body))

    def _collect(self, arriving: _Arriving, number: int, payload: bytes) -> None:
        if len(arriving.body) + len(payload) > self.hello.limits.request + 2 * MAX_PAYLOAD:
            raise PeerProtocolError(f"request is larger than {self.hello.limits.request} bytes")
        try:
            self.budget.take(len(payload))
        except Overloaded as error:
            self.budget.give(arriving.refuse())
            self.outgoing.control(frame(REFUSE, number, encode_error(error)))
            return
        arriving.body += payload

    def _kill_arriving(self, number: int) -> None:
        if number in self._arriving and not self._drop_arriving(number).refused:  # else REFUSE was its answer
            self.outgoing.control(frame(END, number, encode_error(Cancelled("killed by the client"))))

    def _drop_arriving(self, number: int) -> _Arriving:
        arriving = self._arriving.pop(number)
        self.budget.give(len(arriving.body))
        return arriving

    def _open(self, number: int, body: bytes | memoryview) -> None:
        if len(body) < _OPENING.size:
            raise PeerProtocolError(f"OPEN has only {len(body)} bytes")
        credit, head_length = _OPENING.unpack_from(body)
        if not credit:
            raise PeerProtocolError("OPEN grants no credit")
        start = _OPENING.size + head_length
        if start > len(body):
            raise PeerProtocolError(f"OPEN announces a head of {head_length} bytes and has {len(body) - _OPENING.size}")
        try:
            path, id, metadata, headers, deadline = _decode_head(body[_OPENING.size : start])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise PeerProtocolError(f"head of OPEN cannot be read: {error}") from error
        if len(self.streams) >= self.hello.limits.streams:
            raise PeerProtocolError(f"more than {self.hello.limits.streams} streams")
        self.last = number
        stream = self._make(self, number, credit)
        self.streams[number] = stream
        try:
            sink = self._lookup(path)
            if sink is None:
                raise Unavailable(f"unknown endpoint {path!r}")
            if self.draining:
                raise Unavailable("the worker is draining")
            streams_in = start == len(body)
            if streams_in:
                stream.inputs = self._make_inputs(self, number)
            request = IncomingRequest(
                id=id,
                body=self._read_value(sink, body, start) if stream.inputs is None else stream.inputs.receiver,
                metadata=metadata,
                headers=headers,
                deadline=deadline,
                size=len(body) - start,
                streams_in=streams_in,
            )
            control = sink(request, stream)
        except StatorError as error:
            stream.refuse(error)
            return
        except Exception as error:  # whatever a sink does: the other streams of the connection go on
            logger.exception("request %s could not be taken", id)
            stream.refuse(StatorError(f"the worker could not take the request: {type(error).__name__}"))
            return
        if not stream.dead:
            stream.control = control

    def _read_value(self, sink: Sink, body: bytes | memoryview, start: int) -> Any:
        try:
            return decode_value(body[start:], "json")
        except StatorError:
            sink.malformed(len(body) - start, "deserialization")
            raise

    def greeted(self) -> None:
        if self.draining:
            self.say_goodbye(Goaway(last=self.last, reason="draining"))

    def drain(self) -> None:
        """Refuse what comes from now on, and say so: at once, or as soon as the client's HELLO is here."""
        if not self.draining:
            self.draining = True
            if self.peer is not None:
                self.greeted()

    def close(self) -> None:
        """The connection is over: tell every handler."""
        for number in list(self._arriving):
            self._drop_arriving(number)
        streams = list(self.streams.values())
        self.streams.clear()
        for stream in streams:
            stream.abandon()
