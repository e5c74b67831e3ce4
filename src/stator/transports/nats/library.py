"""One connection, made by the library `nats`: the only module that imports it.

The library dials, logs in and takes the server's bytes apart. It does not reconnect (it neither backs off nor gives up a server that
has stopped to read), and messages pass it by: what is sent is written to its socket once per loop tick, what arrives is handed over
where it was parsed, instead of by a queue and a task per subscription. Its own question for a pong breaks its reader when it is
cancelled, so that is ours too.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import UnexpectedEOF

from stator.config import Secret
from stator.tasks import Scope
from stator.transports.nats.config import NatsConfig
from stator.transports.nats.login import Login
from stator.transports.nats.wire import PING, Message

__all__ = ["NatsSocket"]

logger = logging.getLogger(__name__)

_GOODBYE = 1.0
"""seconds for a server to take what was written last"""
_SOON = 0.1
"""seconds for the library to see that its connection was cut; after a failed TLS handshake it never does"""
_NEVER = 86_400


class NatsSocket(Client):
    """One connection to one server. `open` once, `discard` once, whatever happened in between.

    `arrived` is given each message with the number of its subscription; `ended` is called, perhaps more than once, when the connection
    is of no use any more.
    """

    def __init__(self, login: Login, *, arrived: Callable[[int, Message], object], ended: Callable[[str], object]) -> None:
        super().__init__()
        self._login = login
        self._insists_on_tls = login.tls is not None
        self._arrived = arrived
        self._tell_end = ended
        self._asked: deque[asyncio.Future[None]] = deque()
        self._out: list[bytes] = []
        self._out_size = 0
        self.reason = ""
        """what went wrong last"""
        if login.key is not None:
            self._auth_configured = True
            self._public_nkey = login.key.public

    async def open(self, url: str, config: NatsConfig, *, name: str) -> None:
        """Dial and log in. Raises `NatsError`, `OSError` or anything that an answer of a stranger leads the library to."""
        login, jwt = self._login, self._login.jwt

        async def closed() -> None:
            self._tell_end(self.reason or str(self.last_error or "it closed the connection"))

        await cast("Any", self).connect(  # its type is partly unknown
            servers=[url],
            name=name,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=config.connect_timeout,
            ping_interval=_NEVER,
            error_cb=self._went_wrong,
            closed_cb=closed,
            tls=login.tls,
            tls_hostname=config.tls_name or None,
            tls_handshake_first=config.tls_first,
            user=login.user,
            password=_revealed(login.password),
            token=_revealed(login.token),
            signature_cb=None if login.key is None else login.key.sign,
            user_jwt_cb=None if jwt is None else lambda: jwt.reveal().encode(),
        )

    async def _went_wrong(self, error: Exception) -> None:
        self.reason = str(error) or type(error).__name__
        if isinstance(error, UnexpectedEOF):
            self._tell_end("it closed the connection")
        elif "permissions violation" in self.reason:
            logger.warning("NATS forbids something: %s", self.reason)
        else:
            logger.debug("nats: %s", self.reason)

    # -- the library's inside

    def _connect_command(self) -> bytes:
        """The last moment before the login is sent."""
        writer = self._writer
        if self._insists_on_tls and (writer is None or writer.get_extra_info("ssl_object") is None):
            raise NatsError("the server does not speak TLS, so it is not told who we are")
        return super()._connect_command()

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        """A message. Token path of requests and events."""
        try:
            self._arrived(sid, Message(subject.decode(errors="replace"), data, reply.decode(errors="replace"), headers or b""))
        except Exception:  # of a reader; the connection has others
            logger.exception("a message on %r could not be taken", subject)

    async def _process_pong(self) -> None:
        if self._asked and not (future := self._asked.popleft()).done():
            future.set_result(None)

    @property
    def _writer(self) -> asyncio.StreamWriter | None:
        return getattr(self._transport, "_io_writer", None)

    # -- sending

    def write(self, data: bytes) -> None:
        """Send with what else is written in this loop tick."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out.append(data)
        self._out_size += len(data)

    def _flush(self) -> None:
        out, self._out, self._out_size = self._out, [], 0
        writer = self._writer
        if out and writer is not None and not writer.transport.is_closing():
            writer.transport.write(out[0] if len(out) == 1 else b"".join(out))

    @property
    def backlog(self) -> int:
        """Bytes that the kernel has not taken."""
        writer = self._writer
        return self._out_size + (0 if writer is None else writer.transport.get_write_buffer_size())

    async def taken(self) -> None:
        """Wait until the kernel has taken most of it. Raises `OSError` when the connection ended."""
        self._flush()
        writer = self._writer
        if writer is None:
            raise ConnectionResetError("there is no connection")
        await writer.drain()
        await asyncio.sleep(0)

    async def ping(self) -> None:
        """Wait until the server has taken all that was sent before. Raises `OSError` when the connection ends. May be cancelled."""
        future = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        self.write(PING)
        await future

    # -- the end

    def abort(self) -> None:
        """Cut the connection. The library can only end one in good order, which waits for a server that does not read."""
        asked, self._asked = self._asked, deque()
        for future in asked:
            if not future.done():
                future.set_exception(ConnectionResetError("the connection ended"))
                future.exception()  # whoever asked may be gone
        writer = self._writer
        if writer is not None:
            writer.transport.abort()

    async def discard(self, *, politely: bool) -> None:
        """Close, in good order if that is quick and `politely`, and see that nothing is left."""
        self._flush()
        async with Scope("nats goodbye") as scope:
            closing = scope.spawn(self._close_quietly(), name="close a NATS client")
            if politely:
                await asyncio.wait([closing], timeout=_GOODBYE)
            self.abort()
            await asyncio.wait([closing], timeout=_SOON)
        tasks = (getattr(self, name, None) for name in ("_reading_task", "_ping_interval_task", "_flusher_task"))
        left: set[asyncio.Task[object]] = {task for task in tasks if task is not None and not task.done()}
        for task in left:  # the library forgets them when its last write fails
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_GOODBYE)

    async def _close_quietly(self) -> None:
        try:
            await self.close()
        except Exception as error:  # whatever it is, the connection is not used again
            logger.debug("closing a NATS client: %r", error)


def _revealed(secret: Secret | None) -> str | None:
    return None if secret is None else secret.reveal()
