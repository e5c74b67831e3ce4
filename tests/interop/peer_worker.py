"""A worker of the reference, for the interop tests; run with the reference's own interpreter. Serves demo.backend.generate."""

import asyncio
import json
import sys

import uvloop
from dynamo.runtime import dynamo_worker
from peer_serving import one_by_one

ended = []


async def generate(request, context):
    mode = request["mode"]
    if mode == "journal":
        yield [seen for seen in ended if seen["id"] == request["of"]]
        return
    seen = {"id": context.id(), "mode": mode, "items": 0, "end": "complete"}
    try:
        async for item in items(mode, request, context):
            yield item
            seen["items"] += 1
    except BaseException as error:
        seen["end"] = type(error).__name__
        raise
    finally:
        seen["stopped"], seen["killed"] = context.is_stopped(), context.is_killed()
        ended.append(seen)


async def items(mode, request, context):
    if mode == "count":
        for number in range(request["n"]):
            yield {"token_ids": [number], "text": "tok"}
    elif mode == "echo":
        yield request["value"]
    elif mode == "big":
        yield "x" * request["n"]
    elif mode == "facts":
        yield {
            "id": context.id(),
            "metadata": dict(context.metadata),
            "trace_id": context.trace_id,
            "parent_span_id": context.parent_span_id,
        }
    elif mode == "raise":
        for number in range(request["n"]):
            yield number
        raise ValueError("boom")
    elif mode == "unsendable":
        yield 1
        yield object()
    elif mode == "until stopped":
        number = 0
        while not context.is_stopped():
            yield number
            number += 1
            await asyncio.sleep(0.005)
    elif mode == "hold":
        yield 1
        while not context.is_stopped():
            await asyncio.sleep(0.005)


def no_generator(request, context):
    raise RuntimeError("not today")


@dynamo_worker()
async def main(runtime):
    endpoint = runtime.endpoint("demo.backend.generate")
    broken = runtime.endpoint("demo.backend.broken")
    print(json.dumps({"ready": True}), flush=True)
    await one_by_one(lambda: endpoint.serve_endpoint(generate), lambda: broken.serve_endpoint(no_generator))


if __name__ == "__main__":
    sys.stdin.close()
    uvloop.run(main())
