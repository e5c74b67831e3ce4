"""A client with Dynamo's Python names: only the imports say that it runs on Stator."""

import asyncio

from stator.dynamo.runtime import Context, DistributedRuntime, dynamo_worker


@dynamo_worker()
async def main(runtime: DistributedRuntime) -> None:
    client = await runtime.endpoint("demo.backend.generate").client()
    await client.wait_for_instances()
    context = Context(metadata={"caller": "the example"})
    async for item in await client.round_robin({"prompt": "hello from the other process"}, context=context):
        if not item.is_error():
            print(item.data()["text"])


if __name__ == "__main__":
    asyncio.run(main())
