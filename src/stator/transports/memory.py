"""The in-memory plane: what a plane means, without sockets. Used by tests, by single-process set-ups and as the model for the others.

Values still go through their JSON form, so that a handler sees and sends exactly what it would over a network. Delivery is
asynchronous (next loop tick), in order, and bounded: a stream holds at most `window` bytes that its reader has not taken.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from stator.errors import Cancelled, ConnectFailed, PeerProtocolError, StatorError, Unavailable
from stator.protocol.envelope import IncomingRequest, RequestEnvelope
from stator.protocol.ids import endpoint_path
from stator.protocol.records import EndpointRecord, NativeAddress
from stator.protocol.stream import Phase
from stator.protocol.values import decode_value, encode_json
from stator.transports.inbox import Inbox
from stator.transports.inputs import DuplexInbox, InputStream
from stator.transports.memory_inputs import MemoryInputs
from stator.transports.plane import PlaneHost, RequestControl, RequestSink

__all__ = ["MemoryNetwork", "MemoryPlane"]

logger = logging.getLogger(__name__)

_PREFIX = "memory:"
_YIELD_EVERY = 64
_MIN_CHARGE = 64


class MemoryNetwork:
    """The wire between planes of one process: plane addresses and the streams open on them."""

    def __init__(self, *, window: int = 256 * 1024) -> None:
        self.window = window
        self._planes: dict[str, MemoryPlane] = {}

    def attach(self, plane: "MemoryPlane") -> str:
        """Give a plane its address."""
        address = f"{_PREFIX}{id(plane):x}"
        self._planes[address] = plane
        return address

    def detach(self, address: str) -> None:
        """The plane is gone; its address answers no more."""
        self._planes.pop(address, None)

    def find(self, address: str) -> "MemoryPlane | None":
        """The plane listening at `address`."""
        return self._planes.get(address)


class _Stream:
    """One stream: responder for the worker, link for the reader; both ends live in one process."""

    __slots__ = (
        "_bytes",
        "_client",
        "_control",
        "_dead",
        "_inbox",
        "_loop",
        "_pending",
        "_resumed",
        "_server",
        "_since_yield",
        "_unread",
        "_window",
        "inputs",
        "sent_items",
    )

    def __init__(self, client: "MemoryPlane", server: "MemoryPlane", inbox: Inbox, window: int) -> None:
        self._client = client
        self._server = server
        self._inbox = inbox
        self._window = window
        self._loop = asyncio.get_running_loop()
        self._pending: list[Callable[[], object]] = []
        self._control: RequestControl | None = None
        self._resumed: asyncio.Future[None] | None = None
        self._unread = 0
        self._since_yield = 0
        self._dead = False
        self.inputs: MemoryInputs | None = None
        """a bidirectional request's"""
        self.sent_items = 0
        self._bytes = 0

    # -- both directions go through the loop, in order

    def _later(self, step: Callable[[], object]) -> None:
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(step)

    def _flush(self) -> None:
        steps, self._pending = self._pending, []
        for step in steps:
            step()

    def dispatch(self, envelope: RequestEnvelope, sink: RequestSink | None) -> None:
        self._later(lambda: self._deliver(envelope, sink))

    def _deliver(self, envelope: RequestEnvelope, sink: RequestSink | None) -> None:
        if self._dead:
            return
        try:
            if sink is None:
                raise Unavailable("no such endpoint", instance=self._inbox.instance)
            request = IncomingRequest(
                id=envelope.id,
                body=self._read_value(envelope, sink) if self.inputs is None else self.inputs.stream,
                metadata=dict(envelope.metadata),
                headers=dict(envelope.headers),
                deadline=envelope.deadline,
                size=len(envelope.payload),
                streams_in=envelope.streams_in,
            )
            self._control = sink(request, self)
        except StatorError as error:
            self.refuse(error)
        except Exception as error:  # whatever a sink does: other steps are waiting
            logger.exception("request %s could not be taken", envelope.id)
            self.refuse(StatorError(f"the worker could not take the request: {type(error).__name__}"))

    def _read_value(self, envelope: RequestEnvelope, sink: RequestSink) -> Any:
        try:
            return decode_value(envelope.payload, "json")
        except StatorError:
            sink.malformed(len(envelope.payload), "deserialization")
            raise

    def give_inputs(self, inbox: DuplexInbox, timeout: float | None) -> None:
        """The request is bidirectional."""
        stream = InputStream(wheel=inbox.wheel, limit=timeout)
        inbox.sender = self.inputs = MemoryInputs(stream, window=self._window, later=self._later)

    # -- Responder

    @property
    def sent_bytes(self) -> int:
        return self._bytes

    def wait(self) -> None:
        self._later(lambda: self._inbox.advance(Phase.PROLOGUE))

    def start(self) -> None:
        """Nothing is held back while a request waits."""

    def accept(self) -> None:
        self._later(self._inbox.accept)
        if self.inputs is not None:
            self._later(self.inputs.open)

    def refuse(self, error: StatorError) -> None:
        self.end(error)

    def send(self, item: Any) -> bool:
        if self._dead:
            return False
        data = encode_json(item)
        self.sent_items += 1
        self._bytes += len(data)
        self._unread += max(len(data), _MIN_CHARGE)
        self._later(lambda: self._receive(data))
        self._since_yield += 1
        return self._unread < self._window and self._since_yield < _YIELD_EVERY

    def _receive(self, data: bytes) -> None:
        """Deliver one item, typed as the reader wants it."""
        try:
            self._inbox.receive((msgspec.json.decode(data, type=self._inbox.item_type),))
        except msgspec.ValidationError as error:
            self._inbox.finish(PeerProtocolError(f"item does not fit {self._inbox.item_type}: {error}"))
            self.kill()

    async def ready(self) -> None:
        self._since_yield = 0
        await asyncio.sleep(0)
        while self._unread >= self._window and not self._dead:
            self._resumed = self._loop.create_future()
            await self._resumed

    def end(self, error: StatorError | None = None) -> None:
        if not self._dead:
            self._later(lambda: self._inbox.finish(error))
            self._later(self.forget)
            self._later(self._let_go)

    # -- StreamLink

    def stop(self) -> None:
        if self.inputs is not None:
            self.inputs.close()
        self._later(lambda: self._control is not None and self._control.stop())

    def kill(self) -> None:
        self.forget()
        self._later(lambda: self._control is not None and self._control.kill())
        self._later(self._let_go)

    def taken(self) -> None:
        self._unread = 0
        self._resume()

    def _resume(self) -> None:
        if self._resumed is not None and not self._resumed.done():
            self._resumed.set_result(None)

    # -- ends

    def forget(self) -> None:
        self._dead = True
        self._client.opened.discard(self)
        self._server.served.discard(self)
        self._resume()

    def cut(self, reason: str) -> None:
        """The network broke: the reader sees a cut, the worker a kill."""
        self.forget()
        self._inbox.cut(reason)
        if self._control is not None:
            self._control.kill()
        self._let_go()

    def _let_go(self) -> None:
        """The last step: of the inputs, and of the request, which has this as its responder."""
        self._control = None
        if self.inputs is not None:
            self.inputs.stream.finish(Cancelled("the request has ended"))

    def forget_instance(self, instance_id: int) -> None:
        if self._inbox.instance == instance_id and self._inbox.phase < Phase.FIRST_ITEM:
            self.cut("the instance left discovery before it accepted the request")


class MemoryPlane:
    """`Plane`, `PlaneServer` and `PlaneClient` in one, on a shared `MemoryNetwork`."""

    name = "memory"

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._sinks: dict[str, RequestSink] = {}
        self._draining = False
        self._address = network.attach(self)
        self.input_timeout: float | None = 300.0
        """seconds that a handler waits for an input"""
        self.served: set[_Stream] = set()
        self.opened: set[_Stream] = set()

    # -- Plane

    def reaches(self, record: EndpointRecord) -> bool:
        native = record.stator
        return isinstance(native, NativeAddress) and native.address.startswith(_PREFIX)

    async def listen(self, host: PlaneHost) -> "MemoryPlane":
        """It listens from the start."""
        self.input_timeout = host.input_timeout
        return self

    async def connect(self, host: PlaneHost) -> "MemoryPlane":
        """There is nothing to connect."""
        return self

    # -- PlaneServer

    def register(self, path: str, sink: RequestSink) -> None:
        self._sinks[path] = sink

    def unregister(self, path: str) -> None:
        self._sinks.pop(path, None)

    def describe(self, record: EndpointRecord, path: str) -> EndpointRecord:
        return msgspec.structs.replace(record, stator=NativeAddress(plane=0, address=self._address, process=self._address))

    def drain(self) -> None:
        self._draining = True

    def cut(self, reason: str = "the network was cut") -> None:
        """Break every stream this plane serves, as a lost machine would."""
        for stream in tuple(self.served):
            stream.cut(reason)

    async def aclose(self) -> None:
        self._network.detach(self._address)
        self.cut("the worker closed its plane")
        for stream in tuple(self.opened):
            stream.cut("the client closed its plane")

    # -- PlaneClient

    async def open(self, record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        native = record.stator
        peer = self._network.find(native.address) if isinstance(native, NativeAddress) else None
        if peer is None:
            raise ConnectFailed(
                "no plane listens at the instance's memory address", instance=record.instance_id, phase="connect"
            )
        path = endpoint_path(record.instance_id, record.endpoint)
        stream = _Stream(self, peer, inbox, self._network.window)
        peer.served.add(stream)
        self.opened.add(stream)
        inbox.link = stream
        if envelope.streams_in:
            assert isinstance(inbox, DuplexInbox)
            stream.give_inputs(inbox, peer.input_timeout)
        inbox.advance(Phase.ACCEPT)
        stream.dispatch(envelope, peer.sink(path))

    def sink(self, path: str) -> RequestSink | None:
        """Who takes requests for `path`; None when nobody does."""
        return None if self._draining else self._sinks.get(path)

    def forget(self, record: EndpointRecord) -> None:
        for stream in tuple(self.opened):
            stream.forget_instance(record.instance_id)
