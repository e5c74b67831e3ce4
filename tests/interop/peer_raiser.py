"""A worker of the reference whose handler raises what it is asked for; run with the reference's own interpreter."""

import asyncio
import builtins
import json
import os
import sys

import uvloop
from dynamo import _core
from dynamo.llm.exceptions import HttpError
from dynamo.runtime import dynamo_worker

GIVEN = {"HttpError": lambda text: HttpError(422, text), "AsyncioCancelledError": asyncio.CancelledError}


async def generate(request, context):
    for number in range(request["first"]):
        yield number
    name = request["raise"]
    kind = GIVEN.get(name) or getattr(_core, name, None) or getattr(builtins, name)
    raise kind(request["text"]) if name != "GeneratorExit" else GeneratorExit()


@dynamo_worker()
async def main(runtime):
    print(json.dumps({"ready": True}), flush=True)
    name = os.environ.get("PEER_ENDPOINT", "generate")
    await runtime.endpoint(f"demo.backend.{name}").serve_endpoint(generate)


if __name__ == "__main__":
    sys.stdin.close()
    uvloop.run(main())
