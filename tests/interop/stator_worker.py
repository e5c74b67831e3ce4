"""A Stator worker in a process of its own, to be killed: `stator_worker.py DISCOVERY_ROOT ENDPOINT`."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

from stator.runtime import Context, Runtime, run


async def endless(request: Any, context: Context) -> AsyncIterator[Any]:
    """Says so on standard output when the hundredth item of a request has been taken."""
    number = 0
    while not context.is_stopped:
        yield number
        number += 1
        if number == 100:
            print(context.id, flush=True)
        await asyncio.sleep(0.002)


async def main(root: str, endpoint: str) -> None:
    async with Runtime.connect(plane="compatible", discovery="file", file__root=root) as runtime:
        await runtime.endpoint(endpoint).serve(endless)


if __name__ == "__main__":
    run(main(*sys.argv[1:]))
