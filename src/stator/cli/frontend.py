"""`stator frontend`: the HTTP API over whatever models discovery knows."""

import asyncio
import logging
from typing import Any

from stator import settings
from stator.cli.joining import Joining
from stator.cli.supervision import NewsKind, ended_with_supervisor, tell
from stator.frontend import FrontendConfig, FrontendMetrics, FrontendServer, bind, create_app
from stator.llm.directory import ModelDirectory
from stator.runtime import Runtime
from stator.tasks import Scope, SystemClock
from stator.telemetry import MetricSet

__all__ = ["frontend_config", "run_frontend"]

logger = logging.getLogger(__name__)


def frontend_config(*, host: str | None, port: int | None, insecure_bind: bool) -> FrontendConfig:
    """The settings with what the command line said."""
    given: dict[str, Any] = {"host": host, "port": port, "insecure_bind": insecure_bind or None}
    return settings.load(FrontendConfig, {key: value for key, value in given.items() if value is not None})


async def run_frontend(
    *, host: str | None, port: int | None, policy: str | None, insecure_bind: bool, joining: Joining, supervised: bool
) -> int:
    """Serve until a signal, or until the supervisor is gone. Returns the exit status.

    Supervised ones share their port with each other.
    """
    config = await asyncio.to_thread(frontend_config, host=host, port=port, insecure_bind=insecure_bind)
    clock = SystemClock()
    async with Runtime.connect(health__port=-1, **joining.settings) as runtime, Scope("frontend process") as scope:
        if supervised:
            scope.spawn(ended_with_supervisor(runtime.shutdown), name="supervisor")
        async with ModelDirectory.follow(runtime, clock=clock, policy=policy) as directory:
            page = MetricSet()
            page.on_exposition(lambda: runtime.metrics.exposition().decode())  # below its own part, as the reference has it
            metrics = FrontendMetrics(page, clock, prefix=config.metrics_prefix)
            app = create_app(directory, config=config, metrics=metrics, clock=clock, load=directory.monitor)
            async with FrontendServer(app, config=config, sock=bind(config, shared=supervised)) as server:
                if supervised:
                    tell(NewsKind.READY, server.url)
                else:
                    logger.info("listening on %s", server.url)
                await runtime.wait_for_shutdown()
    return 0
