"""The listening side: one socket, connections with deadlines, and an orderly end."""

import asyncio
import logging
import socket
import ssl
from contextlib import suppress
from types import TracebackType
from typing import Self

from aiohttp import web

from stator.errors import ConfigError
from stator.frontend.certificate import Certificate
from stator.frontend.config import FrontendConfig
from stator.frontend.connection import Connections, HttpConnection
from stator.frontend.errors import DRAINING, Rejected
from stator.frontend.state import STATE

__all__ = ["FrontendServer", "bind"]

logger = logging.getLogger(__name__)

_BACKLOG = 1024


def bind(config: FrontendConfig, *, shared: bool = False) -> socket.socket:
    """A socket bound to the configured address, not yet listening; `ConfigError` when that is impossible, or somebody listens.

    `shared`: others who say so too may have the port as well (SO_REUSEPORT), and each gets a part of the connections: bind once
    with port 0 to find a free one, hold the socket, and give the real port to several frontend processes.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host.strip("[]"), config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on host {config.host!r}: {error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared and hasattr(socket, "SO_REUSEPORT"):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setblocking(False)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error}") from error
    return bound


class FrontendServer:
    """Serves an application of `create_app`. Use as `async with`; leaving drains.

    The given socket (default: `bind(config)`) belongs to the server from now on.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        config: FrontendConfig,
        sock: socket.socket | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._app = app
        self._config = config
        self._socket = sock if sock is not None else bind(config)
        self._ssl = ssl_context
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        self._listener: asyncio.Server | None = None
        self._address: tuple[str, int] = self._socket.getsockname()[:2]
        self._closed = False

    @property
    def port(self) -> int:
        """The real port, also when 0 was asked for."""
        return self._address[1]

    @property
    def url(self) -> str:
        """Where clients reach it, without a trailing slash."""
        host = self._address[0]
        return f"{'https' if self._ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{self.port}"

    async def start(self) -> None:
        """Accept connections from now on. When it fails or is cancelled, nothing is left behind."""
        try:
            await self._runner.setup()
            if self._ssl is None:
                self._ssl = await self._certificate()
            manager = self._runner.server
            assert manager is not None
            loop = asyncio.get_running_loop()
            connections = Connections(self._config.max_connections)
            self._listener = await loop.create_server(
                lambda: HttpConnection(manager, loop=loop, config=self._config, connections=connections),
                sock=self._socket,
                ssl=self._ssl,
                backlog=_BACKLOG,
                ssl_handshake_timeout=self._config.header_timeout if self._ssl else None,
            )
        except BaseException:
            await self.aclose()
            raise

    async def _certificate(self) -> ssl.SSLContext | None:
        """The context of the certificate in the settings, followed from now on; None without one."""
        if self._config.tls_cert_path is None:
            return None
        state = self._app[STATE]
        certificate = await Certificate.open(self._config, state.clock)
        state.scope.spawn(certificate.follow(), name="certificate")
        return certificate.context

    async def drain(self) -> None:
        """Refuse new requests with 503 and wait for the running ones, at most `graceful_shutdown` seconds. `/metrics` stays."""
        state = self._app[STATE]
        state.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.graceful_shutdown):
                await state.idle.wait()

    async def aclose(self) -> None:
        """Drain, end what still runs with an error, close. Idempotent; cancelled: the draining is cut short."""
        if self._closed:
            return
        self._closed = True
        state = self._app[STATE]
        try:
            if self._listener is not None:
                await self.drain()
                self._listener.close()
                self._listener = None
                if state.running:
                    logger.warning("%d requests did not end in time", len(state.running))
                    state.abort(Rejected(DRAINING))
        finally:
            self._socket.close()
            await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
