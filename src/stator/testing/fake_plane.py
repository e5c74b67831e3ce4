"""Planes that do what a script says: for what decides between planes and instances, without sockets."""

from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import msgspec

from stator.errors import StatorError
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.ids import EndpointId
from stator.protocol.records import EndpointRecord, NativeAddress, Transport
from stator.protocol.stream import Phase
from stator.tasks import DeadlineWheel
from stator.testing.manual_clock import ManualClock
from stator.transports.inbox import Inbox
from stator.transports.plane import InstanceObserver, PlaneHost, RequestSink

__all__ = ["ENDPOINT", "FakePlane", "Script", "answer", "fail_to_connect", "fake_host", "fake_record", "hang", "refuse"]

ENDPOINT = EndpointId("test", "backend", "generate")

Script = Callable[[EndpointRecord, RequestEnvelope, Inbox], Awaitable[None]]
"""What `PlaneClient.open` does with a request."""


def fake_record(instance: int, *, native: bool = True, tcp: bool = True) -> EndpointRecord:
    """An instance of `ENDPOINT` that speaks the native plane, the compatible one, or both."""
    record = EndpointRecord(
        component=ENDPOINT.component,
        endpoint=ENDPOINT.name,
        namespace=ENDPOINT.namespace,
        instance_id=instance,
        transport=Transport(tcp=f"127.0.0.1:1/{instance:x}/generate") if tcp else Transport(),
    )
    if not native:
        return record
    return msgspec.structs.replace(record, stator=NativeAddress(plane=1, address="127.0.0.1:2", process=f"{instance:032x}"))


def fake_host(wheel: DeadlineWheel, observer: InstanceObserver | None = None) -> PlaneHost:
    """A host for planes that need none."""
    return PlaneHost(
        process="0" * 32,
        bind_host="127.0.0.1",
        advertise_host="127.0.0.1",
        socket_directory=None,
        wheel=wheel,
        clock=ManualClock(),
        random=Random(1),
        observer=observer,
    )


def answer(*items: Any, error: StatorError | None = None) -> Script:
    """Accept, send `items`, end with `error` or the sentinel; all within `open`."""

    async def script(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        inbox.accept()
        if items:
            inbox.receive(items)
        inbox.finish(error)

    return script


def refuse(error: StatorError) -> Script:
    """Send the request; the worker says no."""

    async def script(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        inbox.advance(Phase.ACCEPT)
        inbox.finish(error)

    return script


def fail_to_connect(error: StatorError) -> Script:
    """Raise: nothing was sent."""

    async def script(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        raise type(error)(error.message, instance=record.instance_id, phase="connect")

    return script


def hang(phase: Phase = Phase.ACCEPT) -> Script:
    """Send the request, come as far as waiting for `phase`, and stay there."""

    async def script(record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        inbox.advance(phase)

    return script


class FakePlane:
    """`Plane`, `PlaneServer` and `PlaneClient` in one. `scripts` is what happens per instance, `default` for the others.

    `opened` lists the instances that were sent to, in order; `requests` the envelopes.
    """

    def __init__(self, name: str = "native", default: Script | None = None) -> None:
        self.name = name
        self.default = default or answer("item")
        self.scripts: dict[int, Script] = {}
        self.opened: list[int] = []
        self.requests: list[RequestEnvelope] = []
        self.inboxes: list[Inbox] = []
        self.sinks: dict[str, RequestSink] = {}
        self.forgotten: list[int] = []
        self.log: list[str] = []
        self.on_listen: Callable[[], Awaitable[None]] | None = None
        self.on_connect: Callable[[], Awaitable[None]] | None = None

    def __repr__(self) -> str:
        return f"<FakePlane {self.name}>"

    # -- Plane

    def reaches(self, record: EndpointRecord) -> bool:
        return isinstance(record.stator, NativeAddress) if self.name == "native" else record.transport.tcp is not None

    async def listen(self, host: PlaneHost) -> "FakePlane":
        self.log.append("listen")
        if self.on_listen is not None:
            await self.on_listen()
        return self

    async def connect(self, host: PlaneHost) -> "FakePlane":
        self.log.append("connect")
        if self.on_connect is not None:
            await self.on_connect()
        return self

    # -- PlaneServer

    def register(self, path: str, sink: RequestSink) -> None:
        self.sinks[path] = sink

    def unregister(self, path: str) -> None:
        self.sinks.pop(path, None)

    def describe(self, record: EndpointRecord, path: str) -> EndpointRecord:
        return record

    def drain(self) -> None:
        self.log.append("drain")

    # -- PlaneClient

    async def open(self, record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        self.opened.append(record.instance_id)
        self.requests.append(envelope)
        self.inboxes.append(inbox)
        await self.scripts.get(record.instance_id, self.default)(record, envelope, inbox)

    def forget(self, record: EndpointRecord) -> None:
        self.forgotten.append(record.instance_id)

    async def aclose(self) -> None:
        self.log.append("close")
