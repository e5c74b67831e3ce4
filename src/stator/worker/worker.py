"""The life of a worker: start the engine, serve it, register the model, and undo it all in order."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Protocol

from stator.errors import StatorError
from stator.llm.output import EngineOutput
from stator.llm.request import read_request
from stator.protocol.ids import EndpointId
from stator.protocol.records import ModelRecord
from stator.runtime.context import Context
from stator.runtime.engine import Engine, Generate
from stator.tasks import Scope
from stator.worker.choices import Choices
from stator.worker.config import WorkerConfig
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.guard import Guard
from stator.worker.registration import model_record

__all__ = ["EXIT_DEADLINE", "EXIT_FAILED", "EXIT_OK", "ServedEndpoint", "Worker", "WorkerHost"]

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
"""the engine could not start, or the endpoint could not be served"""
EXIT_DEADLINE = 143
"""the engine's clean-up did not end in time; what the reference's workers exit with (`spec/45 §6`)"""

_KILLED_LIMIT = 5.0
"""seconds that killed requests get for their own clean-up"""


class ServedEndpoint(Protocol):
    """An endpoint that takes requests. Leaving discovery, refusing requests and closing are three steps."""

    @property
    def inflight(self) -> int:
        """Requests that have not ended."""
        ...

    async def unregister(self) -> None:
        """Remove the record from discovery; requests that still come are served."""
        ...

    def drain(self) -> None:
        """Refuse new requests from now on."""
        ...

    async def idle(self) -> None:
        """Wait until no request is running."""
        ...

    def kill_all(self) -> None:
        """Kill what is still running."""
        ...

    async def aclose(self) -> None:
        """Stop serving. Idempotent."""
        ...


class WorkerHost(Protocol):
    """What a worker needs of a connected runtime."""

    @property
    def instance_id(self) -> int: ...

    async def serve(self, endpoint: EndpointId, generate: Generate) -> ServedEndpoint:
        """On return requests are taken and the endpoint's record is in discovery."""
        ...

    async def publish(self, record: ModelRecord) -> None: ...

    async def withdraw(self, record: ModelRecord) -> None: ...


class Worker:
    """One engine on one endpoint.

        starting ──▶ serving ──▶ leaving ──▶ draining ──▶ ended
                 engine · endpoint · model     grace     in-flight · engine · clean-up

    `run` is the whole life, once. `shutdown` may be called at any time, from the event loop's thread: during the start, the
    start is awaited first (an engine half loaded cannot be cleaned up); a second call ends grace period and drain at once.
    """

    def __init__(
        self,
        engine: LLMEngine,
        host: WorkerHost,
        *,
        config: WorkerConfig | None = None,
        progress: Callable[[str], None] | None = None,
        failed: Callable[[str], None] | None = None,
    ) -> None:
        """`progress` is told in a few words what a start is waiting for, and "ready" at its end; `failed` why a start failed.

        Both are logged where nobody is given.
        """
        self._engine = engine
        self._host = host
        self._config = config or WorkerConfig()
        self._progress = progress or _log_progress
        self._failed = failed or _log_failure
        self._ending = asyncio.Event()
        self._hurry = asyncio.Event()
        self._ready = asyncio.Event()
        self._engine_config: EngineConfig | None = None
        self._chain: Engine | None = None
        self._served: ServedEndpoint | None = None
        self._record: ModelRecord | None = None

    @property
    def engine_config(self) -> EngineConfig | None:
        """What the engine said of itself; None before it has started."""
        return self._engine_config

    @property
    def served_name(self) -> str:
        """The name clients ask for; "" before the engine has started."""
        return "" if self._record is None else self._record.card_json["display_name"]

    @property
    def is_ready(self) -> bool:
        """Whether requests are served and the model is registered."""
        return self._ready.is_set() and not self._ending.is_set()

    async def ready(self) -> None:
        """Wait until requests are served and the model is registered. Returns never if the start fails: watch `run` as well."""
        await self._ready.wait()

    def shutdown(self) -> None:
        """Begin the end; the second call hurries it."""
        (self._hurry if self._ending.is_set() else self._ending).set()

    def generate(self, body: Any, context: Context) -> AsyncIterator[EngineOutput]:
        """The handler of the endpoint: type the request once, hand it to the engine.

        A request that cannot be read is answered with an error item, not refused: it would be refused everywhere (`spec/45
        §4.2`).
        """
        assert self._chain is not None, "generate is served after the engine has started"
        try:
            request = read_request(body)
        except StatorError as error:
            return _fail(error)
        logger.debug("request %s at instance %x: %d prompt tokens", context.id, self._host.instance_id, len(request.token_ids))
        return self._chain.generate(request, context)

    async def run(self) -> int:
        """Live until `shutdown`. Returns the exit status of the process: one of the `EXIT_…` constants.

        A start that fails is one line to `failed` and `EXIT_FAILED`; nothing stays registered. Cancelling it runs the same
        clean-up, hurried.
        """
        if self._ending.is_set():
            return EXIT_OK
        status = EXIT_OK
        async with Scope("worker") as scope:
            try:
                await self._live(scope)
            except asyncio.CancelledError:
                self._end_now()
                raise
            except Exception as error:
                self._say_why(error)
                self._end_now()
                status = EXIT_FAILED
            finally:
                clean = await self._end()
        return status if clean else EXIT_DEADLINE

    async def _live(self, scope: Scope) -> None:
        self._record = record = await self._start_engine(scope)
        if self._ending.is_set():
            return
        self._served = await self._host.serve(self._config.endpoint_id, self.generate)
        await self._host.publish(record)
        self._ready.set()
        logger.info("serving %s on %s", self.served_name, self._config.endpoint_id)
        self._progress("ready")
        await self._ending.wait()

    async def _end(self) -> bool:
        """Undo the start in reverse order, as far as it got; False if the engine's clean-up did not end in time."""
        served = self._served
        if served is not None:
            await self._leave(served)
            await self._finish_requests(served)
        clean = await self._clean_up()
        if served is not None:
            await served.aclose()
        return clean

    def _end_now(self) -> None:
        self._ending.set()
        self._hurry.set()

    async def _start_engine(self, scope: Scope) -> ModelRecord:
        guard = Guard(self._engine, scope)
        self._chain = guard if self._engine.native_choices else Choices(guard)
        self._engine.follow_progress(self._progress)
        self._engine_config = config = await self._engine.start(self._host.instance_id)
        return model_record(
            config,
            endpoint=self._config.endpoint_id,
            instance_id=self._host.instance_id,
            served_name=self._config.served_name,
        )

    def _say_why(self, error: Exception) -> None:
        reason = error.message if isinstance(error, StatorError) else f"{type(error).__name__}: {error}"
        self._failed(" ".join(reason.split()))
        logger.debug("start failed", exc_info=error)

    async def _leave(self, served: ServedEndpoint) -> None:
        """Out of discovery, endpoint before model; then time for clients that have not noticed.

        Discovery's errors stop nothing any more.
        """
        try:
            await served.unregister()
            if self._record is not None:
                await self._host.withdraw(self._record)
        except StatorError as error:
            logger.warning("could not leave discovery: %s", error)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.grace_period):
                await self._hurry.wait()
        served.drain()

    async def _finish_requests(self, served: ServedEndpoint) -> None:
        """Wait for running requests, at most `drain_timeout`; kill the rest."""
        if served.inflight:
            logger.info("waiting for %d requests", served.inflight)
            await self._unless_hurried(served.idle(), limit=self._config.drain_timeout)
        await self._drain_engine()
        if served.inflight:
            logger.warning("killing %d requests that did not end within %s s", served.inflight, self._config.drain_timeout)
            served.kill_all()
            with suppress(TimeoutError):
                async with asyncio.timeout(_KILLED_LIMIT):
                    await served.idle()

    async def _drain_engine(self) -> None:
        try:
            async with asyncio.timeout(self._config.cleanup_timeout):
                await self._engine.drain()
        except Exception as error:
            logger.warning("the engine failed to drain: %r", error)

    async def _unless_hurried(self, work: Any, *, limit: float) -> None:
        """Run `work` until it is done, `limit` seconds are over or the end is hurried."""
        async with Scope("ending") as scope:
            tasks = {scope.spawn(work), scope.spawn(self._hurry.wait())}
            await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_COMPLETED)

    async def _clean_up(self) -> bool:
        """Let the engine free everything; False if it did not come to an end in time.

        Its errors are logged and change nothing.
        """
        try:
            async with asyncio.timeout(self._config.cleanup_timeout):
                await self._engine.cleanup()
        except TimeoutError:
            logger.error("the engine did not clean up within %s s", self._config.cleanup_timeout)
            return False
        except Exception:
            logger.exception("the engine failed to clean up")
        return True


def _log_progress(text: str) -> None:
    logger.info("%s", text)


def _log_failure(reason: str) -> None:
    logger.error("worker cannot start: %s", reason)


async def _fail(error: StatorError) -> AsyncIterator[EngineOutput]:
    raise error
    yield  # makes this a generator
