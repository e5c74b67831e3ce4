"""A worker with Dynamo's Python names: only the imports say that it runs on Stator. Run it, then `dynamo_client.py` in another terminal."""

import asyncio
from collections.abc import AsyncIterator

from stator.dynamo.runtime import Context, DistributedRuntime, dynamo_worker


async def generate(request: dict[str, str], context: Context) -> AsyncIterator[dict[str, str]]:
    for word in request["prompt"].split():
        if context.is_stopped():
            return
        yield {"text": word, "asked by": context.metadata.get("caller", "nobody")}
        await asyncio.sleep(0.05)


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    await runtime.endpoint("demo.backend.generate").serve_endpoint(generate, metrics_labels=[("model", "words")])


if __name__ == "__main__":
    asyncio.run(main())
