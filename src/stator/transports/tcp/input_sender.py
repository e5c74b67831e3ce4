"""The caller's inputs on the compatible plane: a connection of their own, which the worker makes (`spec/10 §5`)."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from stator.protocol.envelope import Codec
from stator.protocol.request_stream import RequestWriter

__all__ = ["CompatibleInputSender"]

_MOST_QUEUED = 64
"""inputs that wait for a write, besides the kernel's buffers; also how many a caller sends without letting the loop run"""


class CompatibleInputSender(asyncio.Protocol):
    """`InputSender` of one request, and the protocol of its connection from the handshake on.

    `forget` is called once, when nobody need call for it any more: it was closed, or its connection has ended.
    """

    def __init__(self, *, subject: str, codec: Codec, loop: asyncio.AbstractEventLoop, forget: Callable[[], object]) -> None:
        self.subject = subject
        self._writer = RequestWriter(codec=codec)
        self._loop = loop
        self._forget: Callable[[], object] | None = forget
        self._gone: Callable[[], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._queued = 0
        self._paused = False
        self._scheduled = False
        self.over = False

    # -- InputSender

    def send(self, item: Any) -> bool:
        if self.over:
            return False
        self._writer.send(item)
        self._queued += 1
        self._wake()
        return self._queued < _MOST_QUEUED and not self._paused

    async def ready(self) -> None:
        await asyncio.sleep(0)
        while not self.over and (self._transport is None or self._paused or self._queued >= _MOST_QUEUED):
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def end(self) -> None:
        if not self.over:
            self.over = True
            self._writer.end()
            self._wake()

    def stop(self) -> None:
        """The request is to end gracefully: drop what has not left, say so here too. The reference does."""
        if not self._writer.closed:
            self.over = True
            self._writer.stop()
            self._wake()
            self._release()

    def close(self) -> None:
        self.over = True
        self._release()
        forget, self._forget = self._forget, None
        if forget is not None:
            forget()
        if self._transport is not None:
            self._transport.abort()  # for a worker that still listens, a kill

    # -- the connection

    def connected(self, transport: asyncio.Transport, gone: Callable[[], None]) -> None:
        """The worker called for the inputs. `gone` is called once, when the connection has ended."""
        self._gone = gone
        self._transport = transport
        transport.set_write_buffer_limits(high=0)
        self._release()
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Workers say nothing here."""

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """The worker takes no more inputs; what becomes of the request is said on the answer's connection."""
        self._transport = None
        self.close()
        gone, self._gone = self._gone, None
        if gone is not None:
            gone()

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
        data = self._writer.data_to_send()
        if data:
            transport.write(data)
            if self._writer.closed:
                with contextlib.suppress(OSError):  # a connection that was just reset: its end is about to be told
                    transport.write_eof()  # not closed before the worker has read it all: closing is a reset here
        if not self._paused:
            self._release()

    def _release(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
