"""The reference's publishers and its one subscriber of events, for the interop tests; run with the reference's own interpreter.

Commands are lines of JSON. `load` and `blocks` publish, `received` tells the payloads of topic `forward-pass-metrics` heard so far.
"""

import asyncio
import json
import sys
import threading

import uvloop
from dynamo.llm import FpmEventSubscriber, KvEventPublisher, WorkerMetricsPublisher
from dynamo.runtime import dynamo_worker

BLOCK = 4
heard = []


def listen(endpoint):
    subscriber = FpmEventSubscriber(endpoint)
    while (payload := subscriber.recv()) is not None:
        heard.append(bytes(payload).hex())


def say(**answer):
    print(json.dumps(answer), flush=True)


@dynamo_worker()
async def main(runtime):
    endpoint = runtime.endpoint("events.backend.generate")
    load = WorkerMetricsPublisher()
    await load.create_endpoint(endpoint)
    blocks = KvEventPublisher(endpoint, worker_id=77, kv_block_size=BLOCK, enable_local_indexer=True)
    threading.Thread(target=listen, args=(endpoint,), daemon=True).start()
    reader = asyncio.StreamReader(limit=2**26)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    say(ready=True)
    while line := await reader.readline():
        command = json.loads(line)
        if command["do"] == "load":
            load.publish(command["rank"], active_decode_blocks=command["blocks"])
        elif command["do"] == "blocks":
            tokens = list(range(BLOCK * len(command["hashes"])))
            blocks.publish_stored(tokens, [BLOCK] * len(command["hashes"]), command["hashes"])
        say(tag=command["tag"], heard=heard)
    runtime.shutdown()


if __name__ == "__main__":
    uvloop.run(main())
