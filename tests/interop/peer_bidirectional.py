"""A worker of the reference with bidirectional endpoints; run with the reference's own interpreter. Serves demo.backend.converse."""

import asyncio
import json
import sys

import uvloop
from dynamo.runtime import dynamo_worker
from peer_serving import one_by_one

ended = []


async def converse(inputs, context):
    seen = {"id": context.id(), "metadata": dict(context.metadata), "inputs": 0, "end": "complete"}
    try:
        async for item in inputs:
            seen["inputs"] += 1
            mode = item.get("mode", "echo") if isinstance(item, dict) else "echo"
            if mode == "total":
                total = 0
                async for number in inputs:
                    seen["inputs"] += 1
                    total += number
                yield {"total": total}
            elif mode == "leave":
                yield "enough"
                return
            elif mode == "raise":
                raise ValueError("boom")
            elif mode == "hold":
                yield "holding"
                while not context.is_stopped():
                    await asyncio.sleep(0.005)
            elif mode == "ignore":
                for number in range(item["n"]):
                    yield number
                    await asyncio.sleep(0.005)
                return
            else:
                yield {"echo": item, "n": seen["inputs"]}
        yield "bye"
    except BaseException as error:
        seen["end"] = type(error).__name__
        raise
    finally:
        seen["stopped"], seen["killed"] = context.is_stopped(), context.is_killed()
        ended.append(seen)


async def journal(request, context):
    yield [seen for seen in ended if seen["id"] == request["of"]]


@dynamo_worker()
async def main(runtime):
    converse_endpoint = runtime.endpoint("demo.backend.converse")
    journal_endpoint = runtime.endpoint("demo.backend.journal")
    print(json.dumps({"ready": True}), flush=True)
    await one_by_one(
        lambda: converse_endpoint.serve_bidirectional_endpoint(converse),
        lambda: journal_endpoint.serve_endpoint(journal),
    )


if __name__ == "__main__":
    sys.stdin.close()
    uvloop.run(main())
