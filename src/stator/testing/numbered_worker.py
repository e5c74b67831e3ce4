"""A worker process that counts. Usage: `python -m stator.testing.numbered_worker '{"setting": value, …}'`

Serves `stator.testing.cluster.ENDPOINT` until SIGTERM and says `{"id": …}` when it is listed. A request `{"n": 100, "pause": 0.005}` is
answered by the numbers 0 to 99, one every 5 ms. Every 50 ms it publishes an event with its instance id on `PULSE`.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from stator import Context, Runtime, run
from stator.events import Channel
from stator.tasks import Scope
from stator.testing.cluster import ENDPOINT

__all__ = ["PULSE"]

PULSE = Channel(namespace="test", topic="pulse")
"""what every worker publishes on"""

_BEAT = 0.05


async def _count(request: Any, context: Context) -> AsyncIterator[int]:
    loop = asyncio.get_running_loop()
    due = loop.time()
    for number in range(request["n"]):
        yield number
        due += request["pause"]
        if due > loop.time():
            await asyncio.sleep(due - loop.time())


async def _publish(runtime: Runtime) -> None:
    payload = json.dumps(runtime.instance_id).encode()
    async with await runtime.events.publisher(PULSE) as publisher:
        while True:
            publisher.publish(payload)
            await asyncio.sleep(_BEAT)


async def _main(settings: dict[str, Any]) -> None:
    async with (
        Runtime.connect(**settings) as runtime,
        Scope("numbered worker") as scope,
        runtime.endpoint(ENDPOINT).serving(_count),
    ):
        scope.spawn(_publish(runtime), name="pulse")
        sys.stdout.write(json.dumps({"id": runtime.instance_id}) + "\n")
        sys.stdout.flush()
        await runtime.wait_for_shutdown()


if __name__ == "__main__":
    run(_main(json.loads(sys.argv[1])))
