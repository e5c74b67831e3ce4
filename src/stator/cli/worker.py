"""`stator worker`: an engine, a runtime, and the life cycle that joins them."""

import asyncio
import logging
import os
import sys
from collections.abc import Mapping

from stator import settings
from stator.cli.joining import Joining
from stator.cli.supervision import NewsKind, ended_with_supervisor, tell
from stator.engines.registry import create_engine
from stator.errors import StatorError, UsageError
from stator.runtime import Runtime
from stator.tasks import Scope
from stator.worker import EXIT_DEADLINE, LLMEngine, Worker, WorkerConfig

__all__ = ["StartFailed", "engine_name", "run_worker", "worker_config"]

logger = logging.getLogger(__name__)

_START_LIMIT = 2.0
"""seconds a starting engine gets after a signal"""


class StartFailed(StatorError):
    """The engine could not start or has failed, or the endpoint could not be served; the message says why."""


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


def worker_config(place: Mapping[str, str | None]) -> WorkerConfig:
    """The settings with what the command line said."""
    return settings.load(WorkerConfig, {key: value for key, value in place.items() if value is not None})


async def run_worker(
    *,
    model: str,
    engine: str,
    options: tuple[str, ...],
    place: Mapping[str, str | None],
    joining: Joining,
    supervised: bool,
) -> int:
    """Live until a signal, or until the supervisor is gone. Returns the exit status; raises why it cannot start."""
    config = await asyncio.to_thread(worker_config, place)
    async with Runtime.connect(**joining.settings) as runtime, Scope("worker process") as scope:
        process = _Process(runtime, supervised=supervised)
        scope.spawn(process.end_on_shutdown(), name="shutdown")
        if supervised:
            scope.spawn(ended_with_supervisor(runtime.shutdown), name="supervisor")
        chosen = await asyncio.to_thread(_create, engine_name(engine, model), engine_options(model, options))
        return await process.run(Worker(chosen, runtime, config=config, progress=process.progress, failed=process.failed))


def _create(engine: str, options: Mapping[str, str]) -> LLMEngine:
    """Touches the disk. A `module:Class` or `module:function` may lie in the working directory; what is installed comes first."""
    if ":" in engine and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return create_engine(engine, options)


class _Process:
    """One worker's life as a process: its news, its exit status, and its end while the engine is still starting."""

    def __init__(self, runtime: Runtime, *, supervised: bool) -> None:
        self._runtime = runtime
        self._supervised = supervised
        self._worker: Worker | None = None
        self._failure = ""
        self._ending = False

    def progress(self, text: str) -> None:
        """What the start is waiting for, and "ready"."""
        if text == "ready":
            if self._supervised and self._worker is not None:
                tell(NewsKind.READY, self._worker.served_name)
        elif self._supervised:
            tell(NewsKind.PROGRESS, text)
        else:
            logger.info("%s", text)

    def failed(self, reason: str) -> None:
        """Why the start, or the engine, failed."""
        self._failure = reason

    async def run(self, worker: Worker) -> int:
        """The worker's life; its exit status."""
        self._worker = worker
        if self._ending:
            worker.shutdown()
        status = await worker.run()
        if self._failure:
            raise StartFailed(self._failure)
        return status

    async def end_on_shutdown(self) -> None:
        """Hand a signal to the worker. An engine still starting gets a moment, then the process ends without it:

        nothing is registered yet, nobody is served, and a thread that loads a model cannot be stopped.
        """
        await self._runtime.wait_for_shutdown()
        self._ending = True
        if self._worker is not None:
            self._worker.shutdown()
        await asyncio.sleep(_START_LIMIT)
        if self._worker is None or self._worker.engine_config is None:
            logger.warning("the engine is still starting; ending without it")
            os._exit(EXIT_DEADLINE)
