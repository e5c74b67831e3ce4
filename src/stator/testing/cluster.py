"""A cluster in one process: runtimes that share a `MemoryStore` and talk over a plane of choice, real sockets included.

    async with Cluster.open("native") as cluster:
        worker = await cluster.worker(handler)
        client = await cluster.client()
        assert await client.generate("hi").collect() == ["hi"]
        await cluster.settled()

Leaving the block checks that nothing is held on either side and then ends every runtime.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any

from stator.clock import Clock
from stator.discovery.memory import MemoryStore
from stator.errors import ConnectFailed
from stator.routing import Policy
from stator.runtime import Client, Context, Engine, Runtime, ServedEndpoint
from stator.runtime.engine import Handler
from stator.runtime.network import Network
from stator.runtime.services import Services
from stator.testing.plane_suite import eventually
from stator.transports.inbox import Inbox
from stator.transports.memory import MemoryNetwork, MemoryPlane
from stator.transports.native import NativeClient, NativeServer
from stator.transports.tcp import CompatibleServer

# This kit looks into what it tests: counts that have no other reader, and connections to break.
# pyright: reportPrivateUsage=false

__all__ = ["ENDPOINT", "PLANES", "SOCKET_PLANES", "Cluster", "ClusterWorker", "echo", "held_by", "open_files", "tasks_now"]

ENDPOINT = "test.backend.generate"

PLANES: Mapping[str, Mapping[str, Any]] = {
    "memory": {},
    "native": {"plane": "native"},
    "native-tcp": {"plane": "native", "native__unix": False},
    "compatible": {"plane": "compatible"},
    "auto": {"plane": "auto"},
}
"""What can be given to `Cluster.open`: settings by name. `native` goes over the Unix socket, as it does between processes of one host."""

SOCKET_PLANES = ("native", "native-tcp", "compatible")
"""Those with sockets"""


async def echo(request: Any, context: Context) -> AsyncIterator[Any]:
    """Yields the request."""
    yield request


def open_files() -> dict[str, str]:
    """The open files of this process: number → what it is. Without `/dev/null`, which event loops keep for children."""
    found: dict[str, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the directory itself
            continue
    return {name: what for name, what in found.items() if what != "/dev/null"}


def tasks_now() -> list[str]:
    """The names of all running tasks but the calling one."""
    return sorted(task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()})


class ClusterWorker:
    """A runtime that serves, and how to make it misbehave."""

    def __init__(self, runtime: Runtime, served: ServedEndpoint) -> None:
        self.runtime = runtime
        self.served = served

    @property
    def id(self) -> int:
        """Its instance id."""
        return self.runtime.instance_id

    def cut(self) -> None:
        """Break every connection it has, without a goodbye."""
        for server in (self.runtime._services.network._servers or {}).values():
            match server:
                case MemoryPlane():
                    server.cut()
                case NativeServer():
                    for connection in tuple(server._sessions):
                        connection.abort(ConnectFailed("cut by the test"))
                case CompatibleServer():
                    for connection in tuple(server._connections):
                        connection.abort()
                    for answer in tuple(server._reception.answers):
                        answer.abort()
                case _:
                    raise TypeError(f"how to cut {server!r} is not known")


class Cluster:
    """Made by `Cluster.open`."""

    def __init__(self, plane: str, settings: Mapping[str, Any], stack: AsyncExitStack) -> None:
        self.plane = plane
        self.store = MemoryStore()
        self.network = MemoryNetwork()
        self.runtimes: list[Runtime] = []
        self.workers: list[ClusterWorker] = []
        self._settings = settings
        self._stack = stack
        self._ends: dict[Runtime, AsyncExitStack] = {}
        self._seeds = Random(20)

    @classmethod
    @asynccontextmanager
    async def open(cls, plane: str = "memory", *, check: bool = True, **settings: Any) -> "AsyncGenerator[Cluster, None]":
        """A cluster without members. `settings` are those of every runtime in it. `check`: see `settled`."""
        async with AsyncExitStack() as stack:
            cluster = cls(plane, {**PLANES[plane], **settings}, stack)
            yield cluster
            if check:
                await cluster.settled()

    # -- members

    async def join(self, *, clock: Clock | None = None, **settings: Any) -> Runtime:
        """Another process of the cluster, so to speak. It leaves with the cluster, or by `leave`."""
        merged = {**self._settings, **settings}
        if self.plane == "memory":
            merged["plane"] = self.network
        stack = await self._stack.enter_async_context(AsyncExitStack())
        runtime = await stack.enter_async_context(
            Runtime.connect(discovery=self.store, clock=clock, random=Random(self._seeds.getrandbits(64)), **merged)
        )
        self._ends[runtime] = stack
        self.runtimes.append(runtime)
        return runtime

    async def leave(self, runtime: Runtime) -> None:
        """End a member as the end of its `connect` block does."""
        self.runtimes.remove(runtime)
        self.workers = [worker for worker in self.workers if worker.runtime is not runtime]
        await self._ends.pop(runtime).aclose()

    async def worker(
        self,
        handler: Handler | Engine = echo,
        *,
        endpoint: str = ENDPOINT,
        runtime: Runtime | None = None,
        bidirectional: bool = False,
        **settings: Any,
    ) -> ClusterWorker:
        """Serve `handler`, in a new runtime unless one is given."""
        runtime = runtime or await self.join(**settings)
        served = await runtime.endpoint(endpoint).start(handler, bidirectional=bidirectional)
        worker = ClusterWorker(runtime, served)
        self.workers.append(worker)
        return worker

    async def client(
        self,
        policy: str | Policy = "round_robin",
        *,
        endpoint: str = ENDPOINT,
        item_type: Any = Any,
        runtime: Runtime | None = None,
        **settings: Any,
    ) -> Client:
        """A client of `endpoint`, in a new runtime unless one is given; it sees every worker of the endpoint."""
        runtime = runtime or await self.join(**settings)
        client = await runtime.endpoint(endpoint).client(policy, item_type=item_type)
        there = sum(str(worker.served.endpoint) == endpoint and worker.served.listed for worker in self.workers)
        await client.wait_for_instances(there, timeout=5)
        return client

    # -- what is left

    def leftovers(self) -> dict[str, int]:
        """What requests hold anywhere in the cluster; empty when nothing is going on."""
        members = enumerate(self.runtimes)
        return {f"runtime {number}: {what}": count for number, member in members for what, count in held_by(member).items()}

    async def settled(self, *, within: float = 10.0) -> None:
        """Wait until requests hold nothing; AssertionError naming what is held after `within` seconds."""
        try:
            await eventually(lambda: not self.leftovers(), within=within)
        except AssertionError:
            raise AssertionError(f"still held after {within} s: {self.leftovers()}") from None


def held_by(runtime: Runtime) -> dict[str, int]:
    """What requests hold in one runtime, served or made by it; empty when nothing is going on."""
    held: dict[str, int] = {}
    for what, count in _held_by(runtime._services):
        if count:
            held[what] = held.get(what, 0) + count
    return held


def _held_by(services: Services) -> Iterable[tuple[str, int]]:
    for served in services.served.values():
        assert isinstance(served, ServedEndpoint)
        yield f"requests in flight at {served.endpoint}", served.inflight
    for view in services.views.values():
        yield f"occupancy of {view.endpoint}", view.occupancy.total
    yield "armed inboxes", sum(isinstance(entry, Inbox) for slot in services.wheel._slots.values() for entry in slot)
    yield from _held_by_planes(services.network)


def _held_by_planes(network: Network) -> Iterable[tuple[str, int]]:
    for plane in (*(network._servers or {}).values(), *network._clients.values()):
        if isinstance(plane, MemoryPlane):
            yield "memory streams", len(plane.served) + len(plane.opened)
            continue
        yield f"streams of {type(plane).__name__}", getattr(plane, "open_streams")  # noqa: B009  # every plane of ours has it
        if isinstance(plane, NativeClient):
            sessions = [line.session for line in plane._lines.values() if line.session is not None]
            yield "stream ids waiting for their END", sum(len(session.killed) for session in sessions)
