"""The handler of the measures, served by Stator."""

import stator
from benchmarks.handler import ENDPOINT, generate
from stator import settings
from stator.telemetry import LogConfig, configure_logging


async def main() -> None:
    async with stator.Runtime.connect() as runtime:
        await runtime.endpoint(ENDPOINT).serve(generate)


if __name__ == "__main__":
    configure_logging(settings.load(LogConfig))
    stator.run(main())
