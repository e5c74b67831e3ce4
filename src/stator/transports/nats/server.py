"""The worker's side of the compatible plane over NATS: a subject per endpoint, answers call home over TCP (`spec/10 §6`)."""

import os
import time
from datetime import UTC, datetime
from functools import partial
from typing import get_args

import msgspec

from stator.clock import Clock
from stator.errors import ConnectFailed, UsageError
from stator.protocol.ids import format_instance_id, nats_subject
from stator.protocol.records import EndpointRecord, Transport
from stator.protocol.request_frame import RequestFrame
from stator.transports.nats.config import NatsConfig
from stator.transports.nats.connection import Listening, NatsConnection
from stator.transports.nats.service import Service, ServiceEndpoint, Verb
from stator.transports.nats.wire import Message, is_subject, read_headers
from stator.transports.plane import PlaneHost, RequestSink
from stator.transports.tcp import TcpConfig
from stator.transports.tcp.reception import Reception

__all__ = ["NatsServer"]

_QUEUE = "q"
_STRAGGLERS = 1.0
"""seconds in which requests that were on their way to a subject when it was left are refused instead of lost"""


class _Served(msgspec.Struct, eq=False, kw_only=True):
    """An endpoint that listens."""

    path: str
    service: str
    shown: ServiceEndpoint
    listening: Listening


class _Offered(msgspec.Struct, eq=False, kw_only=True):
    """A component that shows itself."""

    service: Service
    listening: list[Listening]


class NatsServer:
    """`PlaneServer` over NATS. Made by `NatsServer.listen`."""

    def __init__(self, *, reception: Reception, connection: NatsConnection, version: str, clock: Clock) -> None:
        self._reception = reception
        self._connection = connection
        self._version = version
        self._clock = clock
        self._served: dict[str, _Served] = {}
        self._services: dict[str, _Offered] = {}

    @classmethod
    async def listen(cls, config: NatsConfig, host: PlaneHost, *, version: str) -> "NatsServer":
        """Connect. Raises `ConnectFailed` when no server takes us, `ConfigError` for a login that cannot be used; nothing is left then."""
        connection = NatsConnection(
            config, random=host.random, name="stator worker", meanwhile="no requests come over NATS until it is back"
        )
        try:
            await connection.start()
            if not connection.connected:
                raise ConnectFailed(f"cannot take requests over NATS ({config.shown}): {connection.reason}", phase="connect")
        except BaseException:
            await connection.aclose()
            raise
        reception = Reception(
            config=host.load(TcpConfig),
            wheel=host.wheel,
            input_timeout=host.input_timeout,
            tls=host.tls,
            refusals=host.refusals,
        )
        return cls(reception=reception, connection=connection, version=version, clock=host.clock)

    @property
    def connection(self) -> NatsConnection:
        """What requests come over."""
        return self._connection

    @property
    def open_streams(self) -> int:
        """Requests queued, being answered, or whose connection has not ended."""
        return self._reception.open_streams

    # -- PlaneServer

    def register(self, path: str, sink: RequestSink) -> None:
        self._reception.register(path, sink)

    def unregister(self, path: str) -> None:
        self._reception.unregister(path)
        served = self._served.pop(path, None)
        if served is None:
            return
        self._connection.leave(served.listening, linger=_STRAGGLERS)
        offered = self._services[served.service]
        del offered.service.endpoints[served.shown.subject]
        if not offered.service.endpoints:
            self._withdraw(self._services.pop(served.service))

    def describe(self, record: EndpointRecord, path: str) -> EndpointRecord:
        """The record with our subject; from now on it is listened to. Raises `UsageError` for names that make no subject."""
        subject = nats_subject(record.endpoint_id, record.instance_id)
        if not is_subject(subject):
            raise UsageError(
                f"{record.endpoint_id} cannot be served over NATS: {subject!r} is no subject;"
                " use names without blanks, '*' and '>', and not too long"
            )
        if path not in self._served:
            offered = self._offer(record)
            component = f"{record.namespace}_{record.component}"
            name = f"{component}-{record.endpoint}-{format_instance_id(record.instance_id)}"
            shown = ServiceEndpoint(name=name, subject=subject, queue_group=_QUEUE)
            offered.service.endpoints[subject] = shown
            listening = self._connection.listen(subject, partial(self._take, path, shown), queue=_QUEUE)
            self._served[path] = _Served(path=path, service=component, shown=shown, listening=listening)
        return msgspec.structs.replace(record, transport=Transport(nats_tcp=subject))

    def drain(self) -> None:
        self._reception.draining = True
        for served in self._served.values():
            self._connection.leave(served.listening, linger=_STRAGGLERS)

    async def aclose(self) -> None:
        await self._connection.aclose()
        self._served.clear()
        self._services.clear()
        await self._reception.aclose()

    # -- requests

    def _take(self, path: str, shown: ServiceEndpoint, message: Message) -> None:
        """Take a request and acknowledge it, in this order and in one step: the acknowledgement says when there is no capacity."""
        began = time.perf_counter_ns()
        headers = read_headers(message.headers) if message.headers else {}
        frame = RequestFrame(path=path, headers=headers, payload=message.body)
        text = self._reception.take(frame)
        if message.reply:
            self._connection.publish(message.reply, text)
        shown.count(text.decode(errors="replace"), time.perf_counter_ns() - began)

    # -- the service

    def _offer(self, record: EndpointRecord) -> _Offered:
        """The service of the record's component; answers questions from now on."""
        name = f"{record.namespace}_{record.component}"
        offered = self._services.get(name)
        if offered is None:
            started = datetime.fromtimestamp(self._clock.wall(), UTC).isoformat().replace("+00:00", "Z")
            service = Service(
                namespace=record.namespace,
                component=record.component,
                id=os.urandom(11).hex(),
                version=self._version,
                started=started,
            )
            verbs: tuple[Verb, ...] = get_args(Verb)
            listening = [
                self._connection.listen(subject, partial(self._answer, service, verb))
                for verb in verbs
                for subject in service.subjects(verb)
            ]
            offered = self._services[name] = _Offered(service=service, listening=listening)
        return offered

    def _answer(self, service: Service, verb: Verb, message: Message) -> None:
        if message.reply:
            self._connection.publish(message.reply, service.answer(verb))

    def _withdraw(self, offered: _Offered) -> None:
        for listening in offered.listening:
            self._connection.leave(listening)
