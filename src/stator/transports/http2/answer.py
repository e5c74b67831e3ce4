"""One request that came with its stream: its body is read, its answer is the response body (`docs/http2-plane.md §3`)."""

import asyncio
import logging
from typing import Any

from stator.errors import Cancelled, Overloaded, PeerProtocolError, StatorError, Timeout, Unavailable
from stator.protocol.envelope import IncomingRequest
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_frames import ErrorCode
from stator.protocol.http2_map import STREAM_TYPE, BodyReader, Fields, Inputs, Opening, Said, status_of
from stator.protocol.http2_session import Session
from stator.protocol.response_stream import ResponseWriter
from stator.protocol.values import decode_value
from stator.transports.http2.desk import Desk
from stator.transports.inputs import InputStream
from stator.transports.plane import Malformed, RequestControl, RequestSink
from stator.transports.tcp.headers import TRACE_HEADERS, read_deadline, read_sent_ns

__all__ = ["StreamAnswer"]

logger = logging.getLogger(__name__)

_MOST_QUEUED = 64
"""items that wait for a write; also how many a producer makes without letting the loop run"""

_TYPE = (b"content-type", STREAM_TYPE.encode())
_ACCEPTED = ((b":status", b"200"), _TYPE)


class StreamAnswer(Exchange):
    """`Responder` of one request, and the worker's end of its stream."""

    __slots__ = (
        "_accepted",
        "_charged",
        "_control",
        "_desk",
        "_ended",
        "_facts",
        "_inputs",
        "_path",
        "_queued",
        "_reader",
        "_session",
        "_sink",
        "_size",
        "_waiter",
        "_writer",
    )

    def __init__(self, desk: Desk, session: Session, path: str | None, facts: dict[str, str]) -> None:
        """`facts`: the request's header fields. `path`: None when no endpoint of ours was asked for."""
        super().__init__()
        self._desk = desk
        self._session = session
        self._path = path
        self._facts = facts
        self._sink: RequestSink | None = None if path is None else desk.sinks.get(path)
        self._reader = BodyReader(limit=desk.config.max_request)
        self._writer = ResponseWriter(subject="", codec="json")
        self._writer.data_to_send()  # nobody is called: no handshake
        self._control: RequestControl | None = None
        self._inputs: InputStream | None = None
        self._charged = 0
        """bytes of an unfinished frame"""
        self._size = 0
        """bytes up to the end of the first frame, or a little more"""
        self._queued = 0
        self._accepted = False
        """whether the response's fields were sent"""
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    # -- the request -------------------------------------------------------------------------------------------------------

    def headers(self, fields: Fields) -> None:
        if self._desk.draining:
            self._turn_away(Unavailable("the worker is shutting down"))
        elif self._sink is None:
            self._turn_away(Unavailable("no such endpoint is served here"), status=404)

    def data(self, data: bytes) -> None:
        if self._ended:
            return  # dropped, and the window closes
        if not self._reader.opened:
            self._size += len(data)
        try:
            for event in self._reader.receive_data(data):
                self._hear(event)
            self._charge(self._reader.unfinished)
        except PeerProtocolError as error:
            self._malformed(error, "invalid_message")
        except Overloaded as error:
            self._fail(error)
        if self._inputs is None or not self._inputs.items:
            self.release()

    def _charge(self, size: int) -> None:
        """What is held of an unfinished frame counts against the space for requests. Raises `Overloaded`."""
        more = size - self._charged
        if more > 0:
            self._desk.budget.take(more)
        else:
            self._desk.budget.give(-more)
        self._charged = size

    def _hear(self, event: Opening | Inputs | Said) -> None:
        if self._ended:
            return
        if isinstance(event, Opening):
            self._session.has_arrived(self)
            self._open(event)
        elif isinstance(event, Inputs):
            if self._inputs is not None:
                self._inputs.receive(event.items)
        elif event is Said.KILL:
            self._kill()
            self.reset(ErrorCode.CANCEL)
        else:
            if self._inputs is not None:
                self._inputs.finish()
            if event is Said.STOP and self._control is not None:
                self._control.stop()

    def _open(self, opening: Opening) -> None:
        """Hand the request to its sink, or refuse it."""
        sink, head = self._sink, opening.head
        assert sink is not None  # requests for other endpoints were turned away
        if head.streams_in:
            body = self._inputs = InputStream(wheel=self._desk.wheel, limit=self._desk.input_timeout)
            body.link = self
        else:
            try:
                body = decode_value(opening.payload, "json")
            except PeerProtocolError as error:
                self._malformed(error, "deserialization")
                return
        request = IncomingRequest(
            id=head.id,
            body=body,
            metadata=head.metadata,
            headers={name: self._facts[name] for name in TRACE_HEADERS if name in self._facts},
            deadline=read_deadline(self._facts),
            size=self._size,
            sent_ns=read_sent_ns(self._facts),
            streams_in=head.streams_in,
        )
        try:
            control = sink(request, self)
        except StatorError as error:
            self._turn_away(error)
        except Exception as error:  # a sink that is closing, or a bug in it: the connection carries other requests
            logger.exception("request %s could not be started", head.id)
            self._turn_away(StatorError(f"the request could not be started: {error}"))
        else:
            self._control = control
            if self._ended and self.session is None:
                control.kill()

    def _malformed(self, error: PeerProtocolError, kind: Malformed) -> None:
        """The body cannot be read: refused, or, behind the request itself, killed."""
        if self._control is None and self._sink is not None and not self._ended:
            self._sink.malformed(self._size, kind)
        self._fail(error)

    def _fail(self, error: StatorError) -> None:
        """What the caller sent cannot be taken: refuse the request, or end the answer with the error."""
        control = self._control
        if control is None:
            self._turn_away(error)
            return
        logger.warning("request for %s ended: %s", self._path, error)
        self.end(error)
        control.kill()

    def _turn_away(self, error: StatorError, *, status: int = 0) -> None:
        """Refuse; what the caller still sends is dropped."""
        if not self._ended:
            logger.info("request for %s refused: %s", self._path, error)
            self._respond(status or status_of(error))
            self._writer.refuse(error)
            self._end()

    def ended(self) -> None:
        """The caller says nothing more. Before the end of the inputs, that is a stop."""
        if not self._reader.opened:
            self._malformed(PeerProtocolError("the request body ended inside of its first frame"), "invalid_message")
        elif self._reader.inputs_due:
            if self._inputs is not None:
                self._inputs.finish()
            if self._control is not None:
                self._control.stop()

    def too_slow(self, limit: float) -> None:
        self._turn_away(Timeout(f"the request did not arrive within {limit:g} s", phase="accept"))

    def lost(self, error: StatorError) -> None:
        self._kill()

    # -- Responder ---------------------------------------------------------------------------------------------------------

    @property
    def sent_items(self) -> int:
        return self._writer.sent_items

    @property
    def sent_bytes(self) -> int:
        return self._writer.sent_bytes

    def wait(self) -> None:
        self._respond(200)  # the prologue follows when the request has its slot

    def start(self) -> None:
        """Nothing is dialled here."""

    def accept(self) -> None:
        if not self._ended:
            self._respond(200)
            self._writer.accept()
            self._session.want(self)

    def refuse(self, error: StatorError) -> None:
        self._turn_away(error)

    def send(self, item: Any) -> bool:
        """Token path: one encode, one list append."""
        if self._ended:
            return False
        self._writer.send(item)
        self._queued = queued = self._queued + 1
        if queued == 1:
            self._session.want(self)
        return queued < _MOST_QUEUED and not self.pending and self._session.writable

    async def ready(self) -> None:
        await asyncio.sleep(0)
        while not self._ended and (self.pending or self._queued >= _MOST_QUEUED or not self._session.writable):
            self._waiter = self._desk.wheel.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def end(self, error: StatorError | None = None) -> None:
        if not self._ended:
            self._writer.end(error)
            self._end()

    def _respond(self, status: int) -> None:
        if not self._accepted:
            self._accepted = True
            if status != 200:
                self._desk.count(str(status))
            fields = _ACCEPTED if status == 200 else ((b":status", b"%d" % status), _TYPE)
            self._session.respond(self, fields)

    def _end(self) -> None:
        """The sentinel is written: leave the rest to the session."""
        self._session.has_arrived(self)
        self.produce()
        self.finish()
        self._conclude("the request has ended")

    def _kill(self) -> None:
        control = None if self._ended else self._control
        self._conclude("the request was killed")
        if control is not None:
            control.kill()

    def _conclude(self, why: str) -> None:
        self._ended = True
        self._charge(0)
        inputs, self._inputs = self._inputs, None
        if inputs is not None:
            inputs.finish(Cancelled(why))
        self._control = None
        self._release_waiter()

    # -- sending

    def produce(self) -> None:
        for data in self._writer.data_to_send():
            self.push(data)
        if not self._ended:
            self._queued = 0

    def drained(self) -> None:
        self._release_waiter()

    def _release_waiter(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- StreamLink of the inputs

    def stop(self) -> None:
        """The caller hears of the answer's end instead."""

    def kill(self) -> None:
        """The handler reads no more: the window closes."""

    def taken(self) -> None:
        self.release()
