"""Prototype of the native plane, worker side: what is reachable, not how to write it. Prints its port."""

import asyncio
import json
import struct
from typing import Any

import msgspec
import uvloop

from benchmarks.handler import generate

HEADER = struct.Struct(">IIB")
"""Bytes that follow, stream id, kind (0 item, 1 end)."""
ITEM, END = 0, 1

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder().decode


class WorkerConnection(asyncio.Protocol):
    """Frames of one loop tick leave in one write."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: Any = None
        self.buffer = b""
        self.out: list[bytes] = []
        self.scheduled = False
        self.resumed: asyncio.Future[None] | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def pause_writing(self) -> None:
        self.resumed = self.loop.create_future()

    def resume_writing(self) -> None:
        if self.resumed is not None:
            self.resumed.set_result(None)
            self.resumed = None

    def flush(self) -> None:
        self.scheduled = False
        self.transport.write(b"".join(self.out))
        self.out.clear()

    def schedule(self) -> None:
        if not self.scheduled:
            self.scheduled = True
            self.loop.call_soon(self.flush)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while len(self.buffer) >= 4:
            size = int.from_bytes(self.buffer[:4], "big")
            if len(self.buffer) < 4 + size:
                break
            request = decode(self.buffer[4 : 4 + size])
            self.buffer = self.buffer[4 + size :]
            task = self.loop.create_task(self.serve(request))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def serve(self, request: dict[str, Any]) -> None:
        stream, out, pack, sent = request["id"], self.out, HEADER.pack, 0
        async for item in generate(request["body"]):
            payload = encode(item)
            out.append(pack(len(payload) + 5, stream, ITEM) + payload)
            self.schedule()
            sent += 1
            if sent & 63 == 0:
                await asyncio.sleep(0)
                if self.resumed is not None:
                    await self.resumed
        out.append(pack(5, stream, END))
        self.schedule()


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(WorkerConnection, "127.0.0.1", 0)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
