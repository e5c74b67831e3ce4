"""What a plane is: two small interfaces, one for each side of a stream.

A plane carries meaning, it has none of its own: prologue, items, sentinel, stop, kill and errors are defined by
`stator.protocol.stream.Receiver` (reader) and by `Responder` (writer), and the conformance suite
(`stator.testing.plane_suite`) holds every plane to them.
"""

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from stator import settings
from stator.clock import Clock
from stator.config import Config, Secret
from stator.errors import StatorError
from stator.protocol.envelope import IncomingRequest, RequestEnvelope
from stator.protocol.records import EndpointRecord
from stator.security import Refusals, Tls
from stator.tasks import DeadlineWheel
from stator.transports.inbox import Inbox

__all__ = [
    "InstanceObserver",
    "Malformed",
    "Plane",
    "PlaneClient",
    "PlaneHost",
    "PlaneServer",
    "RequestControl",
    "RequestSink",
    "Responder",
    "Traffic",
]


class RequestControl(Protocol):
    """What a plane may do to a running request (the runtime's `Context` is one). Never blocks, never raises, idempotent."""

    def stop(self) -> None:
        """The client asked for a graceful end; the handler may still send items and end the stream itself."""
        ...

    def kill(self) -> None:
        """The client is gone or wants nothing more; nothing sent from now on is delivered."""
        ...

    def unreachable(self) -> None:
        """No way to the client could be made: `kill`, and counted as that."""
        ...


Malformed = Literal["deserialization", "invalid_message", "response_stream"]
"""what was wrong with a request (`spec/30 §6`)"""


class Responder(Protocol):
    """How a worker answers one request. Calls arrive in the order accept, send…, end; or refuse alone; wait and start before either.

    After `kill` every call is accepted and does nothing. Exactly one of `refuse` and `end` must be called; the plane then ends the inputs
    of a bidirectional request (`stator.transports.inputs.InputStream`), as it does when the request is killed or its sink refuses it.
    """

    @property
    def sent_items(self) -> int:
        """Items taken for sending."""
        ...

    @property
    def sent_bytes(self) -> int:
        """Bytes of what was taken for sending, as this plane writes items (and the final frame, where it has one)."""
        ...

    def wait(self) -> None:
        """The request waits for a slot; the sink has not returned yet."""
        ...

    def start(self) -> None:
        """The wait is over."""
        ...

    def accept(self) -> None:
        """The prologue: the handler was called."""
        ...

    def refuse(self, error: StatorError) -> None:
        """The negative prologue; ends the stream."""
        ...

    def send(self, item: Any) -> bool:
        """Encode and queue one item. True: go on; False: queued, but await `ready()` before the next one.

        Raises `EngineError` when the value has no JSON form; nothing was queued then.
        """
        ...

    async def ready(self) -> None:
        """Return when another item may be sent, at once if the stream is dead. Cancelling it changes nothing."""
        ...

    def end(self, error: StatorError | None = None) -> None:
        """The sentinel, after an error item if `error` is given."""
        ...


class RequestSink(Protocol):
    """Who takes the requests of one endpoint."""

    def __call__(self, request: IncomingRequest, responder: Responder, /) -> RequestControl:
        """Take a request the plane has received. Raises a `StatorError` to refuse it; nothing was started then."""
        ...

    def malformed(self, size: int, kind: Malformed) -> None:
        """A request of `size` bytes for this endpoint could not be read; the plane tells its sender."""
        ...


class PlaneServer(Protocol):
    """The worker's side of a plane: one listener per process, any number of endpoints."""

    def register(self, path: str, sink: RequestSink) -> None:
        """Requests for `path` (`{instance id in hex}/{endpoint name}`) go to `sink` from now on."""
        ...

    def unregister(self, path: str) -> None:
        """New requests for `path` are refused; running ones are left alone."""
        ...

    def describe(self, record: EndpointRecord, path: str) -> EndpointRecord:
        """The record with this plane's address filled in."""
        ...

    def drain(self) -> None:
        """Tell connected clients to send nothing new (GOAWAY where the plane has one)."""
        ...

    async def aclose(self) -> None:
        """Close listener and connections; streams still open are cut. Idempotent."""
        ...


class PlaneClient(Protocol):
    """The caller's side of a plane: shared by all clients of the process."""

    async def open(self, record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        """Send the request; answers arrive in `inbox`. Returns once the request is on its way, without waiting for an answer.

        Raises `ConnectFailed` or `Timeout` (phase "connect") when there is no connection, `UsageError` when the request is too large;
        nothing was sent then, and ending the inbox is the caller's. The same holds when it is cancelled.
        When the inbox ends while a connection is made (killed, stopped, out of time), nothing is sent and this returns.
        An envelope that `streams_in` comes with a `DuplexInbox`, whose `sender` is set besides its `link`.
        """
        ...

    def forget(self, record: EndpointRecord) -> None:
        """The instance left discovery: fail what waits for its acceptance, leave established streams alone."""
        ...

    async def aclose(self) -> None:
        """Close all connections; open streams end `Disconnected`. Idempotent."""
        ...


class InstanceObserver(Protocol):
    """Who wants to know how instances fare between requests. Called on the loop; must not block or raise."""

    def suspect(self, instance: int) -> None:
        """Silent with requests open."""
        ...

    def recovered(self, instance: int) -> None:
        """Heard of again, or what was between is gone: nothing that happened before is held against it."""
        ...

    def lost(self, instance: int, reason: str) -> None:
        """Its connection ended while requests were open, or it was declared dead."""
        ...

    def draining(self, instance: int) -> None:
        """It takes nothing new."""
        ...


C = TypeVar("C", bound=Config)


class Traffic(msgspec.Struct, kw_only=True):
    """What the compatible plane's caller counts: bytes of requests and of acknowledgement bodies, and requests that failed there."""

    sent: int = 0
    received: int = 0
    failed: int = 0


class PlaneHost(msgspec.Struct, frozen=True, kw_only=True):
    """What a process gives to its planes."""

    process: str
    """random id of this process, 32 hex digits"""
    bind_host: str
    """address listeners bind to"""
    advertise_host: str
    """address written into records: never a wildcard"""
    socket_directory: Path | None
    """for Unix sockets: exists, is ours, mode 0700; None: no Unix sockets"""
    wheel: DeadlineWheel
    clock: Clock
    random: Random
    observer: InstanceObserver | None
    tls: Tls | None = None
    """certificates for every connection that leaves the machine; None: not encrypted. `stator.security.Entrance` and `connecting`
    apply it to a listener and a dialler
    """
    secret: Secret | None = None
    """what the processes of the cluster prove to each other; None: nothing"""
    refusals: Refusals = msgspec.field(default_factory=Refusals)
    """connections not made for want of trust"""
    traffic: Traffic = msgspec.field(default_factory=Traffic)
    input_timeout: float | None = 300.0
    """seconds a handler waits for the next input of a bidirectional request; None: for ever"""
    overrides: Mapping[str, Any] = {}
    """settings given as arguments, by `section.field`"""

    def load(self, config: type[C]) -> C:
        """The plane's own settings."""
        prefix = f"{config.section}."
        own = {key.removeprefix(prefix): value for key, value in self.overrides.items() if key.startswith(prefix)}
        return settings.load(config, own)


class Plane(Protocol):
    """How a plane is plugged in: what the entry points of group `stator.transports` name, called without arguments."""

    @property
    def name(self) -> str: ...

    def reaches(self, record: EndpointRecord) -> bool:
        """Whether this plane can reach the instance the record describes."""
        ...

    async def listen(self, host: PlaneHost) -> PlaneServer:
        """The worker's side. Raises `ConnectFailed` when an address cannot be bound; nothing is left open then."""
        ...

    async def connect(self, host: PlaneHost) -> PlaneClient:
        """The caller's side; connections to workers are made on first use."""
        ...
