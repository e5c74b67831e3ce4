"""Where a client waits for its answers: one listener per process, one subject per request (`spec/10 §3`)."""

import asyncio
import logging
import os
import socket
import struct
from typing import cast

from stator.errors import ConfigError, Disconnected, PeerProtocolError, StatorError
from stator.protocol.call_home import HandshakeReader
from stator.protocol.envelope import Codec
from stator.protocol.request_frame import acknowledgement_error
from stator.protocol.response_stream import ResponseReader
from stator.protocol.stream import Phase
from stator.security import ALERT, Entrance, Refusals, is_tls
from stator.tasks import DeadlineWheel
from stator.tasks.wheel import Timed
from stator.transports.address import is_local, is_loopback, join_host_port, numeric_host
from stator.transports.closing import closed
from stator.transports.inbox import Inbox
from stator.transports.inputs import DuplexInbox
from stator.transports.listening import listen, own_place
from stator.transports.plane import PlaneHost, Traffic
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.input_sender import CompatibleInputSender

__all__ = ["CallHomeListener", "ExpectedStream"]

logger = logging.getLogger(__name__)

_AFTER_ERROR = 1.0
"""seconds for final frame and sentinel after an error item, which has ended the stream already"""

_CALLS_ON_THEIR_WAY = 0.5
"""seconds after the end of a worker's request connection in which its calls may still arrive"""

_NO_LINGER = struct.pack("ii", 1, 0)
"""Closing is a reset, as in the reference: after the sentinel nothing is in flight, before it the worker takes a reset for a kill,
also when this process dies; and no port has to rest in TIME_WAIT, which costs half of the rate."""


class ExpectedStream:
    """One request of a client from before it is sent to its end: the inbox's link to the plane."""

    __slots__ = ("_connection", "_inbox", "home", "inputs", "line", "reader", "subject")

    def __init__(self, listener: "CallHomeListener", inbox: Inbox, codec: Codec, limit: int) -> None:
        self.subject = listener.new_subject()
        self.reader = ResponseReader(inbox, codec=codec, limit=limit)
        self._inbox = inbox
        self.home = listener
        self.line: object = None
        """the request connection it was sent on"""
        self.inputs: CompatibleInputSender | None = None
        """a bidirectional request's"""
        self._connection: CallHomeConnection | None = None

    @property
    def instance(self) -> int:
        return self._inbox.instance

    # -- from the client

    def begin(self) -> None:
        """The request leaves now: its inbox is linked to it and waits for its acceptance."""
        inbox = self._inbox
        inbox.link = self
        if self.inputs is not None:
            assert isinstance(inbox, DuplexInbox)
            inbox.sender = self.inputs
        inbox.advance(Phase.ACCEPT)

    def withdraw(self) -> None:
        """The request cannot be sent: nobody is expected."""
        self.home.forget(self)
        if self.inputs is not None:
            self.inputs.close()

    # -- from the request connection

    def acknowledged(self, text: bytes) -> None:
        """The worker has the request, or says why not. Call-home may have been faster; then there is nothing to learn."""
        if self._connection is None and not self._inbox.ended:
            error = acknowledgement_error(text, instance=self.instance)
            if error is None:
                self._inbox.advance(Phase.CALL_HOME)
            else:
                self.fail(error)

    def fail(self, error: StatorError) -> None:
        """No answer will come. A stream whose worker has called home goes on."""
        if self._connection is None:
            self.home.forget(self)
            self._inbox.finish(error)

    # -- from the call-home connection

    def connected(self, connection: "CallHomeConnection") -> None:
        """The worker called home."""
        self._connection = connection
        self.reader.connected()

    @property
    def decided(self) -> bool:
        """Whether the outcome is known, so that the connection need not last."""
        return self._inbox.ended

    # -- StreamLink

    def stop(self) -> None:
        self.reader.stop()
        if self.inputs is not None:
            self.inputs.stop()
        if self._connection is not None:
            self._connection.flush()

    def kill(self) -> None:
        self.reader.kill()
        if self._connection is not None:
            self._connection.flush()
        else:
            self.home.forget(self)

    def taken(self) -> None:
        if self.reader.full and self._connection is not None:
            self._connection.resume_soon()


class CallHomeConnection(asyncio.Protocol):
    """One connection that a worker made."""

    __slots__ = ("_fresh", "_handshake", "_listener", "_resuming", "_stream", "_timer", "_transport", "since")

    def __init__(self, listener: "CallHomeListener") -> None:
        self._listener = listener
        self._handshake: HandshakeReader | None = HandshakeReader()
        self._stream: ExpectedStream | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._resuming = False
        self._fresh = True
        self.since = 0.0

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        self._listener.opened(self)

    def data_received(self, data: bytes) -> None:
        stream = self._stream
        if stream is None:
            self._greet(data)
            return
        try:
            stream.reader.receive_data(data)
        except PeerProtocolError as error:
            self._listener.violated(error)
        self._settle(stream)

    def _greet(self, data: bytes) -> None:
        """Bytes before the handshake is complete."""
        if self._handshake is None:
            return
        fresh, self._fresh = self._fresh, False
        if fresh and is_tls(data):
            self._turn_away()
            return
        try:
            found = self._handshake.receive_data(data)
            if found is None:
                return
            handshake, rest = found
            self._handshake = None
            if handshake.stream_type == "request":
                self._carry_inputs(self._listener.claim_inputs(self, handshake.subject))
                return
            stream = self._listener.claim(self, handshake.subject)
        except PeerProtocolError as error:
            self._listener.violated(error)
            self.abort()
            return
        self._stream = stream
        stream.connected(self)
        if stream.reader.closed:
            self.abort()
        elif rest:
            self.data_received(rest)

    def _turn_away(self) -> None:
        assert self._transport is not None
        self._handshake = None
        self._listener.speaks_tls(self._transport)
        self._transport.write(ALERT)
        self._transport.close()

    def _carry_inputs(self, sender: CompatibleInputSender) -> None:
        """The connection is for a caller's inputs: what happens on it from now on is their sender's."""
        assert self._transport is not None
        self._transport.set_protocol(sender)
        sender.connected(self._transport, lambda: self._listener.closed(self))

    def _settle(self, stream: ExpectedStream) -> None:
        """What the bytes just read ask of the connection."""
        reader, transport = stream.reader, self._transport
        if transport is None:
            return
        if reader.closed or reader.writes:
            self.flush()
        if reader.full:
            transport.pause_reading()
        if stream.decided and self._timer is None and not reader.closed:
            self._timer = asyncio.get_running_loop().call_later(_AFTER_ERROR, self.abort)

    def eof_received(self) -> bool:
        self._end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._end()
        self._stream = None
        self._listener.closed(self)

    def _end(self) -> None:
        if self._stream is not None:
            try:
                self._stream.reader.receive_eof()
            except PeerProtocolError as error:
                self._listener.violated(error)

    # -- from the stream

    def flush(self) -> None:
        """Write what the reader has to say; close behind it if it is done."""
        transport, stream = self._transport, self._stream
        if transport is None or stream is None or transport.is_closing():
            return
        data = stream.reader.data_to_send()
        if data:
            transport.write(data)
        if stream.reader.closed:
            transport.close()

    def resume_soon(self) -> None:
        """The application took what there was. Not at once: the caller is about to wait for what this will bring."""
        if not self._resuming:
            self._resuming = True
            asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        self._resuming = False
        stream, transport = self._stream, self._transport
        if stream is None or transport is None:
            return
        try:
            stream.reader.resume()
        except PeerProtocolError as error:
            self._listener.violated(error)
        if not stream.reader.full and not stream.reader.closed:
            transport.resume_reading()
        self._settle(stream)

    def abort(self) -> None:
        """Reset the connection, which the worker takes for a kill; an open stream is cut."""
        if self._transport is not None:
            self._transport.abort()


class CallHomeListener:
    """The listener of a process and the subjects it expects. Made by `CallHomeListener.listen`."""

    slot: set[Timed] | None = None

    def __init__(self, *, config: TcpConfig, wheel: DeadlineWheel, refusals: Refusals, entrance: Entrance) -> None:
        self._config = config
        self._wheel = wheel
        self._refusals = refusals
        self._entrance = entrance
        self._expected: dict[str, ExpectedStream] = {}
        self._inputs: dict[str, CompatibleInputSender] = {}
        """by subject, until their worker has called"""
        self._subjects: list[str] = []
        self._silent: dict[CallHomeConnection, None] = {}
        self._connected: set[CallHomeConnection] = set()
        self._server: asyncio.Server | None = None
        self._closed = False
        self.traffic = Traffic()
        """where the request connections count"""
        self.loopback = False
        """whether only this host can call"""
        self.address = ""
        """`host:port` that workers are told"""

    @classmethod
    async def listen(cls, config: TcpConfig, host: PlaneHost) -> "CallHomeListener":
        """Open the listener. Raises `ConnectFailed` for an address that cannot be bound; nothing is left open then."""
        own = config.call_home_host
        bound, advertised = await own_place(own, host, what="answers are awaited", setting="tcp.call_home_host")
        entrance = Entrance(tls=host.tls, refusals=host.refusals)
        listener = cls(config=config, wheel=host.wheel, refusals=host.refusals, entrance=entrance)
        advertised = await numeric_host(advertised)
        listener.loopback = is_loopback(advertised)
        server = await listen(
            lambda: entrance(CallHomeConnection(listener)), bound, config.call_home_port, purpose="wait for answers"
        )
        server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)  # accepted sockets inherit it
        listener._server = server
        listener.address = join_host_port(advertised, server.sockets[0].getsockname()[1])
        return listener

    @property
    def open_streams(self) -> int:
        """Requests that wait for their worker, and connections that have not ended."""
        return len(self._expected) + len(self._inputs) + len(self._connected)

    # -- subjects

    def new_subject(self) -> str:
        """A name that cannot be guessed: whoever knows it may answer the request."""
        if not self._subjects:
            entropy = os.urandom(64 * 16).hex()
            self._subjects = [entropy[start : start + 32] for start in range(0, len(entropy), 32)]
        return self._subjects.pop()

    def check_reachable_from(self, host: str, instance: int) -> None:
        """A worker elsewhere cannot call a loopback address: say so now instead of waiting for it. Raises `ConfigError`."""
        if self.loopback and not is_local(host):
            raise ConfigError(
                f"the worker at {host} is on another host and cannot call home to {self.address};"
                " set host (STATOR_HOST) or advertise_host (STATOR_ADVERTISE_HOST) to an address that the worker can reach",
                instance=instance,
                phase="connect",
            )

    def expect(self, inbox: Inbox, codec: Codec, *, inputs: bool) -> ExpectedStream:
        """Register a subject for a request that is about to be sent, and one for its `inputs` if it is bidirectional. What follows is
        `begin` or `withdraw`.
        """
        stream = ExpectedStream(self, inbox, codec, self._config.max_item_size)
        self._expected[stream.subject] = stream
        if inputs:
            self._expect_inputs(stream, codec)
        return stream

    def _expect_inputs(self, stream: ExpectedStream, codec: Codec) -> None:
        subject = self.new_subject()
        sender = CompatibleInputSender(
            subject=subject, codec=codec, loop=self._wheel.loop, forget=lambda: self._inputs.pop(subject, None)
        )
        self._inputs[subject] = stream.inputs = sender

    def forget(self, stream: ExpectedStream) -> None:
        """The request will not be answered: whoever calls home with its subject is turned away."""
        self._expected.pop(stream.subject, None)

    def forget_instance(self, instance: int) -> None:
        """The instance left discovery: what waits for its call will wait in vain."""
        for stream in [stream for stream in self._expected.values() if stream.instance == instance]:
            stream.fail(Disconnected("the instance left discovery before it called home", instance=instance, phase="call home"))

    def line_lost(self, line: object) -> None:
        """The worker closed a request connection, as it does when its process ends. Calls already on their way may be behind."""
        if any(stream.line is line for stream in self._expected.values()):
            self._wheel.loop.call_later(_CALLS_ON_THEIR_WAY, self._fail_sent_on, line)

    def _fail_sent_on(self, line: object) -> None:
        for stream in [stream for stream in self._expected.values() if stream.line is line]:
            stream.fail(Disconnected("the worker ended before it called home", instance=stream.instance, phase="call home"))

    # -- connections

    def opened(self, connection: CallHomeConnection) -> None:
        """Somebody connected and has not said for whom."""
        self._connected.add(connection)
        if self._closed:  # the kernel had taken it before
            connection.abort()
            return
        connection.since = self._wheel.now()
        self._silent[connection] = None
        if self.slot is None:
            self._wheel.arm(self, connection.since + self._config.handshake_timeout)
        if len(self._silent) > self._config.max_silent:
            next(iter(self._silent)).abort()

    def claim(self, connection: CallHomeConnection, subject: str) -> ExpectedStream:
        """The stream whose answer a handshake announces. `PeerProtocolError` when nobody expects it."""
        self._silent.pop(connection, None)
        stream = self._expected.pop(subject, None)
        if stream is None:
            raise PeerProtocolError("nobody expects an answer for this subject")
        return stream

    def claim_inputs(self, connection: CallHomeConnection, subject: str) -> CompatibleInputSender:
        """Whose inputs a handshake asks for. `PeerProtocolError` when nobody has any for it."""
        self._silent.pop(connection, None)
        sender = self._inputs.pop(subject, None)
        if sender is None:
            raise PeerProtocolError("nobody expects to send inputs for this subject")
        return sender

    def closed(self, connection: CallHomeConnection) -> None:
        """A connection ended."""
        self._silent.pop(connection, None)
        self._connected.discard(connection)

    def violated(self, error: PeerProtocolError) -> None:
        """A worker broke the protocol, or called home for a request that was given up."""
        logger.info("call-home connection closed: %s", error)

    def speaks_tls(self, transport: asyncio.Transport) -> None:
        """A worker called over TLS, and is turned away."""
        self._refusals.count("accepting", "encrypted")
        peer = transport.get_extra_info("peername")
        logger.warning("call-home connection from %s refused: it speaks TLS, which is not set here (tls.cert_path)", peer)

    def expire(self, now: float) -> float:
        """Called by the wheel: close connections that have said nothing for too long."""
        for connection in tuple(self._silent):
            due = connection.since + self._config.handshake_timeout
            if due > now:
                return due
            logger.info("call-home connection closed: no handshake within %s s", self._config.handshake_timeout)
            self._silent.pop(connection, None)
            connection.abort()
        return 0.0

    async def aclose(self) -> None:
        """Stop listening; streams end `Disconnected`, workers are told by the end of their connections."""
        self._closed = True
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self._entrance.close()
        for stream in tuple(self._expected.values()):
            stream.fail(Disconnected("the client closed its plane", instance=stream.instance))
        self.cut()
        self._wheel.disarm(self)
        await closed(server, lambda: len(self._connected))

    def cut(self) -> None:
        """End all connections without ceremony."""
        for connection in tuple(self._connected):
            connection.abort()
