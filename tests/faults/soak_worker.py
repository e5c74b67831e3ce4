"""A worker process that paces numbered items. Usage: soak_worker.py '{"setting": value, …}'

Says `{"id": …}` when it is listed, then serves until SIGTERM. A request is `{"do": …}`, see `generate`.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from stator import Context, Runtime, run
from stator.testing.cluster import ENDPOINT, held_by


class Paced:
    """The handler, and what it has made so far."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._made: dict[str, int] = {}
        self._finish = asyncio.Event()

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        match request["do"]:
            case "count":
                async for item in self._count(request["name"], request["weight"], request["pause"]):
                    yield item
            case "finish":  # every stream ends with its next item
                self._finish.set()
                yield True
            case "facts":
                yield {
                    "made": self._made,
                    "resident": resident(),
                    "held": sum(held_by(self._runtime).values()),  # by this question too
                }
            case unknown:
                raise ValueError(f"no such behaviour: {unknown}")

    async def _count(self, name: str, weight: int, pause: float) -> AsyncIterator[Any]:
        loop = asyncio.get_running_loop()
        padding = "x" * weight
        due = loop.time()
        number = 0
        while not self._finish.is_set():
            self._made[name] = number + 1
            yield [number, padding]
            number += 1
            due = max(due + pause, loop.time())  # who was held up does not hurry afterwards
            await asyncio.sleep(due - loop.time())


def resident() -> int:
    """Bytes of memory this process has in use."""
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def main(settings: dict[str, Any]) -> None:
    async with Runtime.connect(**settings) as runtime, runtime.endpoint(ENDPOINT).serving(Paced(runtime)):
        print(json.dumps({"id": runtime.instance_id}), flush=True)
        await runtime.wait_for_shutdown()


if __name__ == "__main__":
    run(main(json.loads(sys.argv[1])))
