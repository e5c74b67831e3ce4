"""A worker of the reference with a model name and a tokenizer but no model. Arguments: model directory, seconds per step."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop
from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model  # pyright: ignore[reportMissingImports]  # only in its own environment
from dynamo.runtime import DistributedRuntime  # pyright: ignore[reportMissingImports]  # only in its own environment

from benchmarks.fixed_tokens import MODEL_NAME, FixedTokens


async def main(model: Path, step: float) -> None:
    loop = asyncio.get_running_loop()
    tokens = FixedTokens(model, step)

    async def generate(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        async for token_ids, reason in tokens.stream(request["stop_conditions"]["max_tokens"]):
            yield {"token_ids": token_ids} if reason is None else {"token_ids": token_ids, "finish_reason": reason}

    environment = os.environ
    runtime = DistributedRuntime(
        loop, environment["DYN_DISCOVERY_BACKEND"], environment["DYN_REQUEST_PLANE"], event_plane=environment["DYN_EVENT_PLANE"]
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runtime.shutdown)
    endpoint = runtime.endpoint("dynamo.backend.generate")
    await register_model(
        ModelInput.Tokens,
        ModelType.Chat | ModelType.Completions,
        endpoint,
        str(model),
        MODEL_NAME,
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=16,
        runtime_config=ModelRuntimeConfig(),
    )
    await endpoint.serve_endpoint(generate)


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), float(sys.argv[2])))
