"""The frontend's certificate, which may be renewed while it serves."""

import asyncio
import ssl
from typing import NoReturn

from stator.clock import Clock
from stator.frontend.config import FrontendConfig
from stator.security import Tls, TlsConfig

__all__ = ["Certificate"]


class Certificate:
    """That of the settings. `context` is good for a listener: each handshake is made with what was read last."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self.context = tls.server_context()
        # Asked in each handshake, whether the client names a server or not.
        self.context.sni_callback = self._choose

    @classmethod
    async def open(cls, config: FrontendConfig, clock: Clock) -> "Certificate":
        """Read the files, which must be set. Raises `ConfigError`."""
        files = TlsConfig(cert_path=config.tls_cert_path, key_path=config.tls_key_path)
        return cls(await asyncio.to_thread(Tls, files, clock=clock))

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._tls.server_context()

    async def follow(self) -> NoReturn:
        """Read the files when they changed, within about a second, until cancelled. While they do not fit, the old ones are used."""
        await self._tls.follow()
