"""One HTTP/2 connection without its socket: flow control by what is taken, turns, goodbyes, liveness (`docs/http2-plane.md`).

The library keeps the state of streams and windows; what is decided here is which bytes leave next, when windows are given back, and
what is too much.
"""

from collections.abc import Callable
from contextlib import suppress
from enum import Enum

from h2.events import (
    DataReceived,
    Event,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import H2Error, ProtocolError

from stator.errors import ConnectFailed, Disconnected, Overloaded, StatorError, Unavailable
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_frames import ErrorCode, FrameScanner, FrameViolation, Goaway, encode_goaway
from stator.protocol.http2_library import BROKEN, SessionLimits, library_connection, violation
from stator.protocol.http2_map import Fields
from stator.protocol.stream import Phase

__all__ = ["Session", "Verdict"]

_QUANTUM = 65_536
"""most bytes of one stream before the next one has its turn"""

_MOST_PER_FLUSH = 1_048_576
_LAST_STREAM = 2**31 - 1_000_001
"""from this number on a client's connection takes no new requests; ids do not come back"""


class Verdict(Enum):
    """What a look at the clock found."""

    FINE = 0
    IDLE = 1
    DEAD = 2


class Session:
    """Both sides of a connection: a client `open`s streams, a worker is given `accept`. Bytes collect until `data_to_send`."""

    def __init__(
        self,
        *,
        limits: SessionLimits,
        wake: Callable[[], None],
        now: float,
        accept: Callable[[Fields], Exchange] | None = None,
        gone_away: Callable[[Goaway], None] | None = None,
    ) -> None:
        """`accept` makes the worker's end of a stream from its fields; `gone_away` is told of each GOAWAY."""
        self._limits = limits
        self._wake = wake
        self._accept = accept
        self._gone_away = gone_away
        self._now = self._heard = self._used = now
        self._pinged: float | None = None
        self._tokens = limits.idle_burst
        self._tokens_at = now
        self._idle_seen = 0
        self._arriving: dict[Exchange, float] = {}
        self._lingering: dict[Exchange, float] = {}
        self._ready: dict[Exchange, None] = {}
        self._blocked: dict[Exchange, None] = {}
        self._owed: dict[Exchange, None] = {}
        """to whom window is to be given back"""
        self._behind: list[bytes] = []
        """frames of our own, behind the library's"""
        self._arrived = 0
        """bytes of the connection's window not given back"""
        self.streams: dict[int, Exchange] = {}
        self.writable = True
        """whether the socket takes more"""
        self.greeted = False
        """whether the other side's settings have arrived"""
        self.draining = False
        """whether nothing new is taken or sent"""
        self.resets = 0
        """streams that the other side reset"""
        self._scanner = FrameScanner(max_frame=limits.frame, max_block=2 * limits.header_list, preface=accept is not None)
        self._h2 = library_connection(limits, client=accept is None)

    # -- from the socket ----------------------------------------------------------------------------------------------------

    def receive_data(self, data: bytes, now: float) -> None:
        """Take bytes; exchanges learn what they mean. Raises `FrameViolation`: say goodbye and close."""
        self._now = self._heard = now
        self._pinged = None
        pieces = self._scanner.receive_data(data)
        self._spend(now)
        for piece in pieces:
            if isinstance(piece, Goaway):
                self._receive_goaway(piece)
                continue
            try:
                events = self._h2.receive_data(piece)
            except BROKEN as error:
                raise violation(error) from error
            for event in events:
                handle = _HANDLERS.get(type(event))
                if handle is not None:
                    handle(self, event)
        if self._arrived >= self._limits.connection_window // 4:
            self._h2.increment_flow_control_window(self._arrived)
            self._arrived = 0

    def _spend(self, now: float) -> None:
        """Frames that carry nothing are paid for from a bucket."""
        spent = self._scanner.idle_frames - self._idle_seen
        if not spent:
            return
        self._idle_seen = self._scanner.idle_frames
        limits = self._limits
        self._tokens = min(self._tokens + (now - self._tokens_at) * limits.idle_rate, limits.idle_burst) - spent
        self._tokens_at = now
        if self._tokens < 0:
            raise FrameViolation(
                f"more than {limits.idle_rate:g} frames per second that carry nothing (resets, pings, settings)",
                wire_code=ErrorCode.ENHANCE_YOUR_CALM,
            )

    def _receive_goaway(self, goaway: Goaway) -> None:
        if self._gone_away is not None:
            self._gone_away(goaway)
        if self._accept is None:  # what a client says of streams that the worker might open is of no interest
            self.draining = True
            for exchange in [each for number, each in self.streams.items() if number > goaway.last]:
                self._drop(exchange)
                exchange.lost(
                    Unavailable(
                        "the other side went away before it took the request", instance=exchange.instance, phase="accept"
                    )
                )
        self._wake()

    def _receive_settings(self, event: Event) -> None:
        self.greeted = True
        self._unblock_all()

    def _receive_request(self, event: Event) -> None:
        assert isinstance(event, RequestReceived) and self._accept is not None
        number = event.stream_id
        if self.draining:
            with suppress(ProtocolError):  # its client has reset it already
                self._h2.reset_stream(number, ErrorCode.REFUSED_STREAM)
            self._wake()
            return
        exchange = self._accept(event.headers)
        exchange.number, exchange.session = number, self
        self.streams[number] = exchange
        self._arriving[exchange] = self._now
        exchange.headers(event.headers)

    def _receive_response(self, event: Event) -> None:
        assert isinstance(event, ResponseReceived)
        exchange = self.streams.get(event.stream_id)
        if exchange is not None:
            exchange.headers(event.headers)

    def _receive_body(self, event: Event) -> None:
        assert isinstance(event, DataReceived)
        size = event.flow_controlled_length
        self._arrived += size
        exchange = self.streams.get(event.stream_id)
        if exchange is not None:
            exchange.held += size
            exchange.data(event.data)

    def _receive_end(self, event: Event) -> None:
        assert isinstance(event, StreamEnded)
        exchange = self.streams.get(event.stream_id)
        if exchange is not None:
            exchange.remote_ended = True
            if exchange.local_ended:
                self._drop(exchange)
            exchange.ended()

    def _receive_reset(self, event: Event) -> None:
        assert isinstance(event, StreamReset)
        exchange = self.streams.get(event.stream_id)
        if exchange is not None:
            self.resets += event.remote_reset
            self._drop(exchange)
            exchange.lost(_reset_error(int(event.error_code), event.remote_reset, exchange))

    def _receive_window(self, event: Event) -> None:
        assert isinstance(event, WindowUpdated)
        if not event.stream_id:
            self._unblock_all()
            return
        exchange = self.streams.get(event.stream_id)
        if exchange is not None:
            self.unblock(exchange)

    def _receive_pong(self, event: Event) -> None:
        """Being heard of was all that was wanted."""

    # -- streams -------------------------------------------------------------------------------------------------------------

    @property
    def room(self) -> bool:
        """Whether a client may open one more stream now."""
        return (
            self.greeted
            and not self.draining
            and len(self.streams) < min(self._limits.streams, self._h2.remote_settings.max_concurrent_streams)
            and self._h2.highest_outbound_stream_id < _LAST_STREAM
        )

    @property
    def spent(self) -> bool:
        """Whether no stream will ever be opened again."""
        return self.draining or self._h2.highest_outbound_stream_id >= _LAST_STREAM

    def open(self, exchange: Exchange, fields: Fields) -> None:
        """Open a stream (client); its body is what the exchange pushes. `room` must be true. Raises `ConnectFailed`; nothing was sent."""
        try:
            number = self._h2.get_next_available_stream_id()
            self._h2.send_headers(number, fields)
        except H2Error as error:
            raise ConnectFailed(
                f"the connection takes no stream: {error}", instance=exchange.instance, phase="connect"
            ) from error
        exchange.number, exchange.session = number, self
        self.streams[number] = exchange
        self._wake()

    def respond(self, exchange: Exchange, fields: Fields) -> None:
        """Send the response's fields, before what the exchange pushes (worker)."""
        if exchange.session is self:
            exchange.fields = fields
            self.want(exchange)

    def has_arrived(self, exchange: Exchange) -> None:
        """The exchange has its request: no deadline of arrival any more."""
        self._arriving.pop(exchange, None)

    def linger(self, exchange: Exchange) -> None:
        """This side is done with the exchange: it is reset when the other side does not end it soon."""
        if exchange.session is self:
            self._lingering.setdefault(exchange, self._now)

    def reset(self, exchange: Exchange, code: int) -> None:
        if exchange.session is not self:
            return
        self._drop(exchange)
        with suppress(ProtocolError):  # it ended both ways in the bytes that are being read, or the connection is broken
            self._h2.reset_stream(exchange.number, code)
        self._wake()

    def give_back(self, exchange: Exchange) -> None:
        if exchange.free >= self._limits.window // 2:
            self._owed[exchange] = None
            self._wake()

    def _drop(self, exchange: Exchange) -> None:
        exchange.session = None
        self.streams.pop(exchange.number, None)
        for queue in (self._ready, self._blocked, self._owed, self._arriving, self._lingering):
            queue.pop(exchange, None)
        self._used = self._now

    def close(self, reason: str) -> None:
        """The connection has ended: every exchange hears of it."""
        self.draining = True
        for exchange in tuple(self.streams.values()):
            self._drop(exchange)
            exchange.lost(Disconnected(reason, instance=exchange.instance))

    # -- sending -------------------------------------------------------------------------------------------------------------

    def want(self, exchange: Exchange) -> None:
        """The exchange has something to send."""
        if exchange not in self._blocked:
            self._ready[exchange] = None
            self._wake()

    def unblock(self, exchange: Exchange) -> None:
        """What it has to send has changed, or its window."""
        if exchange in self._blocked:
            del self._blocked[exchange]
            self.want(exchange)

    def _unblock_all(self) -> None:
        if self._blocked:
            self._ready.update(self._blocked)
            self._blocked.clear()
            self._wake()

    def resume(self) -> None:
        """The socket takes bytes again."""
        self.writable = True
        for exchange in tuple(self.streams.values()):
            if not exchange.pending:
                exchange.drained()
        self._wake()

    @property
    def waiting(self) -> bool:
        """Whether there is more to send than the last `data_to_send` gave."""
        return bool(self._ready) and self.writable

    def data_to_send(self) -> bytes:
        """What leaves in one write: the library's answers, and the streams in turn as far as windows and the socket allow.

        Raises `FrameViolation` when the other side has brought the connection into a state in which nothing can be sent.
        """
        try:
            self._fill()
        except H2Error as error:
            raise violation(error) from error
        data = self._h2.data_to_send()
        if self._behind:
            data += b"".join(self._behind)
            self._behind.clear()
        return data

    def _fill(self) -> None:
        """Give the library what may leave now."""
        for exchange in self._owed:
            if not exchange.remote_ended:
                self._h2.increment_flow_control_window(exchange.free, exchange.number)
            exchange.free = 0
        self._owed.clear()
        budget = _MOST_PER_FLUSH
        while self._ready and self.writable and budget > 0:
            exchange = next(iter(self._ready))
            del self._ready[exchange]
            budget -= self._send(exchange)

    def _send(self, exchange: Exchange) -> int:
        """One frame of one stream; its size."""
        exchange.produce()
        number, size = exchange.number, 0
        if exchange.fields is not None:
            fields, exchange.fields = exchange.fields, None
            self._h2.send_headers(number, fields)
        if exchange.pending:
            room = self._h2.local_flow_control_window(number) - (0 if exchange.finishing else exchange.reserve)
            if room <= 0:
                self._blocked[exchange] = None
                return 0
            data = exchange.take(min(room, _QUANTUM, self._h2.max_outbound_frame_size))
            size = len(data)
            ends = exchange.finishing and not exchange.pending
            self._h2.send_data(number, data, end_stream=ends)
            if exchange.pending:
                self._ready[exchange] = None
                return size
        elif exchange.finishing:
            ends = True
            self._h2.end_stream(number)
        else:
            ends = False
        if ends:
            exchange.local_ended = True
            if exchange.remote_ended:
                self._drop(exchange)
            else:
                self._lingering[exchange] = self._now
        exchange.drained()
        return size

    def drain(self, reason: str) -> None:
        """Say that nothing new is taken; streams go on, new ones of the other side are reset."""
        if not self.draining:
            self.draining = True
            self._behind.append(self.goodbye(ErrorCode.NO_ERROR, reason))
            self._wake()

    def goodbye(self, code: int, reason: str) -> bytes:
        """What to write before the connection is closed."""
        return encode_goaway(Goaway(last=self._h2.highest_inbound_stream_id, code=code, reason=reason))

    # -- time ----------------------------------------------------------------------------------------------------------------

    def judge(self, now: float) -> Verdict:
        """Look at the clock: send a PING where one is due, end what waited too long."""
        self._now = now
        limits = self._limits
        self._judge_streams(now)
        if not self.streams:
            self._pinged = None
            return Verdict.IDLE if self.draining or now - self._used >= limits.idle else Verdict.FINE
        if self._pinged is not None:
            return Verdict.DEAD if now - self._pinged >= limits.answer else Verdict.FINE
        if now - self._heard >= limits.interval:
            self._pinged = now
            self._h2.ping(b"stator?!")
            self._wake()
        return Verdict.FINE

    def _judge_streams(self, now: float) -> None:
        limits = self._limits
        for exchange, since in tuple(self._arriving.items()):
            if now - since < limits.arrival:
                break  # they are in order
            del self._arriving[exchange]
            exchange.too_slow(limits.arrival)
        for exchange, since in tuple(self._lingering.items()):
            if now - since < limits.linger:
                break
            self.reset(exchange, ErrorCode.NO_ERROR if self._accept is not None else ErrorCode.CANCEL)


_HANDLERS: dict[type[Event], Callable[[Session, Event], None]] = {
    RemoteSettingsChanged: Session._receive_settings,  # pyright: ignore[reportPrivateUsage]: its own table
    RequestReceived: Session._receive_request,  # pyright: ignore[reportPrivateUsage]
    ResponseReceived: Session._receive_response,  # pyright: ignore[reportPrivateUsage]
    DataReceived: Session._receive_body,  # pyright: ignore[reportPrivateUsage]
    StreamEnded: Session._receive_end,  # pyright: ignore[reportPrivateUsage]
    StreamReset: Session._receive_reset,  # pyright: ignore[reportPrivateUsage]
    WindowUpdated: Session._receive_window,  # pyright: ignore[reportPrivateUsage]
    PingAckReceived: Session._receive_pong,  # pyright: ignore[reportPrivateUsage]
}


def _reset_error(code: int, remote: bool, exchange: Exchange) -> StatorError:
    """What a reset means to the one who waits for an answer."""
    phase = Phase.ACCEPT.label
    if not remote:
        return Disconnected("the stream broke HTTP/2", instance=exchange.instance, phase=phase)
    match code:
        case ErrorCode.REFUSED_STREAM:
            return Unavailable("the other side took no more streams", instance=exchange.instance, phase=phase)
        case ErrorCode.ENHANCE_YOUR_CALM:
            return Overloaded("the other side had too much to do", instance=exchange.instance, phase=phase)
        case _:
            return Disconnected(f"the other side reset the stream (code {code})", instance=exchange.instance, phase=phase)
