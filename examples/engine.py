"""An engine of your own behind the OpenAI API: it answers with the prompt backwards.

Run it, run `stator frontend --port 8000` beside it, and ask for the model "backwards".
"""

import asyncio
from collections.abc import AsyncIterator

import stator
from stator.llm.card import byte_card
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.worker import EngineConfig, LLMEngine, Worker, WorkerConfig


class Backwards(LLMEngine):
    """Needs no model: the built-in byte tokenizer turns text into ids and back."""

    async def start(self, instance_id: int) -> EngineConfig:
        return EngineConfig(model="backwards", card=await asyncio.to_thread(byte_card, "backwards"))

    async def generate(self, request: PreprocessedRequest, context: stator.Context) -> AsyncIterator[EngineOutput]:
        for token in reversed(request.token_ids):
            if context.is_stopped:
                break
            yield EngineOutput(token_ids=[token])
        yield EngineOutput(token_ids=[], finish_reason="stop")


async def main() -> None:
    async with stator.Runtime.connect() as runtime:
        worker = Worker(Backwards(), runtime, config=WorkerConfig(component="backwards", grace_period=0))
        async with asyncio.TaskGroup() as group:
            group.create_task(worker.run())
            await runtime.wait_for_shutdown()
            worker.shutdown()


if __name__ == "__main__":
    stator.run(main())
