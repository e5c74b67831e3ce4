"""The native plane on real sockets: a worker with one handler and its caller, and peers that speak bytes of the test's choice."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import msgspec

from stator.errors import ConnectFailed
from stator.protocol.native.frames import CRITICAL, HELLO, FrameReader, frame
from stator.protocol.native.hello import Hello
from stator.protocol.records import EndpointRecord, NativeAddress, Transport
from stator.runtime.engine import Handler
from stator.tasks import DeadlineWheel
from stator.testing.native_pair import CLIENT_PROCESS, WORKER_PROCESS, Frame
from stator.testing.plane_pair import paired, plane_host
from stator.testing.plane_suite import INSTANCE, Caller, PlanePair
from stator.transports.native import NativeClient, NativeConfig, NativeServer
from stator.transports.plane import InstanceObserver, PlaneHost

__all__ = [
    "RawListener",
    "RawPeer",
    "Recorder",
    "native_address",
    "native_caller",
    "native_planes",
    "native_record",
    "plane_host",
    "raw_listener",
    "with_native",
]


class Recorder:
    """An `InstanceObserver` that keeps what it is told, as `(what, instance)`."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def suspect(self, instance: int) -> None:
        self.told.append(("suspect", instance))

    def recovered(self, instance: int) -> None:
        self.told.append(("recovered", instance))

    def lost(self, instance: int, reason: str) -> None:
        self.told.append(("lost", instance))

    def draining(self, instance: int) -> None:
        self.told.append(("draining", instance))


@asynccontextmanager
async def native_planes(
    config: NativeConfig, here: PlaneHost, there: PlaneHost, *, client_config: NativeConfig | None = None
) -> AsyncGenerator[PlanePair, None]:
    """A worker's plane and a client's."""
    server = await NativeServer.listen(config, here)
    client = await NativeClient.start(client_config or config, there)

    def cut() -> None:
        for line in tuple(client._all):  # pyright: ignore[reportPrivateUsage] (no plane offers to break its network)
            line.connection.abort(ConnectFailed("cut by the test"))

    async with paired(server, client, cut=cut) as pair:
        yield pair


@asynccontextmanager
async def native_caller(
    handler: Handler,
    *,
    config: NativeConfig | None = None,
    client_config: NativeConfig | None = None,
    directory: Path | None = None,
    observer: InstanceObserver | None = None,
) -> AsyncGenerator[Caller, None]:
    """A worker that serves `handler` and a client of it, in one loop; the Unix socket is used if `directory` is given."""
    config = config or NativeConfig()
    here, there = plane_host(directory=directory), plane_host(CLIENT_PROCESS, observer=observer)
    wheel = DeadlineWheel(asyncio.get_running_loop(), resolution=0.02)
    try:
        async with native_planes(config, here, there, client_config=client_config) as pair:
            yield Caller(pair, wheel, handler, "generate")
    finally:
        wheel.close()


def native_record(address: str, *, process: str = WORKER_PROCESS, path: str = "", pulse: str = "") -> EndpointRecord:
    """The record of an instance that is said to be at `address`."""
    return EndpointRecord(
        component="backend",
        endpoint="generate",
        namespace="test",
        instance_id=INSTANCE,
        transport=Transport(tcp="127.0.0.1:1/x"),
        stator=NativeAddress(plane=1, address=address, process=process, path=path, pulse=pulse),
    )


def native_address(record: EndpointRecord) -> NativeAddress:
    """The `stator` field of a record that has one."""
    assert isinstance(record.stator, NativeAddress)
    return record.stator


def with_native(record: EndpointRecord, **changes: Any) -> EndpointRecord:
    """The record with another `stator` field."""
    return msgspec.structs.replace(record, stator=msgspec.structs.replace(native_address(record), **changes))


class RawPeer:
    """One end of a connection, in the hand of the test. Waits are bounded by five seconds unless said otherwise."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.frames: list[Frame] = []
        """what the other side has said so far"""
        self._cutter = FrameReader()

    @classmethod
    async def connect(cls, address: str) -> "RawPeer":
        """Dial `host:port`, or a Unix socket's path."""
        if address.startswith("/"):
            return cls(*await asyncio.open_unix_connection(address))
        host, _, port = address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def say(self, *frames: bytes) -> None:
        """Write, and wait until the kernel has taken nearly all of it."""
        self.writer.write(b"".join(frames))
        await self.writer.drain()

    async def greet(self, role: str = "client", *, process: str = CLIENT_PROCESS) -> None:
        """Say HELLO and wait for the other side's."""
        hello = Hello(process=process, role="client" if role == "client" else "worker")
        await self.say(frame(HELLO, payload=hello.encode(), flags=CRITICAL))
        await self.until(HELLO)

    async def until(self, kind: int, *, within: float = 5.0) -> Frame:
        """The first frame of `kind`, heard already or not; `ConnectionError` when the connection ends before it."""
        async with asyncio.timeout(within):
            while True:
                for each in self.frames:
                    if each.kind == kind:
                        return each
                if not await self._hear():
                    raise ConnectionError(f"the connection ended before a frame of kind {kind}")

    async def until_closed(self, *, within: float = 5.0) -> list[Frame]:
        """Everything the other side says until it closes."""
        async with asyncio.timeout(within):
            while await self._hear():
                pass
        return self.frames

    async def _hear(self) -> bool:
        try:
            data = await self.reader.read(65536)
        except ConnectionError:
            return False
        self.frames.extend(Frame(*fields) for fields in self._cutter.feed(data))
        return bool(data)


class RawListener:
    """Where a worker should be: connections are handed to the test."""

    def __init__(self) -> None:
        self.address = ""
        self._accepted: asyncio.Queue[RawPeer] = asyncio.Queue()
        self.count = 0
        """connections accepted so far"""

    def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection came."""
        self.count += 1
        self._accepted.put_nowait(RawPeer(reader, writer))

    async def accepted(self, *, within: float = 5.0) -> RawPeer:
        """The next connection."""
        async with asyncio.timeout(within):
            return await self._accepted.get()

    async def close_accepted(self) -> None:
        """Connections nobody asked for."""
        while not self._accepted.empty():
            async with self._accepted.get_nowait():
                pass


@asynccontextmanager
async def raw_listener(path: str | None = None) -> AsyncGenerator[RawListener, None]:
    """Listen on a free port of the loopback interface, or on a Unix socket at `path`."""
    listener = RawListener()
    if path is None:
        server = await asyncio.start_server(listener.take, "127.0.0.1", 0)
        listener.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    else:
        server = await asyncio.start_unix_server(listener.take, path)
        listener.address = path
    try:
        yield listener
    finally:
        server.close()
        await listener.close_accepted()
