"""The floor, client side: counts and compares bytes, decodes nothing. Argument: the worker's port."""

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

import uvloop

from benchmarks.measures import WrongAnswer, obey, paced_result, throughput_result
from benchmarks.prototypes.floor_worker import CPU, REQUEST, REQUEST_BYTES, answer, steps


class FloorClient(asyncio.Protocol):
    """Hands received bytes to whatever measure is running."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.receive: Callable[[bytes], None] = _refuse

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.receive(data)

    def request(self, items: int, *, streams: int = 0) -> None:
        self.transport.write(REQUEST.pack(items, streams).ljust(REQUEST_BYTES, b"x"))

    async def throughput(self, *, items: int, concurrency: int, seconds: float, warmup: float) -> dict[str, float]:
        await _Exchange(self, items, concurrency).run(warmup)
        exchange = _Exchange(self, items, concurrency)
        elapsed = await exchange.run(seconds)
        return throughput_result(exchange.latencies, elapsed, items)

    async def paced(self, *, items: int, streams: int) -> dict[str, float]:
        await self.compare(steps(max(1, items // 10), streams), items=max(1, items // 10), streams=streams)
        worker, client, began = await self.cpu(), time.process_time(), time.perf_counter()
        await self.compare(steps(items, streams), items=items, streams=streams)
        elapsed, client, worker = time.perf_counter() - began, time.process_time() - client, await self.cpu() - worker
        return paced_result([elapsed], elapsed, tokens=items * streams, worker=worker, client=client)

    async def compare(self, expected: list[bytes], **request: int) -> None:
        """Ask for paced streams and check all bytes that come."""
        if await self.read(sum(map(len, expected)), **request) != b"".join(expected):
            raise WrongAnswer("other bytes than asked for")

    async def cpu(self) -> float:
        """CPU seconds of the worker."""
        return CPU.unpack(await self.read(CPU.size, items=0))[0]

    async def read(self, size: int, **request: int) -> bytes:
        received, length = [], 0
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def receive(data: bytes) -> None:
            nonlocal length
            received.append(data)
            length += len(data)
            if length >= size and not done.done():
                done.set_result(None)

        self.receive = receive
        self.request(**request)
        await done
        return b"".join(received)


class _Exchange:
    """`concurrency` requests in flight on one connection; answers come whole and in order."""

    def __init__(self, client: FloorClient, items: int, concurrency: int) -> None:
        self.client, self.items, self.concurrency = client, items, concurrency
        self.expected = answer(items)
        self.latencies: list[float] = []
        self.begun: list[float] = []
        self.rest = b""
        self.until = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, seconds: float) -> float:
        """Start requests for `seconds`; returns the seconds until the last answer."""
        began = time.perf_counter()
        self.until = began + seconds
        self.client.receive = self.receive
        for _ in range(self.concurrency):
            self.start()
        await self.done
        return time.perf_counter() - began

    def start(self) -> None:
        self.begun.append(time.perf_counter())
        self.client.request(self.items)

    def receive(self, data: bytes) -> None:
        data = self.rest + data if self.rest else data
        size, at = len(self.expected), 0
        now = time.perf_counter()
        while len(data) - at >= size:
            if data[at : at + size] != self.expected:
                self.done.set_exception(WrongAnswer("other bytes than asked for"))
                return
            at += size
            self.latencies.append(now - self.begun[len(self.latencies)])
            if now < self.until:
                self.start()
            elif len(self.latencies) == len(self.begun):
                self.done.set_result(None)
        self.rest = data[at:]


def _refuse(data: bytes) -> None:
    raise WrongAnswer(f"{len(data)} bytes nobody asked for")


async def main(port: int) -> None:
    _, client = await asyncio.get_running_loop().create_connection(FloorClient, "127.0.0.1", port)
    await obey({"throughput": client.throughput, "paced": client.paced})


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
