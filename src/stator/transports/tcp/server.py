"""The worker's side of the compatible plane: takes requests, acknowledges them, answers each by calling home."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

import msgspec

from stator.errors import ConnectFailed, EngineError, Overloaded, PeerProtocolError, StatorError, Unavailable
from stator.protocol.control_message import CallHomeAddress, ControlMessage, decode_control_message, read_call_home
from stator.protocol.envelope import Codec, IncomingRequest
from stator.protocol.partial import Data
from stator.protocol.records import EndpointRecord, Transport
from stator.protocol.request_frame import (
    ACCEPTED,
    INVALID_PATH,
    OVERLOADED,
    SHUTTING_DOWN,
    RequestFrame,
    overloaded,
    unavailable,
    unknown_endpoint,
)
from stator.protocol.two_part import decode_message
from stator.protocol.values import decode_value
from stator.tasks import DeadlineWheel, Scope
from stator.transports.plane import PlaneHost, RequestSink
from stator.transports.tcp.address import join_host_port, numeric_host
from stator.transports.tcp.admission import Admission
from stator.transports.tcp.answer import Answer
from stator.transports.tcp.closing import closed
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.headers import TRACE_HEADERS, read_deadline
from stator.transports.tcp.request_listener import RequestConnection

__all__ = ["CompatibleServer"]

logger = logging.getLogger(__name__)

_BACKLOG = 1024


class CompatibleServer:
    """`PlaneServer` of the compatible TCP plane. Made by `CompatibleServer.listen`."""

    def __init__(self, *, config: TcpConfig, wheel: DeadlineWheel) -> None:
        self._config = config
        self._wheel = wheel
        self._sinks: dict[str, RequestSink] = {}
        self._connections: set[RequestConnection] = set()
        self._answers: set[Answer] = set()
        self._dials = Scope("call-home dials")
        self._listener: asyncio.Server | None = None
        self._address = ""
        self._draining = False
        if config.engine_slots is not None:
            # The reference queues two requests even where the queue is set to less.
            self._admission = Admission(slots=config.engine_slots, queue=max(config.engine_queue, 2))
        else:
            self._admission = Admission(slots=config.pool_slots, queue=config.pool_queue)

    @classmethod
    async def listen(cls, config: TcpConfig, host: PlaneHost) -> "CompatibleServer":
        """Open the listener. Raises `ConnectFailed` for an address that cannot be bound; nothing is left open then."""
        bound, advertised = await numeric_host(host.bind_host), await numeric_host(host.advertise_host)
        server = cls(config=config, wheel=host.wheel)
        try:
            listener = await host.wheel.loop.create_server(server._accept, bound, config.port, backlog=_BACKLOG)
        except OSError as error:
            raise ConnectFailed(f"cannot listen on {bound}:{config.port}: {error}") from error
        server._listener = listener
        server._address = join_host_port(advertised, listener.sockets[0].getsockname()[1])
        return server

    @property
    def address(self) -> str:
        """`host:port` as advertised."""
        return self._address

    @property
    def open_streams(self) -> int:
        """Requests queued, being answered, or whose connection has not ended."""
        return len(self._answers) + self._admission.queued

    # -- PlaneServer

    def register(self, path: str, sink: RequestSink) -> None:
        self._sinks[path] = sink

    def unregister(self, path: str) -> None:
        self._sinks.pop(path, None)

    def describe(self, record: EndpointRecord, path: str) -> EndpointRecord:
        return msgspec.structs.replace(record, transport=Transport(tcp=f"{self._address}/{path}"))

    def drain(self) -> None:
        self._draining = True

    async def aclose(self) -> None:
        self._draining = True
        listener, self._listener = self._listener, None
        self._admission.clear()
        if listener is not None:
            listener.close()
        for connection in tuple(self._connections):
            connection.abort()
        for answer in tuple(self._answers):
            answer.abort()
        await self._dials.aclose()
        await closed(listener, lambda: len(self._connections) + len(self._answers))

    # -- requests

    def _accept(self) -> RequestConnection:
        connection = RequestConnection(
            take=self._take, gone=self._connections.discard, limit=self._config.max_message_size, wheel=self._wheel
        )
        self._connections.add(connection)
        return connection

    def _take(self, frame: RequestFrame) -> bytes:
        """Acknowledgement of a request that has arrived; it is started or queued, or somebody else may have it."""
        if frame.path is None:
            self._refuse(frame, PeerProtocolError("the endpoint path is not UTF-8"))
            return INVALID_PATH
        if self._draining:
            return SHUTTING_DOWN
        if frame.path not in self._sinks:
            # The reference's client takes this acknowledgement for success and would wait for ever: tell it at home too.
            self._refuse(frame, Unavailable(f"no endpoint is served at {frame.path}"))
            return unknown_endpoint(frame.path)
        if self._admission.take():
            return self._start(frame)
        if self._admission.wait(partial(self._start_queued, frame)):
            return ACCEPTED
        return OVERLOADED

    def _start(self, frame: RequestFrame) -> bytes:
        """Start a request that has a slot. What its sink refuses at once needs no call home."""
        try:
            self._serve(frame)
        except StatorError as error:
            self._admission.release()
            if isinstance(error, Overloaded):
                return overloaded(error.message)
            if isinstance(error, Unavailable):
                return unavailable(error.message)
            self._refuse(frame, error)
        return ACCEPTED

    def _start_queued(self, frame: RequestFrame) -> None:
        """Start a request that was acknowledged when it was queued."""
        try:
            self._serve(frame)
        except StatorError as error:
            self._admission.release()
            self._refuse(frame, error)

    def _serve(self, frame: RequestFrame) -> None:
        """Decode a request, hand it to its sink and call home. Raises when nothing was started."""
        header, data = decode_message(frame.payload)
        message = decode_control_message(header)
        address = read_call_home(header)
        request = _read_request(message, address, data, frame)
        sink = self._sinks.get(frame.path or "")
        if sink is None:
            raise Unavailable(f"no endpoint is served at {frame.path}")
        answer = self._answer(address, message.codec, message.id, self._admission.release)
        try:
            answer.controls(sink(request, answer))
        except StatorError:
            raise
        except Exception as error:  # a sink that is closing, or a bug in it: the connection carries other requests
            logger.exception("request %s could not be started", message.id)
            raise StatorError(f"the request could not be started: {error}") from error
        self._dial(answer)

    def _refuse(self, frame: RequestFrame, error: StatorError) -> None:
        """Call home to say no, if it can be read where home is (`spec/10 §11`, rule 3)."""
        logger.warning("request for %s refused: %s", frame.path, error)
        try:
            header, _ = decode_message(frame.payload)
            address = read_call_home(header)
            answer = self._answer(address, "json", address.context, lambda: None)
        except PeerProtocolError as unreadable:
            logger.warning("its client is not told: %s", unreadable)
            return
        answer.refuse(error)
        self._dial(answer)

    def _answer(self, address: CallHomeAddress, codec: Codec, request_id: str, released: Callable[[], None]) -> Answer:
        return Answer(
            address,
            codec=codec,
            request_id=request_id,
            wheel=self._wheel,
            linger=self._config.linger,
            released=released,
            gone=self._answers.discard,
        )

    def _dial(self, answer: Answer) -> None:
        self._answers.add(answer)
        answer.start(self._dials, timeout=self._config.connect_timeout)


def _read_request(message: ControlMessage, address: CallHomeAddress, data: Data, frame: RequestFrame) -> IncomingRequest:
    """The envelope of a request. Raises `PeerProtocolError`, or `EngineError` for what is not served."""
    if message.streams_in:
        raise EngineError("bidirectional requests are not served here", kind="InvalidArgument")
    if address.context != message.id or address.stream_type != "response":
        raise PeerProtocolError("the request's connection info belongs to another request")
    return IncomingRequest(
        id=message.id,
        body=decode_value(data, message.codec),
        metadata={} if message.metadata is msgspec.UNSET else message.metadata,
        headers={name: frame.headers[name] for name in TRACE_HEADERS if name in frame.headers},
        deadline=read_deadline(frame.headers),
    )
