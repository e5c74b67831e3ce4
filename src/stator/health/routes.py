"""What the status server answers, without the listening (`spec/25 §5`)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import msgspec
from aiohttp import web

from stator.health.config import ENGINE_PREFIX, HealthConfig
from stator.health.engine_routes import Answer, EngineRoutes, call, failure_text
from stator.health.status import SystemHealth
from stator.tasks import Scope

__all__ = ["Operation", "StatusRoutes"]

logger = logging.getLogger(__name__)

Operation = Callable[[], Awaitable[Any]]
"""A drain or a resume: begins it and returns, as JSON can say it, what was begun. Cancelled when its client leaves."""

_CLEAN_UP = 0.5
"""seconds a cancelled callback may take when the server closes"""
_PLAIN = "text/plain; charset=utf-8"
_GET = ("GET", "HEAD")
_SAME_SITE = ("none", "same-origin")


class StatusRoutes:
    """From a request to its answer. Reads the clock never, waits for bodies and callbacks only, both bounded."""

    def __init__(
        self,
        config: HealthConfig,
        health: SystemHealth,
        *,
        metrics: Callable[[], bytes],
        metadata: Callable[[], Any],
        engine: EngineRoutes,
        drain: Operation | None,
        resume: Operation | None,
    ) -> None:
        self._config = config
        self._health = health
        self._metrics_page = metrics
        self._metadata_value = metadata
        self._engine = engine
        self._pages: dict[str, Callable[[], web.Response]] = {
            config.health_path: self._health_page,
            config.live_path: self._health_page,
            "/metrics": self._metrics,
            "/metadata": self._metadata,
        }
        operations = {"/drain": drain, "/resume": resume}
        # aiohttp cancels a handler as often as it likes; callbacks are tasks of ours, cancelled once, so that their clean-up runs.
        self._callbacks = Scope("status server callbacks", close_timeout=_CLEAN_UP)
        self._operations = {path: operation for path, operation in operations.items() if operation is not None}

    async def answer(self, request: web.BaseRequest, body: bytes) -> web.Response:
        """The answer to `request`, whose whole body is `body`. Raises nothing but cancellation."""
        path, method = request.path, request.method
        page = self._pages.get(path)
        if page is not None:
            return page() if method in _GET else _not_allowed("GET,HEAD")
        operation = self._operations.get(path)
        name = path.removeprefix(ENGINE_PREFIX) if path.startswith(ENGINE_PREFIX) else ""
        if operation is None and not name:
            return _text(404, b"Route not found")
        if operation is not None and method != "POST":
            return _not_allowed("POST")
        if _from_a_web_page(request):
            return _text(403, b"Requests from web pages are refused")
        if self._callbacks.closed or len(self._callbacks) >= self._config.max_connections:
            return _text(503, failure_text("too many callbacks are running, or the process shuts down"))
        return await self._within_limit(path, self._engine.handle(name, body) if operation is None else call(path, operation))

    async def _within_limit(self, path: str, work: Coroutine[Any, Any, Answer]) -> web.Response:
        """Cancelled: the callback is cancelled, once, and cleans up on its own."""
        limit = self._config.callback_timeout
        task = self._callbacks.spawn(work, name=path)
        try:
            await asyncio.wait({task}, timeout=limit)
            if not task.done():
                logger.warning("%s took longer than %s s and is cancelled", path, limit)
                return _text(500, failure_text(f"took longer than {limit:g} s and is cancelled"))
            if task.cancelled():
                return _text(500, failure_text("the callback was cancelled"))
            return _text(*task.result())
        finally:
            task.cancel()

    async def aclose(self, patience: float) -> None:
        """Take no more requests for callbacks; running ones end within `patience` seconds or are cancelled and waited for."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._callbacks.join()
        await self._callbacks.aclose()

    def _health_page(self) -> web.Response:
        return _text(200 if self._health.ready else 503, self._health.body())

    def _metrics(self) -> web.Response:
        try:
            return _text(200, self._metrics_page())
        except Exception:
            logger.exception("the metrics page failed")
            return _text(500, b"Failed to get metrics")

    def _metadata(self) -> web.Response:
        try:
            value = self._metadata_value()
            if value is not None:
                return _text(200, msgspec.json.encode(value), "application/json")
        except Exception:
            logger.exception("the discovery metadata cannot be told")
        return _text(404, b"Discovery metadata not available")


def _from_a_web_page(request: web.BaseRequest) -> bool:
    """Browsers let any page send requests to loopback; programs never send these headers."""
    return "Origin" in request.headers or request.headers.get("Sec-Fetch-Site", "none") not in _SAME_SITE


def _text(status: int, body: bytes, content_type: str = _PLAIN) -> web.Response:
    return web.Response(status=status, body=body, headers={"Content-Type": content_type})


def _not_allowed(methods: str) -> web.Response:
    return web.Response(status=405, headers={"Allow": methods})
