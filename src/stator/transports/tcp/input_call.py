"""The worker's end of a caller's inputs on the compatible plane: calls for them, reads them as fast as the handler does (`spec/10 §5`)."""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol, cast

from stator.errors import Cancelled
from stator.protocol.call_home import Control, encode_handshake
from stator.protocol.control_message import CallHomeAddress, parse_address
from stator.protocol.envelope import Codec
from stator.protocol.request_stream import RequestReader
from stator.tasks import Scope
from stator.transports.inputs import InputStream
from stator.transports.tcp.home_caller import HomeCaller

__all__ = ["InputCall"]

logger = logging.getLogger(__name__)


class Request(Protocol):
    """What an input may do to the request it belongs to (`stator.transports.tcp.answer.Answer`)."""

    def stop(self) -> None: ...

    def abort(self) -> None: ...


class InputCall(asyncio.Protocol):
    """The connection for the inputs of one request, and the link of what its handler reads. `gone` is called when nothing is left of it."""

    def __init__(
        self,
        address: CallHomeAddress,
        *,
        codec: Codec,
        inputs: InputStream,
        request: Request,
        caller: HomeCaller,
        gone: Callable[["InputCall"], None],
    ) -> None:
        """Raises `PeerProtocolError` when the address is none."""
        self._host, self._port = parse_address(address.address)
        self._request_id = address.context
        self._handshake = encode_handshake(address.subject, "request")
        self._reader = RequestReader(inputs, codec=codec)
        self._inputs = inputs
        self._request: Request | None = request
        self._caller = caller
        self._gone: Callable[[InputCall], None] | None = gone
        self._transport: asyncio.Transport | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._resuming = False
        inputs.link = self

    # -- dialling

    def start_dialling(self, scope: Scope, *, timeout: float) -> None:
        """Dial in a task of `scope`, for at most `timeout` seconds. A failure kills the request: its inputs cannot be had."""
        self._dialling = scope.spawn(self._dial(timeout))
        self._dialling.add_done_callback(self._dialled)

    async def _dial(self, timeout: float) -> None:
        try:
            async with self._caller.turn(self._host, self._port), asyncio.timeout(timeout):
                await self._caller.call(self, self._host, self._port)
        except OSError as error:  # a TimeoutError is one
            why = error or "no connection in time"
            logger.warning("request %s: its inputs cannot be had from %s:%d: %s", self._request_id, self._host, self._port, why)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dialling = None
        if self._transport is None:
            self._kill()
            self._leave()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        if self._request is None:
            self._transport.abort()
            return
        self._transport.write(self._handshake)

    def data_received(self, data: bytes) -> None:
        if not self._reader.closed:
            self._settle(self._reader.receive_data(data))

    def eof_received(self) -> None:
        """The client has said everything."""
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end()
        self._leave()

    def _end(self) -> None:
        if not self._reader.closed:
            self._settle(self._reader.receive_eof())

    def _settle(self, wish: Control | None) -> None:
        """What the frames just read ask of the request and of the connection."""
        if wish is Control.KILL:
            self._kill()
        elif wish is Control.STOP and self._request is not None:
            self._request.stop()
        transport = self._transport
        if transport is not None:
            if self._reader.closed:
                transport.close()
            elif self._reader.full:
                transport.pause_reading()

    # -- StreamLink

    def stop(self) -> None:
        """The caller hears of the answer's end instead."""

    def kill(self) -> None:
        """The handler reads no more: what still comes stays in the kernel."""

    def taken(self) -> None:
        if self._reader.full and not self._resuming:
            self._resuming = True
            asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        self._resuming = False
        if self._reader.closed:
            return
        self._settle(self._reader.resume())
        if self._transport is not None and not self._reader.full and not self._reader.closed:
            self._transport.resume_reading()

    # -- ends

    def _kill(self) -> None:
        if self._request is not None:
            self._request.abort()

    def close(self) -> None:
        """The request is over, or is not served: no inputs are wanted. Idempotent."""
        self._request = None
        self._inputs.finish(Cancelled("the request has ended"))
        if self._transport is not None:
            self._transport.abort()
        elif self._dialling is not None:
            self._dialling.cancel()
        else:
            self._leave()

    def _leave(self) -> None:
        self._request = None
        gone, self._gone = self._gone, None
        if gone is not None:
            gone(self)
