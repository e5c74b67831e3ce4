"""Operators around an engine: change the request on the way in and the items on the way out, then serve the whole."""

from collections.abc import AsyncIterator

import stator


class Shout:
    """An operator: takes the request before the engine and every item after it."""

    async def generate(self, request: str, next: stator.Engine, context: stator.Context) -> AsyncIterator[str]:
        async for item in next.generate(request.strip(), context):
            yield item.upper()


class Twice:
    """An operator may call what comes next more than once."""

    async def generate(self, request: str, next: stator.Engine, context: stator.Context) -> AsyncIterator[str]:
        for _ in range(2):
            async for item in next.generate(request, context):
                yield item


class Words:
    """An engine."""

    async def generate(self, request: str, context: stator.Context) -> AsyncIterator[str]:
        for word in request.split():
            yield word


async def main() -> None:
    async with stator.Runtime.connect(discovery="memory", plane="memory") as runtime:  # all of it in this process
        endpoint = runtime.endpoint("demo.pipeline.generate")
        async with endpoint.serving(stator.pipeline(Shout(), Twice(), Words())):
            client = await endpoint.client()
            async with client.generate("  two stages ") as stream:
                print(await stream.collect())


if __name__ == "__main__":
    stator.run(main())
