"""One request and its response on an HTTP/2 session: what is to be sent, and what of the window is to be given back.

Subclasses say what arriving fields and bytes mean. Nothing here knows the library, or whose side it is.
"""

from collections import deque
from typing import Protocol

from stator.errors import StatorError
from stator.protocol.http2_map import Fields

__all__ = ["Exchange", "ExchangeSession"]


class ExchangeSession(Protocol):
    """What an exchange asks of its session (`stator.protocol.http2_session.Session`)."""

    writable: bool

    def want(self, exchange: "Exchange") -> None: ...

    def unblock(self, exchange: "Exchange") -> None: ...

    def give_back(self, exchange: "Exchange") -> None: ...

    def reset(self, exchange: "Exchange", code: int) -> None: ...


class Exchange:
    """A stream of a session. The session calls the methods below the line, in order of arrival; none may block or raise.

    `held` bytes of the window belong to data that arrived and was not released; at most the window, whatever the size of an item.
    """

    __slots__ = (
        "_offset",
        "_parts",
        "fields",
        "finishing",
        "free",
        "held",
        "instance",
        "local_ended",
        "number",
        "pending",
        "remote_ended",
        "reserve",
        "sent_parts",
        "session",
    )

    def __init__(self, *, instance: int = 0) -> None:
        self.instance = instance
        """whom it is with; 0: not known"""
        self.session: ExchangeSession | None = None
        """None before it was opened and after its end"""
        self.number = 0
        self.fields: Fields | None = None
        """a response's, until they have left"""
        self._parts: deque[bytes] = deque()
        self._offset = 0
        """bytes of the first part that have left"""
        self.pending = 0
        """bytes that wait to leave"""
        self.sent_parts = 0
        """parts that have left whole"""
        self.finishing = False
        """END_STREAM follows the last of them"""
        self.reserve = 0
        """bytes of the window that are kept for what comes last"""
        self.local_ended = False
        self.remote_ended = False
        self.held = 0
        self.free = 0
        """bytes released and not yet given back to the window"""

    # -- sending

    def push(self, data: bytes) -> None:
        """Queue bytes; they leave as fast as the window allows."""
        if self.session is not None and not self.finishing:
            self._parts.append(data)
            self.pending += len(data)
            self.session.want(self)

    def finish(self) -> None:
        """Nothing follows what is queued."""
        if self.session is not None and not self.finishing:
            self.finishing = True
            self.session.want(self)

    def truncate(self, keep: int) -> None:
        """Drop queued parts, but for the first `keep`."""
        while len(self._parts) > keep:
            self.pending -= len(self._parts.pop())
        if not self._parts:
            self.pending = self._offset = 0
        if self.session is not None:
            self.session.unblock(self)

    def take(self, most: int) -> bytes:
        """At most `most` bytes of what is queued, for one frame."""
        parts = self._parts
        if self.pending <= most and not self._offset:
            data = parts[0] if len(parts) == 1 else b"".join(parts)
            self.sent_parts += len(parts)
            parts.clear()
            self.pending = 0
            return data
        chunks: list[bytes] = []
        left = most
        while left and parts:
            part = parts[0]
            chunk = part[self._offset : self._offset + left]
            chunks.append(chunk)
            left -= len(chunk)
            self._offset += len(chunk)
            if self._offset == len(part):
                parts.popleft()
                self._offset = 0
                self.sent_parts += 1
        data = b"".join(chunks)
        self.pending -= len(data)
        return data

    # -- receiving

    def release(self) -> None:
        """What has arrived was taken: the other side may send as much again."""
        self.free += self.held
        self.held = 0
        if self.free and self.session is not None:
            self.session.give_back(self)

    def reset(self, code: int) -> None:
        """End it here and there. Harmless after its end."""
        if self.session is not None:
            self.session.reset(self, code)

    # -- called by the session --------------------------------------------------------------------------------------------

    def headers(self, fields: Fields) -> None:
        """The response's fields (client)."""

    def data(self, data: bytes) -> None:
        """Bytes of the other side's body; they count as held until `release`."""
        self.release()

    def ended(self) -> None:
        """The other side's body is complete."""

    def lost(self, error: StatorError) -> None:
        """The other side reset the stream, or the connection is gone: nothing more comes or leaves."""

    def too_slow(self, limit: float) -> None:
        """The request has not arrived within `limit` seconds (worker)."""

    def produce(self) -> None:
        """About to send: `push` what is ready."""

    def drained(self) -> None:
        """Everything queued has left."""
