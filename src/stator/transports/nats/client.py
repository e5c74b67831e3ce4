"""The caller's side of the compatible plane over NATS: requests go to a subject, workers call home (`spec/10 §6`)."""

import asyncio
import itertools
import logging
import os
from urllib.parse import urlsplit

import msgspec

from stator.clock import Clock
from stator.errors import ConnectFailed, Disconnected, Overloaded, StatorError, Timeout, UsageError
from stator.protocol.envelope import Codec, RequestEnvelope
from stator.protocol.records import EndpointRecord
from stator.tasks import DeadlineWheel
from stator.tasks.wheel import Timed
from stator.transports.address import is_local
from stator.transports.inbox import Inbox
from stator.transports.nats.config import NatsConfig
from stator.transports.nats.connection import NatsConnection
from stator.transports.nats.wire import Message, encode_headers, is_subject, nobody_there
from stator.transports.opening import while_wanted
from stator.transports.plane import InstanceObserver, PlaneHost, Traffic
from stator.transports.tcp import TcpConfig
from stator.transports.tcp.call_home import CallHomeListener, ExpectedStream
from stator.transports.tcp.headers import request_headers
from stator.transports.tcp.request_message import codec_of, request_parts

__all__ = ["NatsClient"]

logger = logging.getLogger(__name__)

_BLINK = 0.5
"""seconds of absence that a request waits for: a server that hands over to another is no outage"""
_CALLS_ON_THEIR_WAY = 0.5
"""seconds after the end of a connection in which workers may still call for requests that were not acknowledged"""
_DOUBT = 1.0
"""seconds without an acknowledgement after which the server is asked whether it is there"""
_NEW_SUBJECT = (0.01, 0.02, 0.04, 0.08, 0.16)
"""seconds between tries at a subject where nobody was heard yet: its worker may be about to listen"""
_RETURNING = (*_NEW_SUBJECT, 0.32, 0.64)
"""the same while its worker may be about to come back to NATS, as we did"""
_ALL_BACK = 2.0
"""seconds after which it would have"""


class _Unanswered(msgspec.Struct, eq=False, kw_only=True):
    """A request without acknowledgement. `headers` and `body` are kept for another try, "" when there will be none."""

    stream: ExpectedStream
    since: float
    subject: str
    headers: bytes
    body: bytes
    tries: int = 0


class NatsClient:
    """`PlaneClient` over NATS. Made by `NatsClient.start`."""

    slot: set[Timed] | None = None

    def __init__(
        self,
        *,
        config: NatsConfig,
        codec: Codec,
        wheel: DeadlineWheel,
        clock: Clock,
        listener: CallHomeListener,
        traffic: Traffic,
        observer: InstanceObserver | None,
    ) -> None:
        self._config = config
        self._codec: Codec = codec
        self._wheel = wheel
        self._clock = clock
        self._listener = listener
        self._traffic = traffic
        self._observer = observer
        self._inbox = f"_INBOX.{os.urandom(11).hex()}"
        self._numbers = itertools.count(1)
        self._unanswered: dict[str, _Unanswered] = {}
        """by the subject of the answer, oldest first"""
        self._heard: set[str] = set()
        """subjects at which somebody answered since the connection was made"""
        self._failed: set[int] = set()
        """instances that could not be asked since NATS went away, which is not their fault"""
        self._connected_at = float("-inf")
        self._connection: NatsConnection | None = None
        self._closed = False

    @classmethod
    async def start(cls, config: NatsConfig, host: PlaneHost) -> "NatsClient":
        """Open the listener for answers and try to connect; no server is no error, requests fail until there is one.

        Raises `ConnectFailed` for an address that cannot be bound, `ConfigError` for a login that cannot be used; nothing is left then.
        """
        tcp = host.load(TcpConfig)
        listener = await CallHomeListener.listen(tcp, host)
        _check_home(config, listener)
        client = cls(
            config=config,
            codec=tcp.codec,
            wheel=host.wheel,
            clock=host.clock,
            listener=listener,
            traffic=host.traffic,
            observer=host.observer,
        )
        connection = NatsConnection(
            config,
            random=host.random,
            name="stator client",
            meanwhile="requests over NATS fail until it is back",
            changed=client._connection_changed,
        )
        client._connection = connection
        connection.listen(f"{client._inbox}.*", client._acknowledged)
        try:
            await connection.start()
        except BaseException:
            await client.aclose()
            raise
        return client

    @property
    def connection(self) -> NatsConnection:
        """What requests go over."""
        assert self._connection is not None
        return self._connection

    @property
    def call_home_address(self) -> str:
        """`host:port` that workers are told."""
        return self._listener.address

    @property
    def open_streams(self) -> int:
        """Requests whose call-home is awaited or whose connection has not ended."""
        return self._listener.open_streams

    # -- PlaneClient

    async def open(self, record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        instance, connection = record.instance_id, self.connection
        subject = record.transport.nats_tcp or ""
        if not is_subject(subject):
            raise ConnectFailed(f"{subject[:100]!r} is no NATS subject", instance=instance, phase="connect")
        if not connection.connected or connection.full:
            async with while_wanted(inbox):
                await self._wait(instance)
        if inbox.ended:
            return
        if len(self._unanswered) >= self._config.unacknowledged:
            raise Overloaded(f"{len(self._unanswered)} requests wait for their acknowledgement over NATS", instance=instance)
        # From here to the end nothing waits: the subject is registered and the request is sent, or neither.
        codec = codec_of(record, self._codec)
        stream = self._listener.expect(inbox, codec, inputs=envelope.streams_in)
        try:
            headers, body = self._message(envelope, stream, codec)
        except BaseException:
            stream.withdraw()
            raise
        stream.begin()
        self._traffic.sent += len(headers) + len(body)
        self._send(stream, subject, headers, body)

    def forget(self, record: EndpointRecord) -> None:
        self._heard.discard(record.transport.nats_tcp or "")
        self._failed.discard(record.instance_id)
        self._listener.forget_instance(record.instance_id)

    async def aclose(self) -> None:
        self._closed = True
        if self._connection is not None:
            await self._connection.aclose()
        self._unanswered.clear()
        self._wheel.disarm(self)
        await self._listener.aclose()

    def cut(self) -> None:
        """Break every connection without a goodbye, as a lost network would."""
        self.connection.cut()
        self._listener.cut()

    # -- sending

    async def _wait(self, instance: int) -> None:
        """Wait for a connection that takes requests. Raises `ConnectFailed` when NATS is away, `Timeout` when it reads too slowly."""
        connection = self.connection
        limit = self._config.connect_timeout if connection.connected else _BLINK - connection.away_for
        try:
            if limit <= 0 or self._closed:
                raise TimeoutError
            async with asyncio.timeout(limit):
                await connection.writable()
        except TimeoutError as error:
            self._traffic.failed += 1
            if self._closed:
                raise ConnectFailed("the client closed its plane", instance=instance, phase="connect") from None
            if connection.connected:
                raise Timeout(f"NATS took no request within {limit} s", instance=instance, phase="connect") from error
            self._failed.add(instance)
            raise ConnectFailed(
                f"NATS is away ({self._config.shown}): {connection.reason}", instance=instance, phase="connect"
            ) from None

    def _message(self, envelope: RequestEnvelope, stream: ExpectedStream, codec: Codec) -> tuple[bytes, bytes]:
        """Headers and body. Raises `UsageError` when the server would not take them."""
        named = request_headers("", envelope, wall=self._clock.wall())
        del named["x-endpoint-path"]
        headers, body = encode_headers(named), b"".join(request_parts(envelope, stream, codec))
        size, most = len(headers) + len(body), self.connection.max_payload
        if size > most:
            raise UsageError(
                f"request payload is too large for this deployment: {size} bytes, and the NATS server takes {most} (max_payload);"
                " reduce the input or the metadata, or use another request plane"
            )
        return headers, body

    def _send(self, stream: ExpectedStream, subject: str, headers: bytes, body: bytes) -> None:
        reply, now = f"{self._inbox}.{next(self._numbers):x}", self._wheel.now()
        kept = (b"", b"") if subject in self._heard else (headers, body)
        if not self._unanswered:
            self._wheel.arm(self, now + min(_DOUBT, self._config.request_timeout))
        self._unanswered[reply] = _Unanswered(stream=stream, since=now, subject=subject, headers=kept[0], body=kept[1])
        self.connection.publish(subject, body, reply=reply, headers=headers)

    # -- acknowledgements

    def _acknowledged(self, message: Message) -> None:
        request = self._unanswered.get(message.subject)
        if request is None:
            return
        if nobody_there(message):
            self._nobody(message.subject, request)
            return
        del self._unanswered[message.subject]
        self._heard.add(request.subject)
        self._traffic.received += len(message.body)
        request.stream.acknowledged(message.body)

    def _nobody(self, reply: str, request: _Unanswered) -> None:
        """Nobody listens. That is final where somebody did before; a worker that is new, or new to this connection, gets a moment."""
        waits = _RETURNING if self._wheel.now() < self._connected_at + _ALL_BACK else _NEW_SUBJECT
        if request.headers and request.tries < len(waits):
            self._wheel.loop.call_later(waits[request.tries], self._try_again, reply, request)
            request.tries += 1
            return
        self._heard.discard(request.subject)
        self._fail(reply, ConnectFailed(f"nobody listens to the NATS subject {request.subject}", phase="accept"))

    def _try_again(self, reply: str, request: _Unanswered) -> None:
        if self._unanswered.get(reply) is not request:
            return
        if request.stream.decided:
            del self._unanswered[reply]
        else:
            self.connection.publish(request.subject, request.body, reply=reply, headers=request.headers)

    def _fail(self, reply: str, error: StatorError) -> None:
        request = self._unanswered.pop(reply, None)
        if request is not None:
            self._traffic.failed += 1
            request.stream.fail(type(error)(error.message, instance=request.stream.instance, phase=error.phase))

    def _connection_changed(self, up: bool) -> None:
        self._heard.clear()
        if up:
            self._connected_at = self._wheel.now()
            failed, self._failed = self._failed, set()
            for instance in failed:
                if self._observer is not None:
                    self._observer.recovered(instance)
        elif self._unanswered and not self._closed:
            self._wheel.loop.call_later(_CALLS_ON_THEIR_WAY, self._give_up, tuple(self._unanswered))

    def _give_up(self, replies: tuple[str, ...]) -> None:
        """What was not acknowledged will not be; but its worker may have it all the same, and had a moment to call."""
        reason = f"NATS went away before the request was acknowledged: {self.connection.reason}"
        for reply in replies:
            if reply in self._unanswered and not self.connection.connected:
                self._failed.add(self._unanswered[reply].stream.instance)
            self._fail(reply, Disconnected(reason, phase="accept"))

    def expire(self, now: float) -> float:
        """Called by the wheel: is an acknowledgement overdue, or the server suspiciously quiet?"""
        limit = self._config.request_timeout
        while self._unanswered:
            reply, oldest = next(iter(self._unanswered.items()))
            if oldest.stream.decided:
                del self._unanswered[reply]
            elif now >= oldest.since + limit:
                self._fail(reply, Timeout(f"no acknowledgement within {limit} s", phase="accept"))
            else:
                if now >= oldest.since + _DOUBT:
                    self.connection.doubt()
                return min(max(oldest.since, now) + _DOUBT, oldest.since + limit)
        return 0.0


def _check_home(config: NatsConfig, listener: CallHomeListener) -> None:
    """Nothing in a subject tells where its worker is: warn when answers can come from this host alone, and NATS is on another."""
    hosts = (urlsplit(url).hostname or "" for url in config.urls)
    if listener.loopback and not all(map(is_local, hosts)):
        text = (
            "NATS is elsewhere (%s), but answers are awaited on %s, which only workers on this host can call;"
            " set host (STATOR_HOST) or advertise_host (STATOR_ADVERTISE_HOST) to an address that they reach"
        )
        logger.warning(text, config.shown, listener.address)
