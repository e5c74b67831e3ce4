"""The status server's listening side: one short-lived connection per request, everything bounded."""

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from stator.errors import UsageError
from stator.health.config import HealthConfig
from stator.health.engine_routes import EngineRoutes
from stator.health.routes import Operation, StatusRoutes
from stator.health.status import SystemHealth

__all__ = ["StatusServer"]

logger = logging.getLogger(__name__)

_CLOSE_LIMIT = 0.5
"""seconds for running callbacks when the server closes, for the clean-up of cancelled ones, and for answers being written"""
_HEADER_LIMIT = 16 * 1024
_HEADER_COUNT = 128


class StatusServer:
    """Serves health, metrics and the operator's routes as HTTP. Use as `async with`, or `start` and `aclose`.

    `metrics` makes the Prometheus page; `metadata` returns what can be JSON, or None where discovery has none; without `drain` or
    `resume` those routes are not there. If the address cannot be had, that is logged and the process goes on without (`spec/25 §2`).
    """

    def __init__(
        self,
        config: HealthConfig,
        health: SystemHealth,
        *,
        metrics: Callable[[], bytes],
        metadata: Callable[[], Any] = lambda: None,
        engine: EngineRoutes | None = None,
        drain: Operation | None = None,
        resume: Operation | None = None,
    ) -> None:
        self._config = config
        self.engine = engine if engine is not None else EngineRoutes()
        """the callbacks under `/engine/`; may change while serving"""
        self._routes = StatusRoutes(
            config, health, metrics=metrics, metadata=metadata, engine=self.engine, drain=drain, resume=resume
        )
        self._http: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._address: tuple[str, int] | None = None
        self._closed = False

    @property
    def listening(self) -> bool:
        """Whether it answers: false if it is switched off, could not bind or was closed."""
        return self._listener is not None

    @property
    def port(self) -> int | None:
        """The real port, also when 0 was asked for; None when not listening."""
        return self._address[1] if self._address else None

    @property
    def url(self) -> str | None:
        """Where it is reached on this machine, without a trailing slash; None when not listening."""
        if self._address is None:
            return None
        host, port = self._address
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def start(self) -> None:
        """Listen from now on, unless the port is -1. Never fails because of the address. Cancelled: not listening.

        Raises `UsageError` after `aclose`.
        """
        if self._closed:
            raise UsageError("this status server was closed; make another one")
        config = self._config
        if config.port < 0 or self._listener is not None:
            return
        loop = asyncio.get_running_loop()
        manager = self._http = web.Server(self._handle, handler_cancellation=True)
        try:
            self._listener = await loop.create_server(
                lambda: _Connection(manager, loop=loop, config=config), config.host.strip("[]"), config.port, backlog=128
            )
        except (OSError, OverflowError) as error:
            self._http = None
            logger.error("the status server cannot listen on %s:%s: %s", config.host, config.port, error)
            logger.error("going on without status server: no health page, no metrics page")
            return
        self._address = self._listener.sockets[0].getsockname()[:2]
        logger.info("status server bound to %s", self.url)

    async def aclose(self) -> None:
        """Stop listening. Callbacks have half a second, then they are cancelled and have as long again. Idempotent, and final."""
        self._closed = True
        listener, self._listener = self._listener, None
        manager, self._http = self._http, None
        self._address = None
        if listener is not None:
            listener.close()
        await self._routes.aclose(_CLOSE_LIMIT)
        if manager is not None:
            await manager.shutdown(timeout=_CLOSE_LIMIT)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        connection = request.protocol
        assert isinstance(connection, _Connection)
        body = await self._receive(request)
        if isinstance(body, bytes):
            connection.allow(self._config.callback_timeout + self._config.http_timeout)
            response = await self._routes.answer(request, body)
        else:
            response = body
        connection.allow(self._config.http_timeout)
        response.force_close()
        return response

    async def _receive(self, request: web.BaseRequest) -> bytes | web.Response:
        """The whole body, or the refusal of one that is too large or malformed."""
        limit = self._config.body_limit
        if (request.content_length or 0) > limit:
            return _too_large(limit)
        body = bytearray()
        try:
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > limit:
                    return _too_large(limit)
        except web.RequestPayloadError:
            return web.Response(status=400, text="The request body cannot be decoded")
        return bytes(body)


def _too_large(limit: int) -> web.Response:
    return web.Response(status=413, text=f"The request body is larger than {limit} bytes")


class _Connection(web.RequestHandler):
    """aiohttp's connection with an end: whoever neither finishes a request nor reads the answer in time is disconnected."""

    __slots__ = ("_config", "_end", "_manager_of_all", "_wire")

    def __init__(self, manager: web.Server, *, loop: asyncio.AbstractEventLoop, config: HealthConfig) -> None:
        super().__init__(
            manager,
            loop=loop,
            access_log=None,  # pyright: ignore[reportArgumentType]  # None turns aiohttp's log off
            max_line_size=_HEADER_LIMIT,
            max_field_size=_HEADER_LIMIT,
            max_headers=_HEADER_COUNT,
            lingering_time=1.0,
        )
        self._config = config
        self._manager_of_all = manager
        self._end: asyncio.TimerHandle | None = None
        self._wire: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self._wire = self.transport
        if len(self._manager_of_all.connections) > self._config.max_connections:
            logger.warning("the status server has %d connections; another one is refused", self._config.max_connections)
            self._wire.abort()
        else:
            self.allow(self._config.http_timeout)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._wire = None
        if self._end is not None:
            self._end.cancel()
        super().connection_lost(exc)

    def allow(self, seconds: float) -> None:
        """End the connection after `seconds` from now, whatever it is doing, instead of at any time set before."""
        if self._end is not None:
            self._end.cancel()
        if self._wire is not None:
            self._end = self._loop.call_later(seconds, self._wire.abort)
