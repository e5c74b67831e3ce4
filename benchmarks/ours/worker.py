"""The handler of the measures, served by Stator."""

import stator
from benchmarks.handler import ENDPOINT, generate


async def main() -> None:
    async with stator.Runtime.connect() as runtime:
        await runtime.endpoint(ENDPOINT).serve(generate)


if __name__ == "__main__":
    stator.run(main())
