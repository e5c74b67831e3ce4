"""One request of a caller that brings its stream along: the answer is the response body (`docs/http2-plane.md §3`)."""

import asyncio
import logging
from contextlib import suppress
from typing import Any

from stator.errors import PeerProtocolError, StatorError, UsageError
from stator.protocol.call_home import SENTINEL, STOP
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_frames import ErrorCode
from stator.protocol.http2_map import STREAM_TYPE, Fields, field_values, status_error
from stator.protocol.http2_session import Session
from stator.protocol.response_stream import ResponseReader
from stator.protocol.stream import Phase
from stator.protocol.two_part import encode_frame
from stator.protocol.values import encode_json
from stator.transports.inbox import Inbox
from stator.transports.inputs import DuplexInbox

__all__ = ["StreamCall"]

logger = logging.getLogger(__name__)

_NO_WINDOW = 2**62
"""items are decoded as they arrive: what the stream's window holds is the bound"""

_MOST_QUEUED = 64
"""inputs that wait for a write; also how many a caller sends without letting the loop run"""

_FOR_CONTROL = len(STOP)
"""bytes of the window that inputs leave for a stop behind them"""


class StreamCall(Exchange):
    """The caller's end of a stream: the inbox's link to the plane."""

    __slots__ = ("_inbox", "_reader", "_sender", "_session", "_stopped")

    def __init__(self, inbox: Inbox, session: Session, *, max_item: int, max_input: int) -> None:
        super().__init__(instance=inbox.instance)
        self._inbox = inbox
        self._session = session
        self._reader = ResponseReader(inbox, limit=max_item, window=_NO_WINDOW)
        self._stopped = False
        self._sender: Http2InputSender | None = None
        if isinstance(inbox, DuplexInbox):
            self.reserve = _FOR_CONTROL
            self._sender = inbox.sender = Http2InputSender(self, inbox, max_input)

    # -- from the session

    def headers(self, fields: Fields) -> None:
        facts = field_values(fields)
        if facts.get("content-type", "").partition(";")[0].strip() == STREAM_TYPE:
            self._reader.connected()
            return
        status = facts.get(":status", "")
        self._inbox.finish(status_error(int(status) if status.isdigit() else 0, instance=self.instance))
        self._drop()

    def data(self, data: bytes) -> None:
        try:
            self._reader.receive_data(data)
        except PeerProtocolError as error:
            logger.info("answer of instance %x dropped: %s", self.instance, error)
            self.reset(ErrorCode.CANCEL)
            return
        self._settle()

    def _settle(self) -> None:
        """What the bytes just read ask of the stream."""
        reader, inbox = self._reader, self._inbox
        if reader.closed or inbox.ended:
            self._session.linger(self)
        if not inbox.items:
            self.release()
        if self._sender is not None and inbox.phase >= Phase.FIRST_ITEM:
            self._sender.admitted()

    def ended(self) -> None:
        self._end_reading()
        if self.pending or not self.sent_parts:
            self.reset(ErrorCode.CANCEL)
        else:
            self.finish()

    def _end_reading(self) -> None:
        if not self._reader.closed:
            with suppress(PeerProtocolError):
                self._reader.receive_eof()

    def lost(self, error: StatorError) -> None:
        if self._inbox.phase <= Phase.ACCEPT:
            error.phase = Phase.ACCEPT.label
            self._inbox.finish(error)
        self._end_reading()

    def drained(self) -> None:
        if self._sender is not None:
            self._sender.released()

    # -- StreamLink

    def stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._reader.stop()  # the end of the answer is none of its errors from now on
        sender = self._sender
        if sender is None or (sender.ended and not self.pending):
            self.reserve = 0
            self.push(STOP)
        else:
            # The end of the body before that of the inputs is the stop: no window can keep it from leaving.
            sender.over = True
            self.truncate(0 if self.sent_parts else 1)
            self.finish()

    def kill(self) -> None:
        self._reader.kill()
        self.reset(ErrorCode.CANCEL)

    def taken(self) -> None:
        self.release()

    def give_up(self, error: StatorError) -> None:
        """End it with an error unless the worker has accepted it."""
        if self._inbox.phase <= Phase.ACCEPT and self._inbox.finish(error):
            self._drop()

    def _drop(self) -> None:
        """It was no stream of ours: nothing more of it is of interest."""
        self._reader.kill()
        self.reset(ErrorCode.CANCEL)


class Http2InputSender:
    """`InputSender` of a call: inputs go into the request body, as fast as the worker's handler takes them."""

    def __init__(self, call: StreamCall, inbox: DuplexInbox, max_input: int) -> None:
        self._call = call
        self._inbox = inbox
        self._max_input = max_input
        self._queued = 0
        self._admitted = False
        self._waiter: asyncio.Future[None] | None = None
        self.over = False
        self.ended = False
        """whether the end of the inputs was queued"""

    def send(self, item: Any) -> bool:
        if self.over:
            return False
        data = encode_json(item)
        if len(data) > self._max_input:
            raise UsageError(
                f"input of {len(data)} bytes is larger than the limit of {self._max_input} bytes (http2.max_request)"
            )
        self._call.push(encode_frame(data=data))
        self._queued += 1
        return self._queued < _MOST_QUEUED

    async def ready(self) -> None:
        await asyncio.sleep(0)
        while not self.over and (not self._admitted or self._call.pending):
            self._waiter = self._inbox.wheel.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def end(self) -> None:
        if not self.over:
            self.over = self.ended = True
            self._call.push(SENTINEL)
            self.released()

    def close(self) -> None:
        self.over = True
        self.released()

    def admitted(self) -> None:
        """The worker's handler was called."""
        if not self._admitted:
            self._admitted = True
            self.released()

    def released(self) -> None:
        """Everything queued has left, or nothing more will."""
        if not self._call.pending:
            self._queued = 0
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
