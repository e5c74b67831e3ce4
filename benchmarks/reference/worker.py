"""The handler of the measures, served by the reference."""

from typing import Any

import uvloop
from dynamo.runtime import dynamo_worker  # pyright: ignore[reportMissingImports]  # only in its own environment

from benchmarks.handler import ENDPOINT, generate


@dynamo_worker()
async def main(runtime: Any) -> None:
    await runtime.endpoint(ENDPOINT).serve_endpoint(generate)


if __name__ == "__main__":
    uvloop.run(main())  # pyright: ignore[reportCallIssue]  # the decorator passes the runtime
