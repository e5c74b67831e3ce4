"""The measures, through Stator's client."""

from typing import Any

import stator
from benchmarks.handler import ENDPOINT
from benchmarks.measures import measures_of, obey
from stator import settings
from stator.telemetry import LogConfig, configure_logging


async def main() -> None:
    async with stator.Runtime.connect() as runtime:
        client = await runtime.endpoint(ENDPOINT).client(policy="round_robin")
        await client.wait_for_instances()

        async def collect(body: dict[str, Any]) -> list[Any]:
            async with client.generate(body) as stream:
                return [item async for item in stream]

        await obey(measures_of(collect))


if __name__ == "__main__":
    configure_logging(settings.load(LogConfig))
    stator.run(main())
