"""A worker of the reference whose page is read; run with the reference's own interpreter."""

import json
import sys

import uvloop
from dynamo.runtime import dynamo_worker
from peer_serving import one_by_one
from scraped_handler import conversation, items


async def generate(request, context):
    async for item in items(request, context.is_stopped):
        yield item


async def converse(inputs, context):
    async for item in conversation(inputs):
        yield item


def broken(request, context):
    raise RuntimeError("not today")


@dynamo_worker()
async def main(runtime):
    print(json.dumps({"ready": True}), flush=True)
    await one_by_one(
        lambda: runtime.endpoint("demo.backend.generate").serve_endpoint(generate, metrics_labels=[("model", "tiny")]),
        lambda: runtime.endpoint("demo.backend.broken").serve_endpoint(broken),
        lambda: runtime.endpoint("demo.backend.converse").serve_bidirectional_endpoint(converse),
    )


if __name__ == "__main__":
    sys.stdin.close()
    uvloop.run(main())
