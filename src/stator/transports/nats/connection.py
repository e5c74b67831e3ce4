"""A connection to NATS that is made again whenever it ends; requests and events share this class, each has its own."""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable
from random import Random

import msgspec

from stator.errors import ConfigError
from stator.tasks import Backoff, Scope
from stator.transports.nats.config import NatsConfig
from stator.transports.nats.library import NatsSocket
from stator.transports.nats.login import read_login
from stator.transports.nats.wire import Message, encode_publish, encode_subscribe, encode_unsubscribe

__all__ = ["Listening", "NatsConnection"]

logger = logging.getLogger(__name__)

_FULL = 2**20
"""bytes that the kernel has not taken, at which senders wait"""
_BRIM = 64 * 2**20
"""the same, at which nothing more is taken, not even an answer: the server sends, and does not read"""
_STALLED = 0.25
"""seconds of lateness by which a timeout tells more about our own loop than about the server"""
_GOODBYE = 3.0
"""seconds in which a connection is closed in good order"""


class Listening(msgspec.Struct, eq=False, kw_only=True):
    """One subscription, of the connection in use and of all that follow it."""

    subject: str
    queue: str
    number: int
    deliver: Callable[[Message], object]


class NatsConnection:
    """`start` once, `aclose` once. Methods without `await` never block; messages are delivered on the loop, one after the other."""

    def __init__(
        self,
        config: NatsConfig,
        *,
        random: Random,
        name: str,
        meanwhile: str,
        changed: Callable[[bool], object] | None = None,
    ) -> None:
        """`name` is what the server lists; `meanwhile` tells people what happens while it is away; `changed` hears of both ends."""
        self._config = config
        self._random = random
        self._name = name
        self._meanwhile = meanwhile
        self._changed = changed
        self._backoff = Backoff(first=config.reconnect_first, most=config.reconnect_most)
        self._scope = Scope("nats connection")
        self._keeper: asyncio.Task[None] | None = None
        self._numbers = itertools.count(1)
        self._listening: dict[int, Listening] = {}
        self._socket: NatsSocket | None = None
        self._up = asyncio.Event()
        self._stir = asyncio.Event()
        self._tried = asyncio.Event()
        self._away = False
        self._closing = False
        self._since = asyncio.get_running_loop().time()
        self.reason = ""
        """why there is no connection"""

    async def start(self) -> None:
        """Begin to connect; returns when each server was tried, or one answered. Raises `ConfigError` for a login that cannot be used."""
        await asyncio.to_thread(read_login, self._config, self._config.urls[0])
        self._keeper = self._scope.spawn(self._keep(), name=self._name)
        self._keeper.add_done_callback(lambda _: self._tried.set())
        await self._tried.wait()

    # -- what passes

    @property
    def connected(self) -> bool:
        """Whether a message can be sent now."""
        return self._up.is_set()

    @property
    def away_for(self) -> float:
        """Seconds since there was a connection; 0.0 while there is one."""
        return 0.0 if self.connected else asyncio.get_running_loop().time() - self._since

    @property
    def full(self) -> bool:
        """Whether senders should wait (`writable`)."""
        return self._socket is not None and self._socket.backlog >= _FULL

    @property
    def max_payload(self) -> int:
        """Bytes of headers and body together that the server takes in one message."""
        return 0 if self._socket is None else self._socket.max_payload

    def publish(self, subject: str, body: bytes, *, reply: str = "", headers: bytes = b"") -> bool:
        """Send one message. False: it was not, for there is no connection, or one that is full to the brim.

        `subject` is one, the size is the caller's care, and who sends much waits for `writable`.
        """
        socket = self._socket
        if socket is None or not self._up.is_set() or socket.backlog >= _BRIM:
            return False
        socket.write(encode_publish(subject, body, reply=reply, headers=headers))
        return True

    async def writable(self) -> None:
        """Wait until there is a connection that is not full. The caller sets the deadline."""
        while True:
            socket = self._socket
            if socket is None or not self._up.is_set():
                await self._up.wait()
            elif socket.backlog < _FULL:
                return
            else:
                try:
                    await socket.taken()
                except OSError as error:
                    self._lost(socket, f"it does not take messages: {error}")

    def listen(self, subject: str, deliver: Callable[[Message], object], *, queue: str = "") -> Listening:
        """Give `deliver` the messages of `subject`; of a `queue` group's messages each goes to one of its members."""
        listening = Listening(subject=subject, queue=queue, number=next(self._numbers), deliver=deliver)
        self._listening[listening.number] = listening
        if self._socket is not None:
            self._socket.write(encode_subscribe(subject, queue, listening.number))
        return listening

    def leave(self, listening: Listening, *, linger: float = 0.0) -> None:
        """Stop listening. What was on its way is still delivered for `linger` seconds. Idempotent."""
        if listening.number not in self._listening:
            return
        if self._socket is not None:
            self._socket.write(encode_unsubscribe(listening.number))
        if linger and self._socket is not None:
            asyncio.get_running_loop().call_later(linger, self._listening.pop, listening.number, None)
        else:
            del self._listening[listening.number]

    async def settled(self) -> None:
        """Wait until the server knows what is listened to; at once while there is none, as the next connection begins with that."""
        socket = self._socket
        if socket is not None and not await self._answers(socket):
            self._lost(socket, "it does not answer")

    @property
    def subjects(self) -> list[str]:
        """What is listened to."""
        return sorted(listening.subject for listening in self._listening.values())

    def doubt(self) -> None:
        """Somebody waits in vain: ask the server now whether it is there."""
        self._stir.set()

    def _arrived(self, number: int, message: Message) -> None:
        listening = self._listening.get(number)
        if listening is not None:
            listening.deliver(message)

    # -- the connection

    async def _keep(self) -> None:
        """One connection after the other, until closed."""
        urls = deque(self._config.urls)
        self._random.shuffle(urls)
        attempt = 0
        while not self._closing:
            used = False
            for url in tuple(urls):
                urls.rotate(-1)  # whoever failed, or ended the connection, is tried last
                used = await self._use(url)
                if used or self._closing:
                    break
            self._tried.set()
            attempt = 0 if used else attempt + 1
            if not self._closing:
                self._miss()
                await asyncio.sleep(self._backoff.delay(max(attempt - 1, 0), self._random))

    async def _use(self, url: str) -> bool:
        """Connect, and stay until the connection ends. False if none was made."""
        try:
            login = await asyncio.to_thread(read_login, self._config, url)
        except ConfigError as error:  # a file that was fine before
            self.reason = error.message
            return False
        used = False
        socket = NatsSocket(login, arrived=self._arrived, ended=lambda reason: self._lost(socket, reason))
        try:
            used = await self._connect(socket, url)
            if used:
                await self._stay(socket)
            return used
        finally:
            self._lost(socket, "", closing=True)
            await socket.discard(politely=used)

    async def _connect(self, socket: NatsSocket, url: str) -> bool:
        timeout = self._config.connect_timeout
        try:
            async with asyncio.timeout(timeout):
                await socket.open(url, self._config, name=self._name)
                self._socket = socket  # who listens from now on subscribes by itself
                for listening in self._listening.values():
                    socket.write(encode_subscribe(listening.subject, listening.queue, listening.number))
                await socket.ping()
        except Exception as error:  # whatever is at that address may have answered anything
            self._socket = None
            self.reason = socket.reason or str(error) or f"no answer within {timeout} s"
            return False
        if self._socket is not socket:
            return False
        self._up.set()
        self._tried.set()
        if self._away:
            self._away = False
            logger.info("connected to NATS again")
        if self._changed is not None:
            self._changed(True)
        return True

    async def _stay(self, socket: NatsSocket) -> None:
        """Ask now and then, and when somebody doubts, whether the server is there; return when it is not, or we go."""
        while socket is self._socket and not self._closing:
            self._stir.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.ping_interval):
                    await self._stir.wait()
            if socket is self._socket and not self._closing and not await self._answers(socket):
                self._lost(socket, f"no answer within {self._config.ping_timeout} s")

    async def _answers(self, socket: NatsSocket) -> bool:
        loop, limit = asyncio.get_running_loop(), self._config.ping_timeout
        while True:
            asked = loop.time()
            try:
                async with asyncio.timeout(limit):
                    await socket.ping()
            except TimeoutError:
                if loop.time() - asked < limit + _STALLED:
                    return False
            except OSError:
                return False
            else:
                return True

    def _lost(self, socket: NatsSocket, reason: str, *, closing: bool = False) -> None:
        """The connection is of no use any more: senders know at once, the keeper makes another one."""
        if socket is not self._socket:
            return
        was_up = self._up.is_set()
        self._socket = None
        self._up.clear()
        self._stir.set()
        self._since = asyncio.get_running_loop().time()
        self.reason = reason or self.reason
        if not closing:
            socket.abort()
        if was_up and self._changed is not None:
            self._changed(False)

    def _miss(self) -> None:
        """Say once that nobody is there."""
        if not self._away:
            self._away = True
            logger.warning("NATS is away (%s): %s; %s", self._config.shown, self.reason, self._meanwhile)

    def cut(self) -> None:
        """Break the connection without a goodbye, as a lost network would."""
        if self._socket is not None:
            self._lost(self._socket, "the network was cut")

    async def aclose(self) -> None:
        """End the connection in good order if that is quick; what was sent leaves before. Idempotent."""
        self._closing = True
        self._stir.set()
        if self._keeper is not None and self._socket is not None:
            await asyncio.wait([self._keeper], timeout=_GOODBYE)
        await self._scope.aclose()
        self._listening.clear()
