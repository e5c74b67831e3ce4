"""A thousand instances come and go within ten seconds, and every client knows it a moment after the last one."""

import asyncio
import json
import resource
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stator.discovery.etcd import EtcdConfig, EtcdDiscovery, open_etcd
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record
from stator.testing.etcd_server import etcd_server

pytestmark = [pytest.mark.load, pytest.mark.timeout(180)]

INSTANCES = 1000
OWNERS = 20
CLIENTS = 4
SPREAD = 4.0
"""seconds over which they come, and again over which they go"""

CLIENT = """
import asyncio, json, logging, resource, sys, time
from random import Random
import uvloop
from stator.discovery.etcd import EtcdConfig, open_etcd
from stator.protocol.records import Query
from stator.tasks import SystemClock

def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

async def main(url, instances):
    async with open_etcd(EtcdConfig(endpoints=(url,)), clock=SystemClock(), random=Random()) as discovery:
        async with discovery.watch(Query("v1/instances", ("demo", "backend", "generate"))) as watch:
            await anext(watch)
            print("ready", flush=True)
            cpu, rss, batches, full, most = time.process_time(), memory(), 0, 0.0, 0
            async for _ in watch:
                batches += 1
                if not full and len(watch.current) == instances:
                    full, most = time.monotonic(), memory()
                    print("full", flush=True)
                if full and not watch.current:
                    break
            print(json.dumps({"full": full, "empty": time.monotonic(), "cpu": time.process_time() - cpu,
                "before": rss, "most": most, "after": memory(), "batches": batches}), flush=True)
logging.basicConfig(level="INFO")
uvloop.run(main(sys.argv[1], int(sys.argv[2])))
"""


def discovery(url: str) -> EtcdDiscovery:
    return open_etcd(EtcdConfig(endpoints=(url,)), clock=SystemClock(), random=Random())


async def said_by(clients: list[asyncio.subprocess.Process]) -> list[bytes]:
    """The next line of each."""
    async with asyncio.timeout(30):
        return [await client.stdout.readline() for client in clients if client.stdout is not None]


async def paced(works: list[Any], seconds: float) -> None:
    """Do `works` spread evenly over `seconds`, each started in its time."""
    began = asyncio.get_running_loop().time()

    async def one(number: int) -> None:
        delay = began + seconds * number / len(works) - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, delay))
        await works[number]()

    await asyncio.gather(*map(one, range(len(works))))


def server_figures(pid: int) -> tuple[float, int]:
    """CPU seconds and resident bytes of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return (int(fields[11]) + int(fields[12])) / 100, resident * resource.getpagesize()


async def test_a_thousand_come_and_go(tmp_path: Path) -> None:
    with etcd_server(tmp_path) as etcd:
        clients = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", CLIENT, etcd.url, str(INSTANCES), stdout=asyncio.subprocess.PIPE
            )
            for _ in range(CLIENTS)
        ]
        try:
            assert await said_by(clients) == [b"ready\n"] * CLIENTS
            cpu, _ = server_figures(etcd.pid)
            async with AsyncExitStack() as stack:
                owners = [await stack.enter_async_context(discovery(etcd.url)) for _ in range(OWNERS)]
                records = [endpoint_record(n) for n in range(INSTANCES)]
                pairs = [(owners[n % OWNERS], record) for n, record in enumerate(records)]
                began = time.monotonic()
                await paced([lambda o=owner, r=record: o.register(r) for owner, record in pairs], SPREAD)
                joined = time.monotonic()
                assert await said_by(clients) == [b"full\n"] * CLIENTS
                leaving = time.monotonic()
                await paced([lambda o=owner, r=record: o.unregister(r.key) for owner, record in pairs], SPREAD)
                left = time.monotonic()
            figures = [json.loads(line) for line in await said_by(clients)]
            server_cpu, server_memory = server_figures(etcd.pid)
        finally:
            for client in clients:
                if client.returncode is None:
                    client.kill()
                await client.communicate()
    print(f"\n{INSTANCES} instances of {OWNERS} owners joined in {joined - began:.1f} s and left in {left - leaving:.1f} s")
    print("client | all known after | none left after | CPU | memory before, with all, after | batches")
    for number, one in enumerate(figures):
        sizes = ", ".join(f"{one[name] / 2**20:.1f}" for name in ("before", "most", "after"))
        print(
            f"{number} | {1000 * (one['full'] - joined):.0f} ms | {1000 * (one['empty'] - left):.0f} ms "
            f"| {one['cpu']:.2f} s | {sizes} MiB | {one['batches']}"
        )
    print(f"etcd: {server_cpu - cpu:.1f} s CPU, {server_memory / 2**20:.0f} MiB")
    assert left - began < 10
    for one in figures:
        assert one["full"] - joined < 1
        assert one["empty"] - left < 1
        assert one["after"] - one["before"] < 20 * 2**20
