"""What a worker needs around it, without network: a runtime that notes, and an event plane that can fail."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from stator.clock import Clock
from stator.events.interface import Channel, EventPublisher, OnGap, Overflow, PublisherStatistics, Subscription
from stator.health import EngineRoutes, SystemHealth
from stator.llm.load_event import LOAD_TOPIC, ActiveLoad, decode_load
from stator.protocol.ids import EndpointId
from stator.protocol.records import ModelRecord
from stator.runtime.engine import Generate
from stator.tasks import SystemClock
from stator.telemetry import MetricsLevel

__all__ = ["INSTANCE", "FakeEvents", "FakeHost", "FakeServed"]

INSTANCE = 0xABC


class FakeEvents:
    """An event plane (`stator.events.interface.EventPlane`) that keeps what is published."""

    def __init__(self) -> None:
        self.sent: list[tuple[Channel, bytes]] = []
        self.opened: list[Channel] = []
        self.closed: list[Channel] = []
        self.opening_fails: Exception | None = None
        self.publishing_fails: Exception | None = None
        self.on_publish: Callable[[bytes], None] = lambda payload: None

    @property
    def loads(self) -> list[ActiveLoad]:
        """The load events among what was sent."""
        return [decode_load(payload) for channel, payload in self.sent if channel.topic == LOAD_TOPIC]

    async def publisher(self, channel: Channel) -> EventPublisher:
        if self.opening_fails is not None:
            raise self.opening_fails
        self.opened.append(channel)
        return _FakePublisher(self, channel)

    async def subscribe(
        self, channel: Channel, *, capacity: int | None = None, overflow: Overflow = "drop_oldest", on_gap: OnGap | None = None
    ) -> Subscription:
        raise NotImplementedError("a worker only publishes")

    async def aclose(self) -> None: ...


class _FakePublisher:
    def __init__(self, plane: FakeEvents, channel: Channel) -> None:
        self._plane = plane
        self._channel = channel
        self.publisher_id = len(plane.opened)
        self._published = 0

    def publish(self, payload: bytes) -> None:
        if self._plane.publishing_fails is not None:
            raise self._plane.publishing_fails
        self._published += 1
        self._plane.sent.append((self._channel, payload))
        self._plane.on_publish(payload)

    def statistics(self) -> PublisherStatistics:
        return PublisherStatistics(published=self._published, dropped=0, queued=0)

    async def aclose(self) -> None:
        if self._channel not in self._plane.closed:
            self._plane.closed.append(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class FakeServed:
    """An endpoint with a number of running requests that a test sets."""

    def __init__(self, log: list[str], generate: Generate, options: dict[str, Any]) -> None:
        self.log = log
        self.generate = generate
        self.options = options
        self.inflight = 0
        self.ended = asyncio.Event()

    async def register(self) -> None:
        self.log.append("register")

    async def unregister(self) -> None:
        self.log.append("unregister")

    def drain(self) -> None:
        self.log.append("refuse")

    async def idle(self) -> None:
        if self.inflight:
            await self.ended.wait()

    def finish(self) -> None:
        """The running requests end."""
        self.inflight = 0
        self.ended.set()

    def kill_all(self) -> None:
        self.log.append("kill")
        self.finish()

    async def aclose(self) -> None:
        self.log.append("close")


class FakeHost:
    """A runtime (`stator.worker.WorkerHost`) that keeps records in a list and notes each step in `log`.

    `fail` has the error of a step, by its first word.
    """

    def __init__(self, log: list[str], *, clock: Clock | None = None) -> None:
        self.log = log
        self.instance_id = INSTANCE
        self.metrics = MetricsLevel.runtime(worker_id=INSTANCE)
        self.health = SystemHealth(clock=clock or SystemClock())
        self.engine_routes = EngineRoutes()
        self.events = FakeEvents()
        self.served: FakeServed | None = None
        self.records: list[ModelRecord] = []
        self.fail: dict[str, Exception] = {}

    async def serve(self, endpoint: EndpointId, generate: Generate, *, slots: int | None = None, **options: Any) -> FakeServed:
        self._note(f"serve {endpoint}")
        self.served = FakeServed(self.log, generate, {"slots": slots, **options})
        self.health.add(endpoint.name, payload=options.get("canary_payload"), instance_id=self.instance_id)
        return self.served

    async def publish(self, record: ModelRecord) -> None:
        self._note("publish")
        self.records.append(record)

    async def withdraw(self, record: ModelRecord) -> None:
        self._note("withdraw")
        self.records.remove(record)

    def _note(self, step: str) -> None:
        self.log.append(step)
        error = self.fail.get(step.split()[0])
        if error is not None:
            raise error
