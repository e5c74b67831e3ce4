"""What both ends of a native connection have in common: HELLO first, PING and PONG, GOAWAY, dispatch of frames."""

from collections.abc import Callable

from stator.errors import ConnectFailed, PeerProtocolError
from stator.protocol.native.frames import CRITICAL, GOAWAY, HELLO, KINDS, PING, PONG, FrameReader, frame
from stator.protocol.native.hello import Goaway, Hello, read_goaway, read_hello
from stator.protocol.native.liveness import Liveness, LivenessLimits, Verdict
from stator.protocol.native.outgoing import Outgoing

__all__ = ["Session"]

_PING = b"statping"

_MOST_PONGS = 64
"""answers queued for a peer that asks and does not read; more are dropped"""


class Session:
    """One end of a connection, without I/O: bytes in by `receive_data`, bytes out by `outgoing.data_to_send()`.

    `wake` is called when there is something to send. `greeted` is called once, when the peer's HELLO was accepted.
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
    ) -> None:
        self.hello = hello
        self.peer: Hello | None = None
        """the other side's HELLO, None until it arrived"""
        self.gone: Goaway | None = None
        """the other side's GOAWAY"""
        self.outgoing = Outgoing(wake, hurry)
        self.liveness = Liveness(limits, now)
        self._greeted = greeted
        self._reader = FrameReader()
        self._pongs = 0
        self.outgoing.control(frame(HELLO, payload=hello.encode(), flags=CRITICAL))

    @property
    def open_streams(self) -> int:
        """Streams whose end has not been decided."""
        raise NotImplementedError

    def receive_data(self, data: bytes, now: float) -> bool:
        """Take bytes from the peer. True when they end a suspicion (section 8).

        Raises `PeerProtocolError` for broken bytes and `ConnectFailed` when the two sides have no version in common: close then.
        """
        recovered = self.liveness.heard(now)
        peer = self.peer
        for kind, flags, count, number, payload in self._reader.feed(data):
            if peer is None:
                peer = self._greet(kind, payload)
            elif number:
                self.stream_frame(kind, flags, count, number, payload)
            else:
                self._connection_frame(kind, flags, payload)
        return recovered

    def stream_frame(self, kind: int, flags: int, count: int, number: int, payload: bytes) -> None:
        """A frame of a stream."""
        raise NotImplementedError

    def greeted(self) -> None:
        """The peer's HELLO was accepted."""

    def went_away(self, goaway: Goaway) -> None:
        """The peer sent GOAWAY."""

    def unknown(self, kind: int, flags: int) -> None:
        """Skip a frame of a kind we do not know, unless it must be understood. One that we know is at the wrong place here."""
        if kind in KINDS:
            raise PeerProtocolError(f"a {self.hello.role} does not take a frame of kind {kind} there")
        if flags & CRITICAL:
            raise PeerProtocolError(f"frame of unknown kind {kind} must be understood")

    def judge(self, now: float) -> Verdict:
        """Look at the clock; a due PING is queued here. A connection that the peer has left is idle as soon as it has no streams.

        Waiting for the peer's HELLO is not judged here: it has a deadline of its own.
        """
        if self.peer is None:
            return Verdict.FINE
        if self.gone is not None and not self.open_streams:
            return Verdict.IDLE
        verdict = self.liveness.judge(now, streams=self.open_streams)
        if verdict is Verdict.PING:
            self.outgoing.control(frame(PING, payload=_PING))
        return verdict

    def say_goodbye(self, goaway: Goaway) -> None:
        """Queue a GOAWAY; not in answer to one."""
        if self.gone is None:
            self.outgoing.control(frame(GOAWAY, payload=goaway.encode()))

    def _greet(self, kind: int, payload: bytes) -> Hello:
        if kind == GOAWAY:
            self.gone = goaway = read_goaway(payload)
            raise ConnectFailed(f"the peer refused the connection: {goaway.code} {goaway.reason}", phase="connect")
        if kind != HELLO:
            raise PeerProtocolError(f"the first frame must be HELLO, got kind {kind}")
        peer = read_hello(payload)
        self.hello.agree(peer)
        if peer.role == self.hello.role:
            raise PeerProtocolError(f"both ends of the connection say that they are a {peer.role}")
        self.peer = peer
        self.greeted()
        self._greeted()
        return peer

    def _connection_frame(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == PING:
            self._answer(payload)
        elif kind == GOAWAY:
            self.gone = read_goaway(payload)
            self.went_away(self.gone)
        elif kind == HELLO:
            raise PeerProtocolError("HELLO came twice")
        elif kind != PONG:
            self.unknown(kind, flags)

    def _answer(self, payload: bytes) -> None:
        if len(payload) != len(_PING):
            raise PeerProtocolError(f"PING has {len(payload)} bytes instead of {len(_PING)}")
        self._pongs = 0 if self.outgoing.writable else self._pongs + 1
        if self._pongs <= _MOST_PONGS:
            self.outgoing.control(frame(PONG, payload=payload))
