"""What publishers have said and NATS has not taken: a queue with a bound, in which no broken connection can block anybody."""

import asyncio
import logging
from collections import deque
from typing import Protocol

from stator.tasks import Scope
from stator.transports.nats.config import NatsConfig
from stator.transports.nats.connection import NatsConnection

__all__ = ["NatsOutbox", "Sender"]

logger = logging.getLogger(__name__)

_GOODBYE = 1.0
"""seconds that closing waits for what is queued"""
_YIELD_EVERY = 64
"""messages sent before others on the loop get a turn"""


class Sender(Protocol):
    """Who has messages in the queue."""

    queued: int

    def lost(self) -> None:
        """One of its messages was dropped."""
        ...


class NatsOutbox:
    """Shared by all publishers of a plane. Messages leave in order; they wait only while NATS is away, or reads too slowly."""

    def __init__(self, config: NatsConfig, connection: NatsConnection) -> None:
        self._config = config
        self._connection = connection
        self._queue: deque[tuple[Sender, str, bytes]] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._scope = Scope("nats outbox")
        self._scope.spawn(self._pump(), name="nats events")

    def send(self, sender: Sender, subject: str, body: bytes) -> None:
        """Send a message, or queue it; the oldest ones are dropped when there is no room."""
        connection = self._connection
        if not self._queue and connection.connected and not connection.full:
            self._publish(sender, subject, body)
            return
        config, queue = self._config, self._queue
        while queue and (len(queue) >= config.send_queue or self._bytes + len(body) > config.send_queue_bytes):
            self._take()[0].lost()
        queue.append((sender, subject, body))
        self._bytes += len(body)
        sender.queued += 1
        self._filled.set()

    def _take(self) -> tuple[Sender, str, bytes]:
        oldest = self._queue.popleft()
        self._bytes -= len(oldest[2])
        oldest[0].queued -= 1
        return oldest

    def _publish(self, sender: Sender, subject: str, body: bytes) -> None:
        most = self._connection.max_payload
        if len(body) > most:
            sender.lost()
            text = "an event of %d bytes on %s was dropped: the NATS server takes %d (max_payload)"
            logger.warning(text, len(body), subject, most)
        elif not self._connection.publish(subject, body):
            sender.lost()

    async def _pump(self) -> None:
        """Send what had to wait."""
        sent = 0
        while True:
            if not self._queue:
                self._filled.clear()
                self._emptied.set()
                await self._filled.wait()
            await self._connection.writable()
            while self._queue and self._connection.connected and not self._connection.full:
                self._publish(*self._take())
                sent += 1
                if sent % _YIELD_EVERY == 0:
                    await asyncio.sleep(0)

    async def aclose(self) -> None:
        """Send what is queued if that is quick."""
        if self._connection.connected and self._queue:
            self._emptied.clear()
            try:
                async with asyncio.timeout(_GOODBYE):
                    await self._emptied.wait()
            except TimeoutError:
                logger.debug("%d events were not sent any more", len(self._queue))
        await self._scope.aclose()
