"""One answer of a worker: calls the client home, writes the response stream, hears "stop" and "kill" (`spec/10 §3, §4`)."""

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any, cast

from stator.errors import StatorError
from stator.protocol.call_home import Control
from stator.protocol.control_message import CallHomeAddress, parse_address
from stator.protocol.envelope import Codec
from stator.protocol.response_stream import ResponseWriter
from stator.tasks import DeadlineWheel, Scope
from stator.tasks.wheel import Timed
from stator.transports.plane import RequestControl
from stator.transports.tcp.home_caller import HomeCaller
from stator.transports.tcp.input_call import InputCall

__all__ = ["Answer"]

logger = logging.getLogger(__name__)

MOST_QUEUED = 64
"""items that wait for a write, besides the kernel's buffers; also how many a producer makes without letting the loop run"""

_RETRY_DIAL = 0.2
"""seconds before the next try when this host has no free port (`spec/10 §3.8`)"""

_FIRST_LOOK = 0.1
_RAREST_LOOK = 5.0
"""seconds from a client's FIN to the first look whether it is still there; each next one is twice as far, up to the second"""

_TCP_CLOSE = 7


class Answer(asyncio.Protocol):
    """`Responder` of one request and the protocol of its call-home connection, which is dialled while the handler starts.

    `on_start` is called when a request that waited has its slot; `gone` once, when nothing of it is left.
    """

    slot: set[Timed] | None = None

    def __init__(
        self,
        address: CallHomeAddress,
        *,
        codec: Codec,
        request_id: str,
        caller: HomeCaller,
        wheel: DeadlineWheel,
        linger: float,
        on_start: Callable[["Answer"], None] | None,
        gone: Callable[["Answer"], None],
    ) -> None:
        """Raises `PeerProtocolError` when the address is none."""
        self._host, self._port = parse_address(address.address)
        self._writer = ResponseWriter(subject=address.subject, codec=codec)
        self._request_id = request_id
        self._caller = caller
        self._wheel = wheel
        self._loop = wheel.loop
        self._linger = linger
        self._on_start = on_start
        self.waiting = False
        """its request waits for a slot; it is not dialled before it has one"""
        self._gone: Callable[[Answer], None] | None = gone
        self._control: RequestControl | None = None
        self._inputs: InputCall | None = None
        self._transport: asyncio.Transport | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._queued = 0
        self._paused = False
        self._scheduled = False
        self._ended = False
        self._accepted = False
        self._client_shut = False
        self._look = _FIRST_LOOK

    # -- dialling

    def start_dialling(self, scope: Scope, *, timeout: float) -> None:
        """Dial in a task of `scope`, for at most `timeout` seconds. A failure kills the request: nobody hears the answer."""
        if self._inputs is not None:
            self._inputs.start_dialling(scope, timeout=timeout)
        if self._caller.tls is None:
            self._wheel.arm(self, self._wheel.now() + timeout)
        self._dialling = scope.spawn(self._dial(timeout))
        self._dialling.add_done_callback(self._dialled)

    async def _dial(self, timeout: float) -> None:
        async with self._caller.turn(self._host, self._port):
            if self._caller.tls is not None:  # its time begins with its turn
                self._wheel.arm(self, self._wheel.now() + timeout)
            await self._dial_now()

    async def _dial_now(self) -> None:
        while True:
            try:
                await self._caller.call(self, self._host, self._port)
                return
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    self._unreachable(str(error))
                    return
            await asyncio.sleep(_RETRY_DIAL)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dialling = None
        if self._transport is None:
            if self._control is not None and not self._ended:
                self._control.unreachable()
            self._kill()
            self._leave()

    def _unreachable(self, why: str) -> None:
        logger.warning("request %s: its client cannot be reached at %s:%d: %s", self._request_id, self._host, self._port, why)

    def controls(self, control: RequestControl) -> None:
        """What to tell when the client stops or kills the request."""
        self._control = control

    def reads(self, inputs: InputCall) -> None:
        """The request is bidirectional: its inputs are called for as the answer is, and end with it."""
        self._inputs = inputs

    # -- Responder

    @property
    def sent_items(self) -> int:
        return self._writer.sent_items

    @property
    def sent_bytes(self) -> int:
        return self._writer.sent_bytes

    def wait(self) -> None:
        self.waiting = True

    def start(self) -> None:
        self.waiting = False
        if self._on_start is not None:
            self._on_start(self)

    def accept(self) -> None:
        if not self._ended:
            self._accepted = True
            self._writer.accept()
            self._wake()

    def refuse(self, error: StatorError) -> None:
        if not self._ended:
            self._writer.refuse(error)
            self._end()

    def send(self, item: Any) -> bool:
        """Token path: one encode, one list append."""
        if self._ended:
            return False
        self._writer.send(item)
        self._queued = queued = self._queued + 1
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)
        return queued < MOST_QUEUED and not self._paused

    async def ready(self) -> None:
        await asyncio.sleep(0)
        while not self._ended and (self._paused or self._queued >= MOST_QUEUED):
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def end(self, error: StatorError | None = None) -> None:
        if not self._ended:
            self._writer.end(error)
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._wake()
        self.end_inputs()

    # -- writing

    def _wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Everything of this loop tick in one write; nothing while the kernel takes no more."""
        self._scheduled = False
        transport = self._transport
        if transport is None or self._paused or transport.is_closing():
            return
        self._queued = 0
        for data in self._writer.data_to_send():
            transport.write(data)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._ended and not self._paused:
            self._finish(transport)

    def _finish(self, transport: asyncio.Transport) -> None:
        """The sentinel is out: the client closes, and is given `linger` seconds for it (`spec/10 §3.4`)."""
        if self._client_shut:
            transport.close()
        else:
            self._wheel.arm(self, self._wheel.now() + self._linger)

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wheel.disarm(self)
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        self._transport.set_write_buffer_limits(high=0)
        self._flush()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def data_received(self, data: bytes) -> None:
        if data[0] and self._caller.alerted(data, self._host, self._port):  # the size of a control frame begins with a 0
            self.abort()
            return
        for wish in self._writer.receive_data(data):
            if wish is Control.KILL:
                self.abort()
            else:
                self.stop()

    def eof_received(self) -> bool:
        """The client shut its side: it may still read (`spec/10 §3.8`) or be dead. Probes tell, if no write does before."""
        if self._ended and not self._writer.out:
            return False
        self._client_shut = True
        self._probe()
        self._wheel.arm(self, self._wheel.now() + _FIRST_LOOK)
        return True

    def _probe(self) -> None:
        """Send a frame that a reader skips (`spec/10 §3.3`): a host whose socket is closed answers it with a reset."""
        if self._accepted and not self._ended:
            self._writer.skip()
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._kill()
        self._leave()

    def expire(self, now: float) -> float:
        """Called by the wheel: the client did not answer or close in time, or it is time to see whether it lives."""
        transport = self._transport
        if transport is None:
            if self._dialling is not None:
                self._unreachable("no connection in time")
                self._dialling.cancel()
            return 0.0
        if self._ended:
            transport.abort()
            return 0.0
        # A transport that has seen the end of its input does not hear of a reset.
        if transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            self.abort()
            return 0.0
        self._probe()
        self._look = min(2 * self._look, _RAREST_LOOK)
        return now + self._look

    # -- ends

    def stop(self) -> None:
        """The client asks for a graceful end."""
        if self._control is not None and not self._ended:
            self._control.stop()

    def abort(self) -> None:
        """End without ceremony: the client wants nothing more, or this process closes."""
        self._kill()
        if self._transport is not None:
            self._transport.abort()
        elif self._dialling is not None:
            self._dialling.cancel()
        else:
            self._leave()

    def _kill(self) -> None:
        if not self._ended:
            self._ended = True
            if self._control is not None:
                self._control.kill()
            self.end_inputs()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end_inputs(self) -> None:
        """The request is over, or was not taken: no inputs are wanted."""
        inputs, self._inputs = self._inputs, None
        if inputs is not None:
            inputs.close()

    def _leave(self) -> None:
        """Nothing is left: let go of everything."""
        self._wheel.disarm(self)
        self._control = None
        gone, self._gone = self._gone, None
        if gone is not None:
            gone(self)
