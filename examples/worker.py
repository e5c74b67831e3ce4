"""A worker: puts an async generator on the network. Run it, then `client.py` in another terminal."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import stator


async def generate(request: dict[str, Any], context: stator.Context) -> AsyncIterator[dict[str, str]]:
    for word in request["prompt"].split():
        if context.is_stopped:
            return
        yield {"text": word}
        await asyncio.sleep(0.05)


async def main() -> None:
    async with stator.Runtime.connect() as runtime:
        await runtime.endpoint("demo.backend.generate").serve(generate)


if __name__ == "__main__":
    stator.run(main())
