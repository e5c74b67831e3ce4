"""A client of the reference, for the interop tests; run with the reference's own interpreter.

Reads commands as lines of JSON, answers each with a line that repeats its `tag`. A command names an endpoint, a request and how many
items to take (`drop` the stream after `take` items, or `stop` the context then).
"""

import asyncio
import hashlib
import json
import sys

import uvloop
from dynamo.runtime import Context, dynamo_worker

clients = {}


async def client_of(runtime, path):
    if path not in clients:
        clients[path] = await runtime.endpoint(path).client()
    await clients[path].wait_for_instances()
    return clients[path]


async def start(client, command, context):
    """Send the request. A new client routes nowhere for a moment, although it has seen the instance."""
    attempts = 100
    while True:
        try:
            return await client.round_robin(command["request"], annotated=False, context=context)
        except Exception as error:
            attempts -= 1
            if "No workers available" not in str(error) or not attempts:
                raise
        await asyncio.sleep(0.02)


async def call(client, command):
    context = Context(id=command.get("id"), metadata=command.get("metadata"))
    items, error = [], None
    try:
        stream = await start(client, command, context)
        async for item in stream:
            items.append(item)
            if len(items) == command.get("take"):
                if command.get("then") == "drop":
                    break
                context.stop_generating()
        if command.get("then") == "drop":
            del stream
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    text = json.dumps(items)
    if len(text) > 10_000:
        items = {"count": len(items), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return {"items": items, "error": error, "id": context.id()}


async def answer(runtime, command):
    try:
        client = await client_of(runtime, command["endpoint"])
        results = await asyncio.gather(*(call(client, command) for _ in range(command.get("times", 1))))
        result = results[0] if "times" not in command else {"results": results}
    except Exception as raised:
        result = {"error": f"{type(raised).__name__}: {raised}"}
    print(json.dumps({"tag": command["tag"], **result}), flush=True)


@dynamo_worker()
async def main(runtime):
    reader = asyncio.StreamReader(limit=2**26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps({"ready": True}), flush=True)
    running = set()
    while line := await reader.readline():
        task = asyncio.ensure_future(answer(runtime, json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)
    runtime.shutdown()


if __name__ == "__main__":
    uvloop.run(main())
