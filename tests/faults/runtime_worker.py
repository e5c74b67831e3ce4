"""A worker process for fault tests. Usage: runtime_worker.py '{"setting": value, …}'

Says `{"id": …, "pid": …}` when it is listed, then serves until SIGTERM. A request is `{"do": …}`, see `generate`.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from stator import Context, Runtime, run
from stator.testing.cluster import ENDPOINT, held_by, open_files, tasks_now


class Worker:
    """The handler and what it knows of itself."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._running = 0

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self._running += 1
        try:
            async for item in self._answer(request):
                yield item
        finally:
            self._running -= 1

    async def _answer(self, request: Any) -> AsyncIterator[Any]:
        match request["do"]:
            case "who":
                yield self._runtime.instance_id
            case "count":  # number after number
                number = 0
                while True:
                    yield number
                    number += 1
                    await asyncio.sleep(request.get("pause", 0.02))
            case "wait":
                await asyncio.Event().wait()
            case "block":  # nothing of this process runs meanwhile but its threads
                yield "blocking"
                await asyncio.sleep(0.1)
                if request["how"] == "sleep":
                    time.sleep(request["seconds"])
                else:
                    end = time.monotonic() + request["seconds"]
                    while time.monotonic() < end:
                        pass
                yield "done"
            case "facts":
                yield {
                    "running": self._running - 1,
                    "tasks": len(tasks_now()),
                    "files": len(open_files()),
                    "held": sum(held_by(self._runtime).values()),
                }
            case unknown:
                raise ValueError(f"no such behaviour: {unknown}")


async def main(settings: dict[str, Any]) -> None:
    async with Runtime.connect(**settings) as runtime, runtime.endpoint(ENDPOINT).serving(Worker(runtime)):
        print(json.dumps({"id": runtime.instance_id, "pid": os.getpid()}), flush=True)
        await runtime.wait_for_shutdown()


if __name__ == "__main__":
    run(main(json.loads(sys.argv[1])))
