"""A process that registers one endpoint in a directory, says `ready`, and lives until it is told otherwise.

Usage: discovery_owner.py ROOT TTL INSTANCE MODE — `serve` waits, `block` blocks its event loop, `abandon` leaves its loop
without closing anything, once it has read a line.
"""

import asyncio
import sys
import time
from random import Random

from stator.discovery import FileDiscoveryConfig, open_file
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record


async def main(root: str, ttl: float, instance: int, mode: str) -> None:
    discovery = open_file(FileDiscoveryConfig(root=root, ttl=ttl), clock=SystemClock(), random=Random())
    await discovery.__aenter__()
    await discovery.register(endpoint_record(instance))
    print("ready", flush=True)
    if mode == "block":
        time.sleep(600)
    elif mode == "serve":
        await asyncio.sleep(600)
    else:
        await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
    time.sleep(600)
