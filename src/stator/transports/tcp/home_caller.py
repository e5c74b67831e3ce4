"""How a worker calls home: over TLS where it is set."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from stator.security import ALERT, Refusals, Tls, connecting

__all__ = ["HomeCaller"]

logger = logging.getLogger(__name__)

_HANDSHAKES = 32
"""under way with one client: each takes a millisecond of both processes, and of hundreds begun together none would be done in time"""

_AT_ONCE = contextlib.nullcontext()


class HomeCaller:
    """What all calls of a worker have in common."""

    def __init__(self, *, tls: Tls | None, refusals: Refusals) -> None:
        self.tls = tls
        self._refusals = refusals
        self._turns: dict[tuple[str, int], tuple[asyncio.Semaphore, list[None]]] = {}
        """by client, for as long as somebody calls it: free turns, and an entry for each caller"""

    def turn(self, host: str, port: int) -> AbstractAsyncContextManager[None]:
        """Wait until it is the caller's turn to `call`, which without TLS is at once. Deadlines begin then."""
        return _AT_ONCE if self.tls is None else self._turn((host, port))

    @asynccontextmanager
    async def _turn(self, client: tuple[str, int]) -> AsyncGenerator[None, None]:
        turns = self._turns.get(client)
        if turns is None:
            turns = self._turns[client] = (asyncio.Semaphore(_HANDSHAKES), [])
        free, callers = turns
        callers.append(None)
        try:
            async with free:
                yield
        finally:
            callers.pop()
            if not callers:
                del self._turns[client]

    async def call(self, protocol: asyncio.Protocol, host: str, port: int) -> None:
        """Connect `protocol` to a client. Raises `OSError`; the caller sets the deadline."""
        await connecting(protocol, host, port, tls=self.tls, refusals=self._refusals)

    def alerted(self, data: bytes, host: str, port: int) -> bool:
        """Whether `data` is what a client says that wants TLS and got none; counts and logs it."""
        if data[:2] != ALERT[:2] or len(data) != len(ALERT):
            return False
        self._refusals.count("dialling", "encrypted")
        logger.warning("the client at %s:%d wants to be called over TLS, which is not set here (tls.ca_cert_path)", host, port)
        return True
