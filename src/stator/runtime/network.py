"""The planes of one process: which one a worker listens on, which one reaches an instance."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from stator.errors import ConfigError, ConnectFailed, NotTrusted, StatorError, Timeout, UsageError
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.records import EndpointRecord
from stator.transports.inbox import Inbox
from stator.transports.plane import Plane, PlaneClient, PlaneHost, PlaneServer, RequestSink

__all__ = ["Network", "PlaneChoice"]

logger = logging.getLogger(__name__)

_COMPATIBLE = ("tcp", "nats", "http2")
"""planes that a worker may take requests by besides the native one"""


class PlaneChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Planes by preference, best first."""

    planes: tuple[Plane, ...]
    """what a caller may use, as far as the instance's record names it"""
    fall_back: bool
    """whether the next plane may be tried when one fails to connect"""
    listening: tuple[Plane, ...] = ()
    """what a worker takes requests by; empty: all of them"""


class Network:
    """Opens planes on first use and closes them together.

    Fallback (`design.md §4`): only when nothing was sent, only on refused, timeout or no common version, never for want of trust; one
    warning per instance; the better plane is tried again after `retry` seconds. `fallbacks` counts by reason.
    """

    def __init__(self, choice: PlaneChoice, host: PlaneHost, *, retry: float) -> None:
        self._choice = choice
        self._host = host
        self._retry = retry
        self._servers: dict[str, PlaneServer] | None = None
        self._clients: dict[str, PlaneClient] = {}
        self._avoided: dict[tuple[str, int], float] = {}
        self._known: dict[int, tuple[EndpointRecord, PlaneClient]] = {}
        self._opening = asyncio.Lock()
        self._warned: set[int] = set()
        self._closed = False
        self.fallbacks: dict[str, int] = {}

    # -- the worker's side

    async def listen(self) -> Mapping[str, PlaneServer]:
        """The servers, by plane name; opened at the first call. Nothing is left open if one of them cannot."""
        async with self._opening:
            self._check_open()
            if self._servers is None:
                self._servers = await self._listen()
            return self._servers

    async def _listen(self) -> dict[str, PlaneServer]:
        servers: dict[str, PlaneServer] = {}
        try:
            for plane in self._choice.listening or self._choice.planes:
                servers[plane.name] = await plane.listen(self._host)
        except BaseException:
            for server in servers.values():
                await server.aclose()
            raise
        return servers

    async def register(self, record: EndpointRecord, path: str, sink: RequestSink) -> EndpointRecord:
        """Take requests for `path` on every plane; the record says where."""
        for server in (await self.listen()).values():
            server.register(path, sink)
            record = server.describe(record, path)
        return record

    def unregister(self, path: str) -> None:
        """Take no more requests for `path`."""
        for server in (self._servers or {}).values():
            server.unregister(path)

    def drain(self) -> None:
        """Tell connected clients to send nothing new."""
        for server in (self._servers or {}).values():
            server.drain()

    # -- the caller's side

    async def open(self, record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        """Send a request by the best plane that reaches the instance (`PlaneClient.open`)."""
        known = self._known.get(record.instance_id)
        if known is not None and known[0] is record:
            try:
                await known[1].open(record, envelope, inbox)
                return
            except (ConnectFailed, Timeout) as failure:
                self._known.pop(record.instance_id, None)
                if not self._may_fall_back(self._choice.planes[0], record, inbox, failure):
                    raise
                self._avoid(self._choice.planes[0], record, failure)
                inbox.changed()  # the limit for connecting begins again
        await self._open_first_usable(record, envelope, inbox)

    async def _open_first_usable(self, record: EndpointRecord, envelope: RequestEnvelope, inbox: Inbox) -> None:
        for plane in self._choice.planes:
            if not plane.reaches(record) or not self._usable(plane, record):
                continue
            client = await self._client(plane)
            try:
                await client.open(record, envelope, inbox)
            except (ConnectFailed, Timeout) as failure:
                if not self._may_fall_back(plane, record, inbox, failure):
                    raise
                self._avoid(plane, record, failure)
                inbox.changed()
                continue
            if plane is self._choice.planes[0]:
                self._known[record.instance_id] = (record, client)
            return
        wanted = ", ".join(plane.name for plane in self._choice.planes)
        raise ConnectFailed(
            f"instance {record.instance_id:x} cannot be reached by the planes in use ({wanted})",
            instance=record.instance_id,
            phase="connect",
        )

    async def _client(self, plane: Plane) -> PlaneClient:
        client = self._clients.get(plane.name)
        if client is None:
            async with self._opening:
                self._check_open()
                client = self._clients.get(plane.name)
                if client is None:
                    client = self._clients[plane.name] = await plane.connect(self._host)
        return client

    def _may_fall_back(self, plane: Plane, record: EndpointRecord, inbox: Inbox, failure: StatorError) -> bool:
        """Whether a later plane could reach the instance, and the request still wants it."""
        if not self._choice.fall_back or inbox.ended or self._closed or isinstance(failure, NotTrusted):
            return False
        later = self._choice.planes[self._choice.planes.index(plane) + 1 :]
        return any(each.reaches(record) for each in later)

    def _usable(self, plane: Plane, record: EndpointRecord) -> bool:
        if not self._avoided:
            return True
        until = self._avoided.get((plane.name, record.instance_id))
        if until is None:
            return True
        if self._host.wheel.now() < until:
            return False
        del self._avoided[plane.name, record.instance_id]
        return True

    def _avoid(self, plane: Plane, record: EndpointRecord, failure: StatorError) -> None:
        """Leave the plane alone for a while. Requests that failed together count once."""
        instance, now = record.instance_id, self._host.wheel.now()
        if now < self._avoided.get((plane.name, instance), now):
            return
        self._avoided[plane.name, instance] = now + self._retry
        self.fallbacks[failure.code] = self.fallbacks.get(failure.code, 0) + 1
        level = logging.INFO if instance in self._warned else logging.WARNING
        self._warned.add(instance)
        text = "instance %x does not answer on the %s plane (%s); falling back for %s s"
        logger.log(level, text, instance, plane.name, failure.message, self._retry)

    def forget(self, record: EndpointRecord) -> None:
        """The instance left discovery."""
        self._known.pop(record.instance_id, None)
        self._warned.discard(record.instance_id)
        for plane in self._choice.planes:
            self._avoided.pop((plane.name, record.instance_id), None)
            client = self._clients.get(plane.name)
            if client is not None and plane.reaches(record):
                client.forget(record)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the runtime has left its cluster; connect again")

    async def aclose(self) -> None:
        """Close callers first, then listeners. Nothing is opened from now on. Idempotent."""
        self._closed = True
        self._known.clear()
        async with self._opening:  # what is being opened is closed too
            clients, self._clients = self._clients, {}
            servers, self._servers = self._servers or {}, None
        for client in clients.values():
            await client.aclose()
        for server in servers.values():
            await server.aclose()


def choose_planes(
    name: str, request_plane: str, load: Callable[[str], Any], *, secret: bool = False, closed: bool = False
) -> PlaneChoice:
    """The planes that the settings `plane` and `request_plane` mean; `load` finds a plug-in by name.

    With a `secret` no plane takes the place of another; `closed`: only the one that proves the secret is used at all.
    """
    if closed and name in ("auto", "native"):
        name = "native"
    callers = {"auto": ("native", *_COMPATIBLE), "native": ("native",), "compatible": _COMPATIBLE}.get(name)
    if callers is None:
        raise ConfigError(f"plane = {name!r}: expected auto, native, compatible or memory")
    planes = {each: load(each)() for each in callers}
    listening = tuple(planes[each] for each in callers if each in ("native", request_plane))
    return PlaneChoice(planes=tuple(planes.values()), listening=listening, fall_back=name == "auto" and not secret)
