"""Two native sessions and the bytes between them: no socket and no clock; every chunk and every pause is the test's choice."""

from collections.abc import Callable

import msgspec

from stator.config import Secret
from stator.protocol.envelope import IncomingRequest, RequestEnvelope
from stator.protocol.native.budget import ByteBudget
from stator.protocol.native.client import ClientSession, ClientStream
from stator.protocol.native.frames import FrameReader
from stator.protocol.native.hello import PROVES, Hello, Limits
from stator.protocol.native.inputs import InputSender
from stator.protocol.native.liveness import CLIENT_LIMITS, WORKER_LIMITS
from stator.protocol.native.server import ServerSession, ServerStream
from stator.protocol.native.session import Session
from stator.protocol.stream import Receiver

__all__ = ["CLIENT_PROCESS", "WORKER_PROCESS", "Call", "Frame", "NativePair", "Wire", "read_frames"]

CLIENT_PROCESS = "c" * 32
WORKER_PROCESS = "a" * 32


class Frame(msgspec.Struct, frozen=True):
    """A frame as it was on the wire."""

    kind: int
    flags: int
    count: int
    stream: int
    payload: bytes


def read_frames(data: bytes) -> list[Frame]:
    """The whole frames in `data`."""
    return [Frame(*fields) for fields in FrameReader().feed(data)]


class Call:
    """A request that reached the worker; the control its sink returned."""

    def __init__(self, request: IncomingRequest, stream: ServerStream) -> None:
        self.request = request
        self.stream = stream
        self.stopped = False
        self.killed = 0

    def stop(self) -> None:
        self.stopped = True
        if self.request.streams_in:
            self.request.body.finish()

    def kill(self) -> None:
        self.killed += 1


class Wire:
    """One direction. `frames` keeps what was written, in order, unless `record` is False."""

    def __init__(self, source: Session, sink: Session, *, record: bool = True) -> None:
        self.source = source
        self.sink = sink
        self.frames: list[Frame] = []
        self._reader = FrameReader() if record else None
        self._pending = bytearray()

    def __len__(self) -> int:
        return len(self._pending)

    def load(self) -> int:
        """One flush of the source; returns its bytes."""
        data = self.source.outgoing.data_to_send()
        self._pending += data
        if self._reader is not None:
            self.frames.extend(Frame(*fields) for fields in self._reader.feed(data))
        return len(data)

    def carry(self, most: int | None = None, *, now: float = 0.0) -> int:
        """Give the sink the next bytes, at most `most`; returns how many."""
        size = len(self._pending) if most is None else min(most, len(self._pending))
        if size:
            data = bytes(self._pending[:size])
            del self._pending[:size]
            self.sink.receive_data(data, now)
        return size


class NativePair:
    """A client session and a server session; `up` carries from client to server, `down` back. They have greeted unless `greet` is False."""

    def __init__(
        self,
        *,
        window: int = 256 * 1024,
        server_total: int = 256 * 1024 * 1024,
        client_limits: Limits | None = None,
        server_limits: Limits | None = None,
        greet: bool = True,
        record: bool = True,
        client_secret: str = "",
        server_secret: str = "",
        nonces: tuple[str, str] = ("1" * 32, "2" * 32),
    ) -> None:
        self.calls: list[Call] = []
        self.unreadable: list[int] = []
        """sizes of requests that could not be read"""
        self.client_budget = ByteBudget(most=window)
        self.server_budget = ByteBudget(total=server_total)
        self.refusing: Callable[[IncomingRequest], None] | None = None
        """called for each request; may raise"""
        self.away = 0
        self.client = ClientSession(
            hello=Hello(
                process=CLIENT_PROCESS,
                role="client",
                limits=client_limits or Limits(),
                features=PROVES if client_secret else 0,
                nonce=nonces[0] if client_secret else "",
            ),
            limits=CLIENT_LIMITS,
            now=0.0,
            wake=_nothing,
            hurry=_nothing,
            greeted=_nothing,
            budget=self.client_budget,
            away=self._went_away,
            secret=Secret(client_secret) if client_secret else None,
        )
        self.server = ServerSession(
            hello=Hello(
                process=WORKER_PROCESS,
                role="worker",
                limits=server_limits or Limits(),
                features=PROVES if server_secret else 0,
                nonce=nonces[1] if server_secret else "",
            ),
            limits=WORKER_LIMITS,
            now=0.0,
            wake=_nothing,
            hurry=_nothing,
            greeted=_nothing,
            budget=self.server_budget,
            lookup=lambda path: None if path == "unknown" else self,
            secret=Secret(server_secret) if server_secret else None,
        )
        self.up = Wire(self.client, self.server, record=record)
        self.down = Wire(self.server, self.client, record=record)
        if greet:
            self.settle()

    def malformed(self, size: int, kind: str) -> None:
        """The sink's other half."""
        self.unreadable.append(size)

    def __call__(self, request: IncomingRequest, stream: ServerStream) -> Call:
        if self.refusing is not None:
            self.refusing(request)
        call = Call(request, stream)
        self.calls.append(call)
        return call

    def _went_away(self) -> None:
        self.away += 1

    def open(
        self, value: object = None, *, receiver: Receiver | None = None, path: str = "1/generate", id: str = "request"
    ) -> tuple[ClientStream, Receiver]:
        """Open a stream; the request stays with the client until the wire is loaded."""
        receiver = receiver or Receiver(instance=1)
        envelope = RequestEnvelope(id=id, payload=msgspec.json.encode(value))
        return self.client.open(path, envelope, receiver), receiver

    def converse(self, *, receiver: Receiver | None = None, id: str = "request") -> ClientStream:
        """Open a bidirectional stream; its `sender` has credit once the worker has accepted."""
        envelope = RequestEnvelope(id=id, payload=b"", streams_in=True)
        return self.client.open("1/generate", envelope, receiver or Receiver(instance=1), InputSender)

    def settle(self, *, now: float = 0.0) -> None:
        """Carry everything both ways until nothing moves."""
        moved = True
        while moved:
            moved = False
            for wire in (self.up, self.down):
                while wire.load():
                    moved = True
                moved |= wire.carry(now=now) > 0


def _nothing() -> None:
    """Nobody waits for a flush: the test decides when."""
