"""The floor, worker side: a TCP exchange of the bytes the native prototype would send, made in advance. Prints its port.

A request is 120 bytes and begins with two numbers: how many items, and how many streams. `streams` = 0 asks for the items at
once (what `fast` does); otherwise every scheduler step brings one item to each of them in one write (what `paced` does), and an
answer with no items is this process's CPU seconds. Nothing is encoded, decoded, scheduled or checked here.
"""

import asyncio
import functools
import json
import struct
import time
from typing import Any

import msgspec
import uvloop

from benchmarks.handler import expected_items
from benchmarks.prototypes.native_worker import END, HEADER, ITEM
from benchmarks.steps import STEP

REQUEST_BYTES = 120
REQUEST = struct.Struct(">II")
CPU = struct.Struct(">d")


@functools.cache
def frames(items: int) -> list[bytes]:
    """The frames of an answer of `items` items: one per item, then the end."""
    payloads = [msgspec.json.encode(item) for item in expected_items(items)]
    return [*(HEADER.pack(len(p) + 5, 1, ITEM) + p for p in payloads), HEADER.pack(5, 1, END)]


@functools.cache
def answer(items: int) -> bytes:
    """The whole answer of a fast stream."""
    return b"".join(frames(items))


@functools.cache
def steps(items: int, streams: int) -> list[bytes]:
    """One entry per scheduler step: the frames of all streams."""
    return [frame * streams for frame in frames(items)]


class FloorWorker(asyncio.Protocol):
    """Answers requests of a fixed size."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.buffer = b""
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        data = self.buffer + data if self.buffer else data
        whole = len(data) - len(data) % REQUEST_BYTES
        replies = [self.reply(*REQUEST.unpack_from(data, at)) for at in range(0, whole, REQUEST_BYTES)]
        self.buffer = data[whole:]
        self.transport.write(b"".join(replies))

    def reply(self, items: int, streams: int) -> bytes:
        if items == 0:
            return CPU.pack(time.process_time())
        if streams == 0:
            return answer(items)
        self.task = asyncio.get_running_loop().create_task(self.pace(steps(items, streams)))
        return b""

    async def pace(self, writes: list[bytes]) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        for data in writes:
            due = max(due + STEP, loop.time())
            await asyncio.sleep(due - loop.time())
            self.transport.write(data)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(FloorWorker, "127.0.0.1", 0)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
