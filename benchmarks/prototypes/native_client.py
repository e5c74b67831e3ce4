"""Prototype of the native plane, client side. Argument: the worker's port."""

import asyncio
import collections
import sys
from typing import Any

import msgspec
import uvloop

from benchmarks.measures import measures_of, obey
from benchmarks.prototypes.native_worker import HEADER

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder().decode


class Stream:
    """`__anext__` returns without suspending while items wait; one future per wait, none per item."""

    __slots__ = ("done", "items", "loop", "waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.items: collections.deque[Any] = collections.deque()
        self.waiter: asyncio.Future[None] | None = None
        self.done = False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        while True:
            if self.items:
                return self.items.popleft()
            if self.done:
                raise StopAsyncIteration
            self.waiter = self.loop.create_future()
            await self.waiter
            self.waiter = None


class ClientConnection(asyncio.Protocol):
    """One connection carries all streams."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: Any = None
        self.buffer = b""
        self.out: list[bytes] = []
        self.scheduled = False
        self.streams: dict[int, Stream] = {}
        self.last = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def flush(self) -> None:
        self.scheduled = False
        self.transport.write(b"".join(self.out))
        self.out.clear()

    def open(self, body: dict[str, Any]) -> Stream:
        self.last += 1
        stream = self.streams[self.last] = Stream(self.loop)
        payload = encode({"id": self.last, "body": body})
        self.out.append(len(payload).to_bytes(4, "big") + payload)
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self.flush)
        return stream

    async def collect(self, body: dict[str, Any]) -> list[Any]:
        return [item async for item in self.open(body)]

    def data_received(self, data: bytes) -> None:
        data = self.buffer + data if self.buffer else data
        position, size, unpack = 0, len(data), HEADER.unpack_from
        while size - position >= 9:
            length, number, kind = unpack(data, position)
            end = position + 4 + length
            if end > size:
                break
            stream = self.streams[number]
            if kind:
                stream.done = True
                del self.streams[number]
            else:
                stream.items.append(decode(data[position + 9 : end]))
            waiter = stream.waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
            position = end
        self.buffer = data[position:]


async def main(port: int) -> None:
    _, connection = await asyncio.get_running_loop().create_connection(ClientConnection, "127.0.0.1", port)
    await obey(measures_of(connection.collect))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
