"""Requests that came without a stream: their answers call home (`spec/10 §7`), or they are turned away."""

from stator.errors import Overloaded
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_map import NOT_FOUND, Fields
from stator.protocol.http2_session import Session
from stator.protocol.request_frame import OVERLOADED, RequestFrame
from stator.transports.http2.desk import Desk

__all__ = ["PlainAnswer", "PushedRequest", "push"]


def push(desk: Desk, path: str | None, facts: dict[str, str], payload: bytes) -> tuple[int, bytes]:
    """Take a request whose answer calls home: the status and the body of what is said at once."""
    if path is None:
        return 404, NOT_FOUND
    text = desk.reception.take(RequestFrame(path=path, headers=facts, payload=payload))
    return (503, text) if text else (202, b"")


class PlainAnswer(Exchange):
    """Answers with a status and a text as soon as it is asked."""

    __slots__ = ("_allow", "_desk", "_session", "_status", "_text")

    def __init__(self, desk: Desk, session: Session, status: int, text: bytes, *, allow: bytes = b"") -> None:
        super().__init__()
        self._desk = desk
        self._session = session
        self._status = status
        self._text = text
        self._allow = allow

    def headers(self, fields: Fields) -> None:
        self.say(self._status, self._text)

    def say(self, status: int, text: bytes) -> None:
        """The whole response."""
        if self.finishing:
            return
        if status != 202:
            self._desk.count(str(status))
        more = [(b"content-type", b"text/plain; charset=utf-8")] if text else []
        if self._allow:
            more.append((b"allow", self._allow))
        head = [(b":status", b"%d" % status), (b"content-length", b"%d" % len(text))]
        self._session.has_arrived(self)
        self._session.respond(self, head + more)
        if text:
            self.push(text)
        self.finish()

    def data(self, data: bytes) -> None:
        """Dropped, and the window closes."""


class PushedRequest(PlainAnswer):
    """A request whose body is a TwoPart message that says where to call."""

    __slots__ = ("_body", "_facts", "_path", "_size")

    def __init__(self, desk: Desk, session: Session, path: str | None, facts: dict[str, str]) -> None:
        super().__init__(desk, session, 202, b"")
        self._path = path
        self._facts = facts
        self._body: list[bytes] = []
        self._size = 0

    def headers(self, fields: Fields) -> None:
        if self._path is None:
            self.say(404, NOT_FOUND)

    def data(self, data: bytes) -> None:
        if self.finishing:
            return
        if self._size + len(data) > self._desk.config.max_request:
            self.say(413, b"request is larger than %d bytes" % self._desk.config.max_request)
            return
        try:
            self._desk.budget.take(len(data))
        except Overloaded:
            self.say(503, OVERLOADED)
            return
        self._size += len(data)
        self._body.append(data)
        self.release()

    def say(self, status: int, text: bytes) -> None:
        self._forget()
        super().say(status, text)

    def ended(self) -> None:
        if not self.finishing:
            body = b"".join(self._body)
            self.say(*push(self._desk, self._path, self._facts, body))

    def too_slow(self, limit: float) -> None:
        self.say(408, b"the request did not arrive within %g s" % limit)

    def lost(self, error: object) -> None:
        self._forget()

    def _forget(self) -> None:
        size, self._size = self._size, 0
        self._body.clear()
        self._desk.budget.give(size)
