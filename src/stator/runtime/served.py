"""An endpoint that this process serves: in discovery, taking requests, draining, gone."""

import asyncio
import logging
from collections.abc import Sequence
from itertools import count
from typing import Any

from stator.errors import StatorError, UsageError
from stator.protocol.ids import EndpointId, endpoint_path
from stator.protocol.records import EndpointRecord, Transport
from stator.runtime.engine import Generate
from stator.runtime.meter import EndpointMeter
from stator.runtime.services import Services
from stator.runtime.serving import Serving
from stator.runtime.wellbeing import Wellbeing
from stator.tasks import Backoff

__all__ = ["ServedEndpoint", "ServingOptions"]

logger = logging.getLogger(__name__)

_SAY_EVERY = 5.0
"""seconds between lines about requests that are waited for"""


class ServingOptions:
    """What may be said when an endpoint is served."""

    __slots__ = ("bidirectional", "canary_payload", "device_type", "metrics_labels")

    def __init__(
        self,
        *,
        device_type: str,
        metrics_labels: Sequence[tuple[str, str]] = (),
        canary_payload: Any = None,
        bidirectional: bool = False,
    ) -> None:
        self.bidirectional = bidirectional
        self.device_type = device_type
        self.metrics_labels = metrics_labels
        self.canary_payload = canary_payload


class ServedEndpoint:
    """Made by `ServedEndpoint.start`. Leaving discovery (`unregister`), refusing requests (`drain`) and closing are three steps.

    It is listed unless its owner or an operator took it out, or its canary found it sick: `unregister` and `register` say what the
    owner wants, `leave` and `enter` what the operator does, and all three must agree that it be listed.
    """

    def __init__(self, services: Services, endpoint: EndpointId, serving: Serving, meter: EndpointMeter) -> None:
        self._services = services
        self.endpoint = endpoint
        self._serving = serving
        self._meter = meter
        self._path = endpoint_path(services.discovery.instance_id, endpoint.name)
        self._record: EndpointRecord | None = None
        self._listed = False
        self._reasons: set[str] = set()
        """why it is not to be listed: owner, operator, health, closing"""
        self._listing = asyncio.Lock()
        self._catching_up: asyncio.Task[None] | None = None
        self._closed = False
        self._wellbeing = Wellbeing(
            endpoint.name,
            health=services.health,
            config=services.health_config,
            serving=serving,
            meter=services.meter,
            wheel=services.wheel,
            new_id=services.new_id,
            changed=self._health_changed,
        )

    @classmethod
    async def start(
        cls, services: Services, endpoint: EndpointId, generate: Generate, options: ServingOptions
    ) -> "ServedEndpoint":
        """Take requests for `endpoint`, then put its record into discovery. Undoes itself if either fails."""
        path = endpoint_path(services.discovery.instance_id, endpoint.name)
        if path in services.served:
            raise UsageError(
                f"this runtime serves an endpoint called {endpoint.name!r} already, and requests find endpoints by that name alone;"
                f" give {endpoint} another name, or a runtime of its own"
            )
        meter = _meter(services, endpoint, options)
        admission = services.meter.admission
        serving = Serving(generate, name=str(endpoint), admission=admission, meter=meter, bidirectional=options.bidirectional)
        served = cls(services, endpoint, serving, meter)
        services.served[path] = served
        record = EndpointRecord(
            component=endpoint.component,
            endpoint=endpoint.name,
            namespace=endpoint.namespace,
            instance_id=services.discovery.instance_id,
            transport=Transport(),
            device_type=options.device_type,
        )
        try:
            served._record = await services.network.register(record, served._path, served._serving)
            served._wellbeing.start(options.canary_payload, record.instance_id)
            await served.register()
        except BaseException:
            await served.aclose()
            raise
        logger.info("serving %s as instance %x", endpoint, record.instance_id)
        return served

    @property
    def record(self) -> EndpointRecord:
        """What discovery knows of it."""
        assert self._record is not None
        return self._record

    @property
    def inflight(self) -> int:
        """Requests that have not ended."""
        return self._serving.inflight

    @property
    def listed(self) -> bool:
        """Whether it is in discovery."""
        return self._listed

    # -- discovery

    async def register(self) -> None:
        """Put the record into discovery (again), unless an operator or the canary keeps it out. Idempotent.

        Raises `UsageError` once it is closing, and what discovery raises.
        """
        if "closing" in self._reasons:
            raise UsageError(f"{self.endpoint} is closed; serve it again")
        self._reasons.discard("owner")
        self._take_requests()
        await self._reconcile()

    async def unregister(self) -> None:
        """Take the record out of discovery; requests that still come are served. Idempotent."""
        self._reasons.add("owner")
        await self._reconcile()

    async def leave(self) -> None:
        """An operator drains the process: out of discovery, and refuse new requests, which go elsewhere. Idempotent."""
        self._reasons.add("operator")
        try:
            await self._reconcile()
        finally:
            self.drain()

    async def enter(self) -> None:
        """Undo `leave`. Idempotent."""
        self._reasons.discard("operator")
        self._take_requests()
        await self._reconcile()

    def _take_requests(self) -> None:
        if not self._reasons & {"operator", "closing"}:
            self._serving.resume()

    def _health_changed(self, sick: bool) -> None:
        """What the canary found; discovery learns it in a task of the runtime, which tries until it does."""
        (self._reasons.add if sick else self._reasons.discard)("health")
        busy = self._catching_up is not None and not self._catching_up.done()
        if not busy and "closing" not in self._reasons and not self._services.scope.closed:
            self._catching_up = self._services.scope.spawn(self._catch_up(), name=f"listing of {self.endpoint}")

    async def _catch_up(self) -> None:
        """Until discovery says what is wanted, whatever that is by then."""
        backoff = Backoff()
        for attempt in count():
            try:
                while self._listed is bool(self._reasons):
                    await self._reconcile()
                return
            except StatorError as error:
                logger.warning("%s: discovery could not be told: %s", self.endpoint, error)
                await asyncio.sleep(backoff.delay(attempt, self._services.random))

    async def _reconcile(self) -> None:
        """Make discovery say what is wanted now. Raises what discovery raises; the wish stands."""
        if self._record is None:  # it never got as far as discovery
            return
        discovery, key = self._services.discovery, self._record.key
        async with self._listing:
            if self._reasons:
                if self._listed:
                    await discovery.unregister(key)
                    self._listed = False
            elif not self._listed or key not in discovery.owned():  # not there: a registration that was given up
                self._listed = True  # before: a cancelled registration may have happened
                try:
                    await discovery.register(self.record)
                except StatorError:
                    self._listed = False
                    raise

    # -- requests

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._serving.drain()

    async def idle(self) -> None:
        """Wait until no request is running. The caller sets the deadline."""
        await self._serving.idle()

    def kill_all(self) -> None:
        """Kill what is still running."""
        self._serving.kill_all()

    # -- the end

    async def finish(self, timeout: float) -> None:
        """Leave in good order: out of discovery, refuse, wait for what runs at most `timeout` seconds, kill the rest, close.

        Cancelled: closes without waiting.
        """
        self._reasons.add("closing")
        try:
            await self._leave_discovery()
            self.drain()
            others = self._services.served.values()
            if self._services.closing.is_set() and not any(other.listed for other in others):
                self._services.network.drain()
            if self.inflight:
                await self._wait(timeout)
        finally:
            await self.aclose()

    async def _wait(self, timeout: float) -> None:
        """Wait for running requests, and say now and then how many there are."""
        end = self._services.wheel.now() + timeout
        while self.inflight:
            left = end - self._services.wheel.now()
            if left <= 0:
                logger.warning("%s: ending %d requests after %s s", self.endpoint, self.inflight, timeout)
                return
            logger.info("%s: waiting for %d requests, at most %.0f s", self.endpoint, self.inflight, left)
            try:
                async with asyncio.timeout(min(left, _SAY_EVERY)):
                    await self.idle()
            except TimeoutError:
                pass

    async def _leave_discovery(self) -> None:
        try:
            await self.unregister()
        except StatorError as error:
            logger.warning("could not leave discovery: %s", error)

    async def aclose(self) -> None:
        """Stop serving now: what still runs is ended with the error `EngineShutdown`. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._reasons.add("closing")
        self.drain()
        try:
            await self._leave_discovery()
            await self._wellbeing.aclose()
            await self._serving.aclose()
        finally:
            self._services.network.unregister(self._path)
            self._services.served.pop(self._path, None)
            self._meter.close()


def _meter(services: Services, endpoint: EndpointId, options: ServingOptions) -> EndpointMeter:
    """On a level of its own, which ends with the serving."""
    level = services.meter.level(endpoint.namespace, endpoint.component).endpoint(endpoint.name)
    try:
        return EndpointMeter(services.meter, endpoint, level, options.metrics_labels)
    except BaseException:
        level.remove()
        raise
