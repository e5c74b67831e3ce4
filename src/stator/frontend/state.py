"""What all handlers of one frontend share."""

import asyncio
from collections.abc import Callable
from functools import cached_property
from random import Random
from uuid import UUID

from aiohttp import web

from stator.clock import Clock
from stator.errors import Overloaded, StatorError
from stator.frontend.body import BodyReader
from stator.frontend.config import FrontendConfig
from stator.frontend.metrics import FrontendMetrics
from stator.frontend.ticket import Ticket
from stator.frontend.turnstile import Turnstile
from stator.llm.served import ModelSource
from stator.tasks import DeadlineWheel, Scope
from stator.telemetry import RequestLog

__all__ = ["SERVER", "STATE", "TICKET", "FrontendState", "random_ids"]


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

    async def aclose(self) -> None:
        """End what belongs to no single request."""
        await self.scope.aclose()
        self.wheel.close()
        self.log.close()

    def admit(self, ticket: Ticket) -> None:
        """Take one more request; `Overloaded` when there are too many. An id in use is replaced."""
        if len(self.running) >= self.config.max_requests:
            raise Overloaded(f"{len(self.running)} requests are being answered, no more are allowed")
        if ticket.id in self.running:
            ticket.id = self.new_id()
        self.running[ticket.id] = ticket
        self.idle.clear()
        ticket.enter()

    def release(self, ticket: Ticket) -> None:
        """The request is over."""
        ticket.leave()
        self.running.pop(ticket.id, None)
        if not self.running:
            self.idle.set()

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
