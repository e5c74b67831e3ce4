"""A worker process that is drained, restarted and asked about itself. Usage: served_worker.py '{"setting": value, …}'

Says `{"id": …, "status": …}` when it is listed, logs to stderr, serves until SIGTERM. A request is `{"do": …}`, see `generate`; one with
a `tag` is noted in the file that the setting `journal` names, once for each call of the handler.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from stator import Context, Runtime, run
from stator.testing.cluster import ENDPOINT

CANARY = {"do": "canary"}


class Handler:
    """What is served."""

    def __init__(self, runtime: Runtime, journal: str) -> None:
        self._runtime = runtime
        self._journal = Path(journal).open("a", buffering=1) if journal else None  # noqa: SIM115 - lives as long as the process
        self._sick = asyncio.Event()

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        if self._journal is not None and "tag" in request:
            self._journal.write(f"{request['tag']}\n")
        match request["do"]:
            case "who":
                yield self._runtime.instance_id
            case "numbers":
                for number in range(request["n"]):
                    yield number
                    await asyncio.sleep(request["pause"])
            case "block":
                yield "blocking"
                await asyncio.sleep(0.05)
                time.sleep(request["seconds"])
                yield "done"
            case "canary":
                while self._sick.is_set():
                    await asyncio.sleep(0.01)
                yield "fine"
            case unknown:
                raise ValueError(f"no such behaviour: {unknown}")

    async def fall_sick(self, body: Any) -> dict[str, Any]:
        """An engine route: canaries are not answered from now on."""
        self._sick.set()
        return {"sick": True, "told": body}

    async def recover(self, body: Any) -> dict[str, Any]:
        """An engine route: they are again."""
        self._sick.clear()
        return {"sick": False, "told": body}

    async def fail(self, body: Any) -> None:
        """An engine route that raises."""
        raise ValueError("nope")


async def main(settings: dict[str, Any]) -> None:
    journal, canary = settings.pop("journal", ""), settings.pop("canary", False)
    async with Runtime.connect(**settings) as runtime:
        handler = Handler(runtime, journal)
        for name, callback in (("sick", handler.fall_sick), ("control/recover", handler.recover), ("fail", handler.fail)):
            runtime.engine_routes.register(name, callback)
        async with runtime.endpoint(ENDPOINT).serving(handler, canary_payload=CANARY if canary else None) as served:

            async def sleep(body: Any) -> dict[str, Any]:
                await served.unregister()
                return {"listed": served.listed}

            async def wake(body: Any) -> dict[str, Any]:
                await served.register()
                return {"listed": served.listed}

            runtime.engine_routes.register("sleep", sleep)
            runtime.engine_routes.register("wake", wake)
            print(json.dumps({"id": runtime.instance_id, "status": runtime.status_url}), flush=True)
            await runtime.wait_for_shutdown()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    run(main(json.loads(sys.argv[1])))
