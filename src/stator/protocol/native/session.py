"""What both ends of a native connection have in common: HELLO and PROOF first, PING and PONG, GOAWAY, dispatch of frames."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from stator.config import Secret
from stator.errors import ConnectFailed, NotTrusted, PeerProtocolError
from stator.protocol.native.frames import CRITICAL, GOAWAY, HELLO, KINDS, PING, PONG, PROOF, FrameReader, frame
from stator.protocol.native.hello import Goaway, Hello, read_goaway, read_hello
from stator.protocol.native.liveness import Liveness, LivenessLimits, Verdict
from stator.protocol.native.outgoing import Outgoing
from stator.protocol.native.proof import make_proof, proves

__all__ = ["Session"]

_PING = b"statping"

_TLS = (b"\x16\x03", b"\x15\x03")
"""how a TLS handshake or alert begins; a frame that did would be far too long"""

_MOST_PONGS = 64
"""answers queued for a peer that asks and does not read; more are dropped"""


class Session(ABC):
    """One end of a connection, without I/O: bytes in by `receive_data`, bytes out by `outgoing.data_to_send()`.

    `wake` is called when there is something to send. `greeted` is called once, when the peer's HELLO was accepted. With a `secret`,
    which `hello` then announces with a nonce that was never used before, that is when the peer has proved that it knows it.
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
        secret: Secret | None = None,
    ) -> None:
        self.hello = hello
        self.peer: Hello | None = None
        """the other side's HELLO, None until it arrived and, with a secret, was proved"""
        self.gone: Goaway | None = None
        """the other side's GOAWAY"""
        self.outgoing = Outgoing(wake, hurry)
        self.liveness = Liveness(limits, now)
        self._greeted = greeted
        self._reader = FrameReader()
        self._pongs = 0
        self._secret = secret
        self._said = hello.encode()
        self._heard: tuple[Hello, bytes] | None = None
        """the other side's HELLO and its bytes, while nothing is proved"""
        self.outgoing.control(frame(HELLO, payload=self._said, flags=CRITICAL))

    @property
    def greeting(self) -> bool:
        """Whether the peer's HELLO is here and its PROOF is not."""
        return self._heard is not None

    @property
    @abstractmethod
    def open_streams(self) -> int:
        """Streams whose end has not been decided."""

    def receive_data(self, data: bytes, now: float) -> bool:
        """Take bytes from the peer. True when they end a suspicion (section 8).

        Raises `PeerProtocolError` for broken bytes, `ConnectFailed` when the two sides have no version in common, and `NotTrusted` when
        only one of them has a secret or TLS, or when the secrets differ: close then.
        """
        recovered = self.liveness.heard(now)
        peer = self.peer
        if peer is None and self._heard is None and not self._reader.buffered and data[:2] in _TLS:
            raise NotTrusted("the other side speaks TLS, which is not set here (tls.cert_path)", reason="encrypted")
        for kind, flags, count, number, payload in self._reader.feed(data):
            if peer is None:
                peer = self._introduce(kind, payload)
            elif number:
                self.stream_frame(kind, flags, count, number, payload)
            else:
                self._connection_frame(kind, flags, payload)
        return recovered

    @abstractmethod
    def stream_frame(self, kind: int, flags: int, count: int, number: int, payload: bytes) -> None:
        """A frame of a stream."""

    def greeted(self) -> None:  # noqa: B027 - an end may have nothing to do then
        """The peer's HELLO was accepted."""

    def went_away(self, goaway: Goaway) -> None:  # noqa: B027 - a worker goes on
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

    def _introduce(self, kind: int, payload: bytes) -> Hello | None:
        """A frame before the peer is known: its HELLO, and its PROOF where there is a secret. The peer, once it is."""
        if kind == GOAWAY:
            self.gone = goaway = read_goaway(payload)
            text = f"the peer refused the connection: {goaway.code} {goaway.reason}"
            raise NotTrusted(text, reason="refused") if goaway.code == NotTrusted.code else ConnectFailed(text, phase="connect")
        if self._heard is not None:
            return self._verify(*self._heard, kind, payload)
        if kind != HELLO:
            raise PeerProtocolError(f"the first frame must be HELLO, got kind {kind}")
        peer = read_hello(payload)
        self.hello.agree(peer)
        if peer.role == self.hello.role:
            raise PeerProtocolError(f"both ends of the connection say that they are a {peer.role}")
        if self._secret is None:
            if peer.proves:
                raise NotTrusted(
                    "the other side demands a cluster secret, none is set here (cluster_secret)", reason="secret_unset"
                )
            return self._welcome(peer)
        if not peer.proves:
            raise NotTrusted("the other side has no cluster secret, one is set here", reason="secret_missing")
        self._heard = (peer, payload)
        if peer.role == "worker":
            self._prove(self._secret, payload)
        return None

    def _prove(self, secret: Secret, heard: bytes) -> None:
        if self.hello.role == "client":
            shown = make_proof(secret, "client", client=self._said, worker=heard)
        else:
            shown = make_proof(secret, "worker", client=heard, worker=self._said)
        self.outgoing.control(frame(PROOF, payload=shown, flags=CRITICAL))

    def _verify(self, peer: Hello, heard: bytes, kind: int, payload: bytes) -> Hello:
        """The frame after HELLO. The client proves first: who is no client of the cluster gets nothing to guess the secret from."""
        secret = self._secret
        assert secret is not None
        if kind != PROOF:
            raise NotTrusted(
                f"the other side must prove the cluster secret first, it sent kind {kind}", reason="secret_unproved"
            )
        client, worker = (heard, self._said) if peer.role == "client" else (self._said, heard)
        if not proves(payload, secret, peer.role, client=client, worker=worker):
            raise NotTrusted("the other side has another cluster secret", reason="secret_wrong")
        if peer.role == "client":
            self._prove(secret, heard)
        self._heard = None
        return self._welcome(peer)

    def _welcome(self, peer: Hello) -> Hello:
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
