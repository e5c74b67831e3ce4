"""`stator frontend`: the HTTP API over whatever models discovery knows."""

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry

from stator import settings
from stator.cli.supervision import ended_with_supervisor, progress_line
from stator.frontend import FrontendConfig, FrontendMetrics, FrontendServer, create_app
from stator.llm.directory import ModelDirectory
from stator.runtime import Runtime
from stator.tasks import Scope, SystemClock

__all__ = ["frontend_config", "run_frontend"]


def frontend_config(*, host: str | None, port: int | None, insecure_bind: bool) -> FrontendConfig:
    """The settings with what the command line said."""
    given: dict[str, Any] = {"host": host, "port": port, "insecure_bind": insecure_bind or None}
    return settings.load(FrontendConfig, {key: value for key, value in given.items() if value is not None})


async def run_frontend(*, host: str | None, port: int | None, policy: str | None, insecure_bind: bool, supervised: bool) -> int:
    """Serve until a signal, or until the supervisor is gone. Returns the exit status."""
    config = await asyncio.to_thread(frontend_config, host=host, port=port, insecure_bind=insecure_bind)
    clock = SystemClock()
    async with Runtime.connect() as runtime, Scope("frontend process") as scope:
        if supervised:
            scope.spawn(ended_with_supervisor(runtime.shutdown), name="supervisor")
        async with ModelDirectory.follow(runtime, clock=clock, policy=policy) as directory:
            app = create_app(directory, config=config, metrics=FrontendMetrics(CollectorRegistry()), clock=clock)
            async with FrontendServer(app, config=config) as server:
                progress_line(f"listening on {server.url}")
                await runtime.wait_for_shutdown()
    return 0
