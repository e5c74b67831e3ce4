"""An engine of your own behind the OpenAI API: it answers with the prompt backwards.

    stator serve --engine engine_class:Backwards --option pause=0.05

in this directory; clients ask for the model "backwards". `engine_function.py` is the shorter way.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, ClassVar

import stator
from stator.config import Config, Setting
from stator.llm.card import byte_card
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.worker import ComponentSnapshot, EngineConfig, LLMEngine, SnapshotSink

BLOCK = 16
BLOCKS = 1000


class Options(Config, frozen=True, kw_only=True):
    """What `--option` may set."""

    section: ClassVar[str] = "backwards"

    pause: Annotated[float, Setting(doc="time between tokens", unit="s", ge=0)] = 0.0


class Backwards(LLMEngine):
    """Needs no model: the built-in byte tokenizer turns text into ids and back. Tells how much of its pretended cache is in use."""

    options_type = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self.used = 0
        self.sink: SnapshotSink | None = None

    async def start(self, instance_id: int) -> EngineConfig:
        card = await asyncio.to_thread(byte_card, "backwards")  # reads files: not on the event loop
        return EngineConfig(model="backwards", card=card, max_num_seqs=64, kv_cache_block_size=BLOCK, total_kv_blocks=BLOCKS)

    def snapshot_ranks(self) -> Sequence[int]:
        return (0,)

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        self.sink = sink

    async def generate(self, request: PreprocessedRequest, context: stator.Context) -> AsyncIterator[EngineOutput]:
        if not request.token_ids:
            raise ValueError("the prompt is empty")
        blocks = -(-len(request.token_ids) // BLOCK)
        self.hold(blocks)
        try:
            answer = bytes(request.token_ids).decode()[::-1].encode()[: request.stop_conditions.max_tokens]
            for number, token in enumerate(answer, start=1):
                await asyncio.sleep(self.options.pause)
                if context.is_stopped:
                    yield EngineOutput(token_ids=[], finish_reason="cancelled")
                    return
                finished = "length" if number == request.stop_conditions.max_tokens else None
                yield EngineOutput(token_ids=[token], finish_reason=finished)
            yield EngineOutput(token_ids=[], finish_reason="stop")
        finally:
            self.hold(-blocks)

    def hold(self, blocks: int) -> None:
        self.used += blocks
        if self.sink is not None:
            self.sink.publish(
                0, ComponentSnapshot(kv_used_blocks=self.used, kv_total_blocks=BLOCKS, gpu_cache_usage=self.used / BLOCKS)
            )
