"""A worker of Stator with a model name and a tokenizer but no model. Arguments: model directory, seconds per step."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import stator
from benchmarks.fixed_tokens import MODEL_NAME, FixedTokens
from stator import settings
from stator.llm.card import card_from_directory
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.telemetry import LogConfig, configure_logging
from stator.worker import EngineConfig, LLMEngine, Worker, WorkerConfig


class FixedTokensEngine(LLMEngine):
    """An engine without a model."""

    def __init__(self, model: Path, step: float) -> None:
        self._model = model
        self._tokens = FixedTokens(model, step)

    async def start(self, instance_id: int) -> EngineConfig:
        return EngineConfig(model=MODEL_NAME, card=card_from_directory(self._model), served_name=MODEL_NAME)

    async def generate(self, request: PreprocessedRequest, context: object) -> AsyncIterator[EngineOutput]:
        async for token_ids, reason in self._tokens.stream(request.stop_conditions.max_tokens or 0):
            yield EngineOutput(token_ids=token_ids, finish_reason=reason)


async def main(model: Path, step: float) -> None:
    async with stator.Runtime.connect() as runtime:
        worker = Worker(FixedTokensEngine(model, step), runtime, config=WorkerConfig(grace_period=0.0))
        async with asyncio.TaskGroup() as group:
            group.create_task(worker.run())
            await runtime.wait_for_shutdown()
            worker.shutdown()


if __name__ == "__main__":
    configure_logging(settings.load(LogConfig))
    stator.run(main(Path(sys.argv[1]), float(sys.argv[2])))
