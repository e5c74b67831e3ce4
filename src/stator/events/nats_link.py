"""One connection to NATS that is made again whenever it ends. The only module that imports `nats`.

The library's own reconnecting is off: it neither backs off nor gives up a server that has stopped to read. Here a task keeps one
client after the other; what is to be sent waits in a queue that no broken client can block. The library also swallows the
cancellation of who waits in it, so nothing here relies on a cancellation alone: whoever comes back from it looks whether the
connection has ended.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, Protocol, cast

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError

from stator.events.nats_config import NatsConfig, shown_url
from stator.tasks import Backoff, Scope

__all__ = ["NatsLink", "Sender"]

logger = logging.getLogger(__name__)

_GOODBYE = 1.0
"""seconds that closing waits for what is queued, and again for the library"""
_YIELD_EVERY = 64
"""messages sent before others on the loop get a turn"""


class Sender(Protocol):
    """Who has messages in the queue."""

    queued: int

    def lost(self) -> None:
        """One of its messages was dropped."""
        ...


class _Reader(msgspec.Struct, eq=False, kw_only=True):
    subject: str
    deliver: Callable[[bytes], object]
    handle: Any = None
    """the library's subscription, of the client in use"""


class NatsLink:
    """Shared by all publishers and subscriptions of a plane. `start` once, `aclose` once."""

    def __init__(self, config: NatsConfig, *, random: Random, scope: Scope) -> None:
        self._config = config
        self._random = random
        self._scope = scope
        self._backoff = Backoff(first=config.reconnect_first, most=config.reconnect_most)
        self._queue: deque[tuple[Sender, str, bytes]] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._readers: set[_Reader] = set()
        self._client: Client | None = None
        self._tried = asyncio.Event()
        self._ended = asyncio.Event()
        self._reason = ""
        self._away = False
        self._closing = False

    async def start(self) -> None:
        """Begin to connect; returns after the first try, whatever came of it."""
        self._scope.spawn(self._keep(), name="nats connection")
        await self._tried.wait()

    # -- what passes

    def send(self, sender: Sender, subject: str, body: bytes) -> None:
        """Queue a message; the oldest ones are dropped when there is no room."""
        config, queue = self._config, self._queue
        while queue and (len(queue) >= config.send_queue or self._bytes + len(body) > config.send_queue_bytes):
            oldest, _, dropped = queue.popleft()
            self._bytes -= len(dropped)
            oldest.queued -= 1
            oldest.lost()
        queue.append((sender, subject, body))
        self._bytes += len(body)
        sender.queued += 1
        if len(queue) == 1:
            self._filled.set()

    async def listen(self, subject: str, deliver: Callable[[bytes], object]) -> _Reader:
        """Give `deliver` every message of `subject` from now on, on this connection and those that follow it."""
        reader = _Reader(subject=subject, deliver=deliver)
        self._readers.add(reader)
        client = self._client
        if client is not None:
            try:
                await self._subscribe(client, reader)
                await _settle(client, self._config.ping_interval)
            except (NatsError, OSError, TimeoutError) as error:  # the next connection makes up for it
                self._end(client, f"it did not take a subscription: {error!r}")
            except BaseException:
                await self.leave(reader)
                raise
        return reader

    @property
    def subjects(self) -> list[str]:
        """What is listened to."""
        return sorted(reader.subject for reader in self._readers)

    async def leave(self, reader: _Reader) -> None:
        """Give it nothing more."""
        self._readers.discard(reader)
        handle, reader.handle = reader.handle, None
        if handle is not None and self._client is not None:
            try:
                async with asyncio.timeout(_GOODBYE):
                    await handle.unsubscribe()
            except (NatsError, OSError, TimeoutError) as error:
                logger.debug("unsubscribing from %s: %s", reader.subject, error)

    # -- the connection

    async def _keep(self) -> None:
        attempt = 0
        while not self._closing:
            self._reason = ""
            client, ended = Client(), asyncio.Event()
            self._ended = ended
            try:
                if await self._connect(client, ended):
                    attempt = 0
                    await self._use(client, ended)
                if not self._closing:
                    self._miss()
            finally:
                self._client = None
                await _discard(client)
            await asyncio.sleep(self._backoff.delay(attempt, self._random))
            attempt += 1

    async def _connect(self, client: Client, ended: asyncio.Event) -> bool:
        async def closed() -> None:
            ended.set()

        urls, timeout = self._config.urls, self._config.connect_timeout
        try:
            async with asyncio.timeout(timeout * 2 * len(urls)):
                await client.connect(
                    servers=urls,
                    name="stator",
                    allow_reconnect=False,
                    max_reconnect_attempts=1,  # two tries each, then an error
                    reconnect_time_wait=0,
                    connect_timeout=_seconds(timeout),
                    ping_interval=86_400,  # `_watch` asks, and acts when there is no answer
                    error_cb=self._failed,
                    closed_cb=closed,
                )
            self._client = client  # who comes from now on subscribes by itself
            for reader in tuple(self._readers):
                await self._subscribe(client, reader)
            await _settle(client, timeout)
        except Exception as error:  # whatever is at that address may have answered anything
            self._reason = self._reason or str(error) or type(error).__name__
            return False
        finally:
            self._tried.set()
        if self._away:
            self._away = False
            logger.info("connected to NATS again")
        return True

    async def _subscribe(self, client: Client, reader: _Reader) -> None:
        async def arrived(message: Msg) -> None:
            reader.deliver(message.data)

        handle = await cast("Any", client).subscribe(reader.subject, cb=arrived)  # its type is partly unknown
        if reader in self._readers:
            reader.handle = handle
        else:
            await handle.unsubscribe()

    async def _use(self, client: Client, ended: asyncio.Event) -> None:
        """Send what is queued until the connection ends."""
        async with Scope("nats client") as scope:
            scope.spawn(self._pump(client, ended), name="nats sender")
            scope.spawn(self._watch(client, ended), name="nats watch")
            try:
                if not self._closing:
                    await ended.wait()
            finally:
                ended.set()

    async def _pump(self, client: Client, ended: asyncio.Event) -> None:
        queue, sent = self._queue, 0
        while True:
            while queue and not ended.is_set():
                sent += 1
                if sent % _YIELD_EVERY == 0:
                    await asyncio.sleep(0)
                    continue
                sender, subject, body = queue.popleft()
                self._bytes -= len(body)
                sender.queued -= 1
                try:
                    await client.publish(subject, body)
                except MaxPayloadError:
                    sender.lost()
                    logger.warning(
                        "an event of %d bytes on %s was dropped: the NATS server takes %d (max_payload)",
                        len(body),
                        subject,
                        client.max_payload,
                    )
                except Exception as error:  # whatever the library came upon, another connection is made
                    sender.lost()
                    self._end(client, f"it does not take messages: {error!r}")
                    return
            if ended.is_set():
                return
            self._filled.clear()
            self._emptied.set()
            await self._filled.wait()

    async def _watch(self, client: Client, ended: asyncio.Event) -> None:
        """Ask now and then whether the server is there."""
        while not ended.is_set():
            await asyncio.sleep(self._config.ping_interval)
            try:
                async with asyncio.timeout(self._config.ping_interval):
                    await client.flush(_seconds(self._config.ping_interval))
            except Exception as error:  # as above
                self._end(client, f"it does not answer: {error!r}")
                return

    def _end(self, client: Client, reason: str) -> None:
        """Give this connection up; the next one is made."""
        if client is self._client:
            self._reason = reason
            self._ended.set()
        _abort(client)

    async def _failed(self, error: Exception) -> None:
        self._reason = str(error) or type(error).__name__
        logger.debug("nats: %s", self._reason)

    def _miss(self) -> None:
        """Say once that nobody is there."""
        if not self._away:
            self._away = True
            servers = ", ".join(map(shown_url, self._config.urls))
            reason = self._reason or "it closed the connection"
            text = "NATS is away (%s): %s; events wait until it is back, and the oldest are dropped when too many do"
            logger.warning(text, servers, reason)

    async def aclose(self) -> None:
        """Send what is queued if that is quick, and end the connection. The scope waits for it."""
        if self._client is not None and self._queue:
            self._emptied.clear()
            try:
                async with asyncio.timeout(_GOODBYE):
                    await self._emptied.wait()
            except TimeoutError:
                logger.debug("%d events were not sent any more", len(self._queue))
        self._closing = True
        self._ended.set()


async def _discard(client: Client) -> None:
    """Close the client in good order if that is quick, and see that nothing of it is left."""
    async with Scope("nats goodbye") as scope:
        closing = scope.spawn(_close(client), name="close a NATS client")
        await asyncio.wait([closing], timeout=_GOODBYE)
        _abort(client)
        await asyncio.wait([closing], timeout=_GOODBYE)
    tasks = [getattr(client, name, None) for name in ("_reading_task", "_ping_interval_task", "_flusher_task")]
    subscriptions: dict[int, Any] = getattr(client, "_subs", {})
    tasks.extend(getattr(each, "_wait_for_msgs_task", None) for each in subscriptions.values())
    left = {task for task in tasks if task is not None and not task.done()}
    for task in left:  # the library forgets them when its last write fails
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_GOODBYE)


async def _close(client: Client) -> None:
    try:
        await client.close()
    except Exception as error:  # whatever it is, the client is not used again
        logger.debug("closing a NATS client: %r", error)


async def _settle(client: Client, timeout: float) -> None:
    """Wait until the server has taken what was sent. The library lets its question overtake what waits; a second one cannot."""
    for _ in range(2):
        await client.flush(_seconds(timeout))


def _seconds(seconds: float) -> Any:
    """The library says int and takes any number."""
    return seconds


def _abort(client: Client) -> None:
    """Cut the connection. The library can only end one in good order, which waits for a server that does not read."""
    writer = getattr(getattr(client, "_transport", None), "_io_writer", None)
    if writer is not None:
        writer.transport.abort()
