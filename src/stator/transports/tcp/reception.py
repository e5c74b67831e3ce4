"""What a worker does with a request of the compatible plane, whatever it came by: decodes it, hands it on, answers by calling home."""

import logging
from typing import Any

import msgspec

from stator.errors import Overloaded, PeerProtocolError, StatorError, Unavailable
from stator.protocol.control_message import (
    CallHomeAddress,
    ControlMessage,
    decode_control_message,
    parse_address,
    read_call_home,
    read_inputs_home,
)
from stator.protocol.envelope import Codec, IncomingRequest
from stator.protocol.partial import Data
from stator.protocol.request_frame import (
    ACCEPTED,
    INVALID_PATH,
    SHUTTING_DOWN,
    RequestFrame,
    overloaded,
    unavailable,
    unknown_endpoint,
)
from stator.protocol.two_part import decode_message
from stator.protocol.values import decode_value
from stator.security import Refusals, Tls
from stator.tasks import DeadlineWheel, Scope
from stator.transports.closing import closed
from stator.transports.inputs import InputStream
from stator.transports.plane import Malformed, RequestSink
from stator.transports.tcp.answer import Answer
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.headers import TRACE_HEADERS, read_deadline, read_sent_ns
from stator.transports.tcp.home_caller import HomeCaller
from stator.transports.tcp.input_call import InputCall

__all__ = ["Reception"]

logger = logging.getLogger(__name__)


class Reception:
    """The endpoints of a process and the answers it is giving. `take` each request, `aclose` at the end."""

    def __init__(
        self,
        *,
        config: TcpConfig,
        wheel: DeadlineWheel,
        input_timeout: float | None,
        tls: Tls | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        self._config = config
        self._input_timeout = input_timeout
        self._wheel = wheel
        self._caller = HomeCaller(tls=tls, refusals=refusals or Refusals())
        self._sinks: dict[str, RequestSink] = {}
        self._calls: set[InputCall] = set()
        self._dials = Scope("call-home dials")
        self.answers: set[Answer] = set()
        """requests that wait for a slot or are being answered"""
        self.draining = False
        """whether new requests are refused"""

    @property
    def open_streams(self) -> int:
        """Requests queued, being answered, or whose connection has not ended."""
        return len(self.answers) + len(self._calls)

    def register(self, path: str, sink: RequestSink) -> None:
        """Requests for `path` go to `sink`."""
        self._sinks[path] = sink

    def unregister(self, path: str) -> None:
        """Requests for `path` are refused."""
        self._sinks.pop(path, None)

    async def aclose(self) -> None:
        """Cut what is being answered. Idempotent."""
        self.draining = True
        for answer in tuple(self.answers):
            answer.abort()
        await self._dials.aclose()
        await closed(None, lambda: self.open_streams)

    # -- requests

    def take(self, frame: RequestFrame) -> bytes:
        """Acknowledgement of a request that has arrived; it is started or queued, or somebody else may have it."""
        if frame.path is None:
            self.refuse(frame, PeerProtocolError("the endpoint path is not UTF-8"))
            return INVALID_PATH
        if self.draining:
            return SHUTTING_DOWN
        sink = self._sinks.get(frame.path)
        if sink is None:
            # The reference's client takes this acknowledgement for success and would wait for ever: tell it at home too.
            self.refuse(frame, Unavailable(f"no endpoint is served at {frame.path}"))
            return unknown_endpoint(frame.path)
        try:
            self._serve(frame, sink)
        except Overloaded as error:
            return overloaded(error.message)
        except Unavailable as error:
            return unavailable(error.message)
        except StatorError as error:
            self.refuse(frame, error)
        return ACCEPTED

    def _serve(self, frame: RequestFrame, sink: RequestSink) -> None:
        """Decode a request, hand it to its sink and call home, unless it has to wait. Raises when nothing was started."""
        kind: Malformed = "invalid_message"
        try:
            header, data = decode_message(frame.payload)
            _check_parts(header, data)
            kind = "deserialization"
            message = decode_control_message(header)
            body = _read_body(message, data)
            kind = "response_stream"
            answer = self._answer(_home(header, message), message.codec, message.id)
            if message.streams_in:
                body = self._call_for_inputs(message, answer)
        except StatorError:
            sink.malformed(len(frame.payload), kind)
            raise
        try:
            answer.controls(sink(_request(message, body, frame), answer))
        except Exception as error:
            answer.end_inputs()
            if isinstance(error, StatorError):
                raise
            # a sink that is closing, or a bug in it: the connection carries other requests
            logger.exception("request %s could not be started", message.id)
            raise StatorError(f"the request could not be started: {error}") from error
        self.answers.add(answer)
        if not answer.waiting:
            self._dial(answer)

    def _call_for_inputs(self, message: ControlMessage, answer: Answer) -> InputStream:
        """What the handler of a bidirectional request reads. Raises `PeerProtocolError`; nothing was made then."""
        home = read_inputs_home(message)
        parse_address(home.address)
        inputs = InputStream(wheel=self._wheel, limit=self._input_timeout)
        call = InputCall(
            home, codec=message.codec, inputs=inputs, request=answer, caller=self._caller, gone=self._calls.discard
        )
        self._calls.add(call)
        answer.reads(call)
        return inputs

    def refuse(self, frame: RequestFrame, error: StatorError) -> None:
        """Call home to say no, if it can be read where home is (`spec/10 §11`, rule 3)."""
        logger.warning("request for %s refused: %s", frame.path, error)
        try:
            header, _ = decode_message(frame.payload)
            address = read_call_home(header)
            answer = self._answer(address, "json", address.context)
        except PeerProtocolError as unreadable:
            logger.warning("its client is not told: %s", unreadable)
            return
        answer.refuse(error)
        self._dial(answer)

    def _answer(self, address: CallHomeAddress, codec: Codec, request_id: str) -> Answer:
        return Answer(
            address,
            codec=codec,
            request_id=request_id,
            caller=self._caller,
            wheel=self._wheel,
            linger=self._config.linger,
            on_start=self._dial,
            gone=self.answers.discard,
        )

    def _dial(self, answer: Answer) -> None:
        self.answers.add(answer)
        answer.start_dialling(self._dials, timeout=self._config.connect_timeout)


def _check_parts(header: bytes, data: Data) -> None:
    """Raises `PeerProtocolError` if one is missing."""
    if not header:
        raise PeerProtocolError("the request has no control message")
    if not data and not decode_control_message(header).streams_in:
        raise PeerProtocolError("the request is empty, which is not json")


def _home(header: bytes, message: ControlMessage) -> CallHomeAddress:
    """Where the answer goes. Raises `PeerProtocolError`."""
    address = read_call_home(header)
    if address.context != message.id or address.stream_type != "response":
        raise PeerProtocolError("the request's connection info belongs to another request")
    return address


def _read_body(message: ControlMessage, data: Data) -> Any:
    """The request's value; None for a bidirectional one, which has none. Raises `PeerProtocolError`."""
    if not message.streams_in:
        return decode_value(data, message.codec)
    if data:
        raise PeerProtocolError("a bidirectional request has a value of its own")
    return None


def _request(message: ControlMessage, body: Any, frame: RequestFrame) -> IncomingRequest:
    """What the sink is given."""
    return IncomingRequest(
        id=message.id,
        body=body,
        metadata={} if message.metadata is msgspec.UNSET else message.metadata,
        headers={name: frame.headers[name] for name in TRACE_HEADERS if name in frame.headers},
        deadline=read_deadline(frame.headers),
        size=len(frame.payload),
        sent_ns=read_sent_ns(frame.headers),
        streams_in=message.streams_in,
    )
