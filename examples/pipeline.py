"""Operators around an engine: change the request on the way in and the items on the way out, then serve the whole."""

from collections.abc import AsyncIterator

import stator


class Shout:
    """An operator: upper-cases what comes back."""

    async def generate(self, request: str, next: stator.Engine, context: stator.Context) -> AsyncIterator[str]:
        async for item in next.generate(request.strip(), context):
            yield item.upper()


class Words:
    """An engine."""

    async def generate(self, request: str, context: stator.Context) -> AsyncIterator[str]:
        for word in request.split():
            yield word


async def main() -> None:
    async with stator.Runtime.connect(discovery="memory", plane="memory") as runtime:
        endpoint = runtime.endpoint("demo.pipeline.generate")
        async with endpoint.serving(stator.pipeline(Shout(), Words())):
            client = await endpoint.client()
            async with client.generate("  one request through two stages ") as stream:
                print(await stream.collect())


if __name__ == "__main__":
    stator.run(main())
