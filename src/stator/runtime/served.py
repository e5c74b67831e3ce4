"""An endpoint that this process serves: in discovery, taking requests, draining, gone."""

import asyncio
import logging

from stator.errors import StatorError, UsageError
from stator.protocol.ids import EndpointId, endpoint_path
from stator.protocol.records import EndpointRecord, Transport
from stator.runtime.engine import Generate
from stator.runtime.services import Services
from stator.runtime.serving import Serving

__all__ = ["ServedEndpoint"]

logger = logging.getLogger(__name__)


class ServedEndpoint:
    """Made by `ServedEndpoint.start`. Leaving discovery (`unregister`), refusing requests (`drain`) and closing are three steps."""

    def __init__(self, services: Services, endpoint: EndpointId, serving: Serving) -> None:
        self._services = services
        self.endpoint = endpoint
        self._serving = serving
        self._path = endpoint_path(services.discovery.instance_id, endpoint.name)
        self._record: EndpointRecord | None = None
        self._listed = False
        self._closed = False

    @classmethod
    async def start(cls, services: Services, endpoint: EndpointId, generate: Generate, *, device_type: str) -> "ServedEndpoint":
        """Take requests for `endpoint`, then put its record into discovery. Undoes itself if either fails."""
        served = cls(services, endpoint, Serving(generate, name=str(endpoint)))
        if served._path in services.served:
            raise UsageError(
                f"this runtime serves an endpoint called {endpoint.name!r} already, and requests find endpoints by that name alone;"
                f" give {endpoint} another name, or a runtime of its own"
            )
        services.served[served._path] = served
        record = EndpointRecord(
            component=endpoint.component,
            endpoint=endpoint.name,
            namespace=endpoint.namespace,
            instance_id=services.discovery.instance_id,
            transport=Transport(),
            device_type=device_type,
        )
        try:
            served._record = await services.network.register(record, served._path, served._serving)
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

    async def register(self) -> None:
        """Put the record into discovery (again). Idempotent."""
        if self._closed:
            raise UsageError(f"{self.endpoint} is closed; serve it again")
        self._serving.resume()
        self._listed = True  # before: a cancelled registration may have happened
        await self._services.discovery.register(self.record)

    async def unregister(self) -> None:
        """Take the record out of discovery; requests that still come are served. Idempotent."""
        if self._listed:
            self._listed = False
            await self._services.discovery.unregister(self.record.key)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._serving.drain()

    async def idle(self) -> None:
        """Wait until no request is running. The caller sets the deadline."""
        await self._serving.idle()

    def kill_all(self) -> None:
        """Kill what is still running."""
        self._serving.kill_all()

    async def finish(self, timeout: float) -> None:
        """Leave in good order: out of discovery, refuse, wait for what runs at most `timeout` seconds, kill the rest, close.

        Cancelled: closes without waiting.
        """
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
        logger.info("%s: waiting for %d requests", self.endpoint, self.inflight)
        try:
            async with asyncio.timeout(timeout):
                await self.idle()
        except TimeoutError:
            logger.warning("%s: killing %d requests after %s s", self.endpoint, self.inflight, timeout)

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
        self.drain()
        try:
            await self._leave_discovery()
            await self._serving.aclose()
        finally:
            self._services.network.unregister(self._path)
            self._services.served.pop(self._path, None)
