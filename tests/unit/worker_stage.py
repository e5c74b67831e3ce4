"""A worker and all it needs around it, for tests of its life."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

from stator.testing.worker_host import FakeHost, FakeServed
from stator.worker import LLMEngine, Worker, WorkerConfig

EngineT = TypeVar("EngineT", bound=LLMEngine)


class WorkerStage(Generic[EngineT]):
    """One worker of an engine, with all it needs around it; they note what is called in one log."""

    def __init__(
        self,
        engine: EngineT,
        log: list[str],
        *,
        failed: Callable[[str], None] | None = None,
        progress: Callable[[str], None] | None = None,
        **config: Any,
    ) -> None:
        config.setdefault("grace_period", 0.0)
        self.log = log
        self.engine = engine
        self.host = FakeHost(log)
        self.worker = Worker(engine, self.host, config=WorkerConfig(**config), failed=failed, progress=progress)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[asyncio.Task[int]]:
        """The worker, ready; shut down at the end if the test did not."""
        task = asyncio.ensure_future(self.worker.run())
        async with asyncio.timeout(5):
            await self.worker.ready()
        yield task
        self.worker.shutdown()
        async with asyncio.timeout(10):
            await task

    @property
    def served(self) -> FakeServed:
        """The endpoint, as the host serves it."""
        assert self.host.served is not None
        return self.host.served
