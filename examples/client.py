"""A client: finds the workers of an endpoint and streams from one of them."""

import stator


async def main() -> None:
    async with stator.Runtime.connect() as runtime:
        client = await runtime.endpoint("demo.backend.generate").client(policy="round_robin")
        await client.wait_for_instances(timeout=10)
        async with client.generate({"prompt": "hello from the other process"}) as stream:
            async for item in stream:
                print(item["text"])


if __name__ == "__main__":
    stator.run(main())
