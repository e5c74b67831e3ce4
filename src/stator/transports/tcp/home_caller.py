"""How a worker calls home: over TLS where it is set."""

import asyncio
import logging

import msgspec

from stator.security import ALERT, Refusals, Tls, connecting

__all__ = ["HomeCaller"]

logger = logging.getLogger(__name__)


class HomeCaller(msgspec.Struct, frozen=True, kw_only=True):
    """What all calls of a worker have in common."""

    tls: Tls | None
    refusals: Refusals

    async def call(self, protocol: asyncio.Protocol, host: str, port: int) -> None:
        """Connect `protocol` to a client. Raises `OSError`; the caller sets the deadline."""
        await connecting(protocol, host, port, tls=self.tls, refusals=self.refusals)

    def alerted(self, data: bytes, host: str, port: int) -> bool:
        """Whether `data` is what a client says that wants TLS and got none; counts and logs it."""
        if data[:2] != ALERT[:2] or len(data) != len(ALERT):
            return False
        self.refusals.count("dialling", "encrypted")
        logger.warning("the client at %s:%d wants to be called over TLS, which is not set here (tls.ca_cert_path)", host, port)
        return True
