"""The life of a worker: start the engine, serve it, register the model, and undo it all in order."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from stator.errors import StatorError
from stator.health import EndpointChange, EndpointState
from stator.llm.output import EngineOutput
from stator.llm.request import read_request
from stator.protocol.records import ModelRecord
from stator.runtime.context import Context
from stator.runtime.engine import Engine
from stator.tasks import Scope
from stator.worker.choices import Choices
from stator.worker.config import WorkerConfig
from stator.worker.controls import EngineCommands
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.guard import Guard
from stator.worker.health_payload import health_payload
from stator.worker.host import ServedEndpoint, WorkerHost
from stator.worker.registration import model_record
from stator.worker.reporting import Reporting

__all__ = ["EXIT_DEADLINE", "EXIT_FAILED", "EXIT_OK", "Worker"]

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
"""the engine could not start or has failed, or the endpoint could not be served"""
EXIT_DEADLINE = 143
"""the engine's clean-up did not end in time; what the reference's workers exit with (`spec/45 §6`)"""

_KILLED_LIMIT = 5.0
"""seconds that killed requests get for their own clean-up, and those of a failed engine"""


class Worker:
    """One engine on one endpoint.

        starting ──▶ serving ──▶ leaving ──▶ draining ──▶ ended
                 engine · model · endpoint     grace     in-flight · engine · clean-up

    `run` is the whole life, once. `shutdown` may be called at any time, from the event loop's thread: during the start, the
    start is awaited first (an engine half loaded cannot be cleaned up); a second call ends grace period and drain at once.

    An engine that fails while it serves (`LLMEngine.failed` returns, or `generate` raises `EngineShutdown`) ends the worker without
    grace: its requests end with `EngineShutdown`, which callers that have no item yet take elsewhere, and `run` returns
    `EXIT_FAILED`, so that a supervisor starts it again.
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
        """`progress` is told in a few words what a start is waiting for, and "ready" at its end; `failed` why a start, or the engine,
        failed. Both are logged where nobody is given.
        """
        self._engine = engine
        self._host = host
        self._config = config or WorkerConfig()
        self._progress = progress or _log_progress
        self._failed = failed
        self._health = host.health
        self._ending = asyncio.Event()
        self._hurry = asyncio.Event()
        self._ready = asyncio.Event()
        self._engine_config: EngineConfig | None = None
        self._chain: Engine | None = None
        self._guard: Guard | None = None
        self._reporting: Reporting | None = None
        self._commands: EngineCommands | None = None
        self._served: ServedEndpoint | None = None
        self._record: ModelRecord | None = None
        self._published = False
        self._death = ""
        """why the engine can generate no more"""
        self._draining = False
        """whether the engine knows that the end has come: what it says then of shutting down is no news"""
        self._unsubscribe: Callable[[], None] = _nothing

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
        if not clean:
            return EXIT_DEADLINE
        return EXIT_FAILED if self._death else status

    # -- the start (`spec/45 §3` has the order)

    async def _live(self, scope: Scope) -> None:
        config, reporting = await self._start_engine(scope)
        if self._ending.is_set():
            return
        scope.spawn(self._follow_engine(), name="engine's end")
        record = self._record = self._model_record(config)
        self._published = True
        await self._host.publish(record)
        self._commands = EngineCommands(self._host.engine_routes, self._engine.controls(), self._engine.updates())
        logger.info("serving %s on %s", self.served_name, self._config.endpoint_id)
        self._served = served = await self._host.serve(
            self._config.endpoint_id,
            self.generate,
            slots=config.slots,
            canary_payload=await health_payload(self._engine, self._config.health_payload),
            metrics_labels=reporting.labels,
        )
        if not self._death:
            self._commands.offer(served)
            self._health.set_system(True, "the worker serves")
            self._ready.set()
            self._progress("ready")
        await self._ending.wait()

    async def _start_engine(self, scope: Scope) -> tuple[EngineConfig, Reporting]:
        self._health.set_system(False, "the engine is starting")
        guard = self._guard = Guard(self._engine, scope, died=self._engine_failed)
        self._chain = guard if self._engine.native_choices else Choices(guard)
        self._engine.follow_progress(self._report)
        now = asyncio.get_running_loop().time
        began = now()
        self._engine_config = config = await self._engine.start(self._host.instance_id)
        took = now() - began
        name = self._config.served_name or config.served_name or config.card.display_name
        self._reporting = reporting = Reporting(self._host, self._config.endpoint_id, config, model_name=name)
        if not self._ending.is_set():
            gauges = await reporting.open(self._engine, kv_events=self._config.enable_kv_events)
            gauges.model_load_time.set(took)
        return config, reporting

    def _report(self, text: str) -> None:
        self._health.set_system(False, f"the engine is starting: {text}")
        self._progress(text)

    def _model_record(self, config: EngineConfig) -> ModelRecord:
        return model_record(
            config,
            endpoint=self._config.endpoint_id,
            instance_id=self._host.instance_id,
            served_name=self._config.served_name,
        )

    def _say_why(self, error: Exception) -> None:
        reason = error.message if isinstance(error, StatorError) else f"{type(error).__name__}: {error}"
        reason = " ".join(reason.split())
        self._health.set_system(False, f"the worker cannot start: {reason}")
        if self._failed is None:
            logger.error("worker cannot start: %s", reason)
        else:
            self._failed(reason)
        logger.debug("start failed", exc_info=error)

    # -- an engine that fails

    async def _follow_engine(self) -> None:
        try:
            reason = await self._engine.failed()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        self._engine_failed(reason)

    def _engine_failed(self, reason: str) -> None:
        """The engine can generate no more. Everything that callers notice happens now; discovery is told as part of the end."""
        if self._death or self._draining:
            return
        self._death = reason = " ".join(reason.split()) or "it does not say why"
        logger.error("the engine has failed: %s", reason)
        if self._guard is not None:
            self._guard.fail(reason)
        if self._served is not None:
            self._served.drain()
        self._health.set_system(False, f"the engine has failed: {reason}")
        self._condemn()
        self._unsubscribe = self._health.subscribe(self._stay_sick)
        if self._failed is not None:
            self._failed(f"the engine has failed: {reason}")
        self._ending.set()

    def _condemn(self) -> None:
        name = self._config.endpoint
        if self._health.state(name) is not None:
            self._health.set_endpoint(name, EndpointState.SICK, f"the engine has failed: {self._death}")

    def _stay_sick(self, change: EndpointChange) -> None:
        """An answer that was complete before the engine failed is no sign of life."""
        if change.endpoint == self._config.endpoint and change.state is EndpointState.READY:
            self._condemn()

    # -- the end

    def _end_now(self) -> None:
        self._ending.set()
        self._hurry.set()

    async def _end(self) -> bool:
        """Undo the start in reverse order, as far as it got; False if the engine's clean-up did not end in time."""
        now = asyncio.get_running_loop().time
        if self._commands is not None:
            self._commands.withdraw()
        served, gauges = self._served, None if self._reporting is None else self._reporting.gauges
        await self._leave(served)
        if served is not None:
            began = now()
            await self._finish_requests(served)
            if gauges is not None:
                gauges.drain_time.set(now() - began)
        self._draining = True
        began = now()
        clean = await self._clean_up()
        if gauges is not None:
            gauges.cleanup_time.set(now() - began)
        if served is not None:
            await served.aclose()
        self._unsubscribe()
        await self._end_reporting()
        return clean

    async def _leave(self, served: ServedEndpoint | None) -> None:
        """Out of discovery, endpoint before model; then time for clients that have not noticed.

        Discovery's errors stop nothing any more. An engine that has failed answers nobody: new requests are refused at once.
        """
        try:
            if served is not None:
                await served.unregister()
            if self._published and self._record is not None:
                await self._host.withdraw(self._record)
        except StatorError as error:
            logger.warning("could not leave discovery: %s", error)
        if served is None:
            return
        if not self._death:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.grace_period):
                    await self._hurry.wait()
            self._health.set_system(False, "the worker is ending")
        served.drain()

    async def _finish_requests(self, served: ServedEndpoint) -> None:
        """Wait for running requests, at most `drain_timeout`; kill the rest. Those of a failed engine have been told already."""
        limit = min(self._config.drain_timeout, _KILLED_LIMIT) if self._death else self._config.drain_timeout
        if served.inflight:
            logger.info("waiting for %d requests", served.inflight)
            await self._unless_hurried(served.idle(), limit=limit)
        if not self._death:
            await self._drain_engine()
        if served.inflight:
            logger.warning("killing %d requests that did not end within %s s", served.inflight, limit)
            served.kill_all()
            with suppress(TimeoutError):
                async with asyncio.timeout(_KILLED_LIMIT):
                    await served.idle()

    async def _drain_engine(self) -> None:
        self._draining = True
        try:
            async with asyncio.timeout(self._config.cleanup_timeout):
                await self._engine.drain()
        except Exception as error:
            logger.warning("the engine failed to drain: %r", error)

    async def _end_reporting(self) -> None:
        if self._reporting is not None:
            try:
                await self._reporting.aclose()
            except Exception as error:
                logger.warning("what the engine told could not be ended in order: %r", error)

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


def _nothing() -> None: ...


def _log_progress(text: str) -> None:
    logger.info("%s", text)


async def _fail(error: StatorError) -> AsyncIterator[EngineOutput]:
    raise error
    yield  # makes this a generator
