"""A worker of the reference whose status server is asked; run with the reference's own interpreter."""

import json
import os
import sys

import uvloop
from dynamo.runtime import dynamo_worker
from status_handler import CANARY, Patient


@dynamo_worker()
async def main(runtime):
    patient = Patient(runtime.set_health_status)
    for name, callback in patient.routes().items():
        runtime.register_engine_route(name, callback)

    async def generate(request, context):
        async for item in patient.generate(request):
            yield item

    print(json.dumps({"ready": True}), flush=True)
    payload = CANARY if os.environ["PEER_PAYLOAD"] else None
    await runtime.endpoint("demo.backend.generate").serve_endpoint(generate, health_check_payload=payload)


if __name__ == "__main__":
    sys.stdin.close()
    uvloop.run(main())
