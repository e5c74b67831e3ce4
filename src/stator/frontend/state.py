"""What all handlers of one frontend share."""

import asyncio
import math
from collections.abc import Callable
from functools import cached_property
from random import Random
from secrets import token_bytes
from uuid import UUID

from aiohttp import web

from stator.clock import Clock
from stator.errors import StatorError
from stator.frontend.admissions import Admissions
from stator.frontend.body import BodyReader
from stator.frontend.config import FrontendConfig
from stator.frontend.errors import DRAINING, Failure, Rejected, overloaded
from stator.frontend.key_metrics import KeyMetrics
from stator.frontend.key_ring import KeyRing
from stator.frontend.metrics import UNKNOWN_MODEL, FrontendMetrics
from stator.frontend.ticket import Ticket
from stator.frontend.turnstile import Turnstile
from stator.llm.served import ModelSource
from stator.tasks import DeadlineWheel, Scope
from stator.telemetry import RequestLog

__all__ = ["SERVER", "STATE", "TICKET", "FrontendState", "random_ids"]

_LONGEST_RETRY = 300
"""seconds; what Retry-After says at most"""


class FrontendState:
    """Models, settings, counters, and the requests being answered now."""

    def __init__(
        self,
        source: ModelSource,
        *,
        config: FrontendConfig,
        metrics: FrontendMetrics,
        clock: Clock,
        new_id: Callable[[], str],
    ) -> None:
        self.source = source
        self.config = config
        self.metrics = metrics
        self.clock = clock
        self.new_id = new_id
        self.log = RequestLog(clock)
        self.scope = Scope("frontend")
        self.bodies = BodyReader(config)
        self.turnstile = Turnstile(config.burst)
        self.tenant_salt = token_bytes(16)
        self.admissions = Admissions(
            config.admission,
            metrics=metrics.admission,
            now=clock.monotonic,
            wheel=lambda: self.wheel,
            refuse=self.refusal,
        )
        metrics.page.on_update(self.admissions.show)
        self.keys: KeyRing | None = None
        """the API keys in force; None: nobody is asked for one"""
        if config.api_keys_path is not None:
            keys = KeyMetrics(metrics.page)
            self.keys = KeyRing(config.api_keys_path, clock=clock, shares=config.api_key_shares, metrics=keys)
        self.draining = False
        self.running: dict[str, Ticket] = {}
        """requests to the models, by id"""
        self.idle = asyncio.Event()
        """set while nothing runs"""
        self.idle.set()

    @cached_property
    def wheel(self) -> DeadlineWheel:
        """The deadlines of all requests. First asked for on the event loop."""
        return DeadlineWheel(asyncio.get_running_loop())

    async def open(self) -> None:
        """Read the API keys, and follow their file from now on. Raises `ConfigError` if it cannot be read."""
        if self.keys is not None:
            await self.keys.open()
            self.scope.spawn(self.keys.follow(), name="api keys")

    async def aclose(self) -> None:
        """End what belongs to no single request."""
        await self.scope.aclose()
        self.admissions.aclose()
        self.wheel.close()
        self.log.close()

    def admit(self, ticket: Ticket) -> None:
        """Take one more request; `Rejected` as overloaded when there are too many. An id in use is replaced."""
        if len(self.running) >= self.config.max_requests:
            text = f"The frontend answers {len(self.running)} requests (http.max_requests = {self.config.max_requests})"
            self.metrics.admission.refused(UNKNOWN_MODEL, "requests")
            raise Rejected(self._overloaded(text, 0.0))
        if ticket.id in self.running:
            ticket.id = self.new_id()
        self.running[ticket.id] = ticket
        self.idle.clear()
        ticket.enter()

    def release(self, ticket: Ticket) -> None:
        """The request is over."""
        ticket.leave()
        if ticket.admission is not None:
            ticket.admission.close()
        self.running.pop(ticket.id, None)
        if not self.running:
            self.idle.set()

    def drain(self) -> None:
        """Take no more requests, and refuse those that wait for a worker. Those that a worker has go on."""
        self.draining = True
        self.admissions.dismiss(lambda: Rejected(DRAINING))

    def refusal(self, model: str, text: str, wait: float) -> Rejected:
        """How a request for `model` is refused for want of a worker; `text` is what is in the way, `wait` for how many seconds."""
        return Rejected(self._overloaded(f"All workers of the model `{model}` are at capacity: {text}", wait))

    def _overloaded(self, text: str, wait: float) -> Failure:
        retry_after = min(max(1, self.config.retry_after, math.ceil(wait)), _LONGEST_RETRY)
        return overloaded(text, retry_after=retry_after, status=self.config.overload_status)

    def abort(self, error: StatorError) -> None:
        """End every request with `error`."""
        for ticket in list(self.running.values()):
            ticket.abort(error)


def random_ids(random: Random) -> Callable[[], str]:
    """A source of random UUIDs (version 4)."""
    return lambda: str(UUID(int=random.getrandbits(128), version=4))


SERVER = "stator"
"""what the Server header says, instead of aiohttp's version"""
STATE = web.AppKey("stator_frontend", FrontendState)
TICKET = web.RequestKey("stator_ticket", Ticket)
