"""The measures, through the reference's client."""

from typing import Any

import uvloop
from dynamo.runtime import dynamo_worker  # pyright: ignore[reportMissingImports]  # only in its own environment

from benchmarks.handler import ENDPOINT
from benchmarks.measures import measures_of, obey


@dynamo_worker()
async def main(runtime: Any) -> None:
    client = await runtime.endpoint(ENDPOINT).client()
    await client.wait_for_instances()

    async def collect(body: dict[str, Any]) -> list[Any]:
        return [item async for item in await client.round_robin(body, annotated=False)]

    await obey(measures_of(collect))
    runtime.shutdown()


if __name__ == "__main__":
    uvloop.run(main())  # pyright: ignore[reportCallIssue]  # the decorator passes the runtime
