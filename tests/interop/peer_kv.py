"""KV events of the reference, for the interop tests; run with the reference's own interpreter.

KV_ROLE=router: a router of kv.backend.generate, asked what it knows of caches; KV_ROLE=publisher: told what to publish,
KV_OPTIONS are arguments of the publisher.
"""

import asyncio
import json
import os
import sys

import uvloop
from dynamo.llm import KvEventPublisher, KvRouter, KvRouterConfig
from dynamo.runtime import dynamo_worker

BLOCK = 4


async def lines():
    """Commands, one JSON object each."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)


def say(**answer):
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def ask_router(router, command):
    if command["do"] == "overlap":
        scores = await router.get_overlap_scores(command["tokens"], lora_name=command.get("lora"))
        return {"scores": scores}
    if command["do"] == "best":
        return {"best": list(await router.best_worker(command["tokens"]))}
    return {"events": json.loads(await router.dump_events())}


async def be_router(endpoint):
    router = KvRouter(endpoint, BLOCK, KvRouterConfig())
    say(ready=True)
    async for command in lines():
        try:
            say(tag=command["tag"], **await ask_router(router, command))
        except Exception as error:  # told to the test
            say(tag=command["tag"], error=f"{type(error).__name__}: {error}")


async def generate(request, context):
    yield {"token_ids": [1], "finish_reason": "stop"}


async def be_publisher(endpoint):
    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate))
    publisher = KvEventPublisher(
        endpoint,
        worker_id=77,
        kv_block_size=BLOCK,
        dp_rank=3,
        enable_local_indexer=True,
        **json.loads(os.environ["KV_OPTIONS"]),
    )
    say(ready=True)
    async for command in lines():
        if command["do"] == "store":
            publisher.publish_stored(
                command["tokens"],
                [BLOCK] * len(command["hashes"]),
                command["hashes"],
                command.get("parent"),
                lora_name=command.get("lora"),
            )
        else:
            publisher.publish_removed(command["hashes"])
        say(tag=command["tag"])
    serving.cancel()


@dynamo_worker()
async def main(runtime):
    endpoint = runtime.endpoint("kv.backend.generate")
    await (be_router if os.environ["KV_ROLE"] == "router" else be_publisher)(endpoint)


if __name__ == "__main__":
    uvloop.run(main())
