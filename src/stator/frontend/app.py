"""The web application: routes over a `ModelSource`."""

import asyncio
from collections.abc import Callable
from random import Random

from aiohttp import web

from stator.clock import Clock
from stator.frontend import service
from stator.frontend.body import too_large
from stator.frontend.boundary import boundary, failure_response
from stator.frontend.busy_threshold import BusyThreshold, LoadControl
from stator.frontend.config import FrontendConfig
from stator.frontend.doors import enter
from stator.frontend.errors import Rejected
from stator.frontend.generation import CHAT, COMPLETIONS, Generation
from stator.frontend.metrics import FrontendMetrics
from stator.frontend.state import STATE, FrontendState, random_ids
from stator.llm.served import ModelSource

__all__ = ["create_app"]


def create_app(
    source: ModelSource,
    *,
    config: FrontendConfig,
    metrics: FrontendMetrics,
    clock: Clock,
    new_id: Callable[[], str] | None = None,
    load: LoadControl | None = None,
) -> web.Application:
    """An aiohttp application that answers OpenAI's API with the models of `source`; routes may be added until it runs.

    `new_id` makes request ids (UUIDs; default: random ones). `load` is what `/busy_threshold` reads and changes; without it, or with
    `admin_api` off, there is no such route. Serve it with `FrontendServer`, which adds the deadlines and
    limits that belong to connections.
    """
    app = web.Application(middlewares=[boundary], client_max_size=config.body_limit)
    state = app[STATE] = FrontendState(
        source, config=config, metrics=metrics, clock=clock, new_id=new_id or random_ids(Random())
    )
    router = app.router
    router.add_post("/v1/chat/completions", Generation(state, CHAT).handle, expect_handler=_expect)
    router.add_post("/v1/completions", Generation(state, COMPLETIONS).handle, expect_handler=_expect)
    router.add_get("/v1/models", service.models)
    router.add_get("/v1/models/{id:.+}", service.model)
    router.add_get("/health", service.health)
    router.add_get("/live", service.live)
    router.add_get("/metrics", service.metrics)

    if load is not None and config.admin_api != "off":
        thresholds = BusyThreshold(load, loopback_only=config.admin_api == "loopback")
        router.add_get("/busy_threshold", thresholds.get)
        router.add_post("/busy_threshold", thresholds.post)

    metrics.follow(source.models)

    async def begin(_: web.Application) -> None:
        await state.open()
        metrics.loop_delay.start(asyncio.get_running_loop())

    async def close(_: web.Application) -> None:
        metrics.loop_delay.stop()
        await state.aclose()

    app.on_startup.append(begin)
    app.on_cleanup.append(close)
    return app


async def _expect(request: web.Request) -> web.StreamResponse | None:
    """`Expect: 100-continue`: refuse a body that is too large, or nobody's, before it is sent. Runs before the middleware."""
    state = request.app[STATE]
    if request.headers.get("Expect", "").lower() == "100-continue" and not state.draining:
        if state.keys is not None:
            try:
                enter(request, state.keys)
            except Rejected as error:
                return failure_response(error.failure, state)
        if (request.content_length or 0) > state.config.body_limit:
            return failure_response(too_large(state.config).failure, state)
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    return None
