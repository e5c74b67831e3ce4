"""`stator worker`: an engine, a runtime, and the life cycle that joins them."""

import asyncio
from collections.abc import Mapping

from stator import settings
from stator.cli.supervision import ended_with_supervisor, progress_line
from stator.engines.registry import create_engine
from stator.errors import UsageError
from stator.runtime import Runtime
from stator.tasks import Scope
from stator.worker import Worker, WorkerConfig

__all__ = ["engine_name", "run_worker"]


def engine_name(engine: str, model: str) -> str:
    """The engine to use when none was named."""
    return engine or ("transformers" if model else "echo")


def engine_options(model: str, options: tuple[str, ...]) -> dict[str, str]:
    """`NAME=VALUE` pairs as a mapping; `UsageError` for anything else."""
    found = {"model": model} if model else {}
    for pair in options:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise UsageError(f"--option {pair!r}: expected NAME=VALUE")
        found[name.replace("-", "_")] = value
    return found


async def run_worker(
    *, model: str, engine: str, options: tuple[str, ...], place: Mapping[str, str | None], supervised: bool
) -> int:
    """Live until a signal, or until the supervisor is gone. Returns the exit status."""
    config = settings.load(WorkerConfig, {key: value for key, value in place.items() if value is not None})
    chosen = await asyncio.to_thread(create_engine, engine_name(engine, model), engine_options(model, options))
    async with Runtime.connect() as runtime, Scope("worker process") as scope:
        worker = Worker(chosen, runtime, config=config, progress=progress_line if supervised else None)

        async def end_on_shutdown() -> None:
            await runtime.wait_for_shutdown()
            worker.shutdown()

        scope.spawn(end_on_shutdown(), name="shutdown")
        if supervised:
            scope.spawn(ended_with_supervisor(runtime.shutdown), name="supervisor")
        return await worker.run()
