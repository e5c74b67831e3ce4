"""An engine of your own behind the OpenAI API: it answers with the prompt backwards.

    stator serve --engine engine:Backwards --option pause=0.05

in this directory; clients ask for the model "backwards".
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, ClassVar

import stator
from stator.config import Config, Setting
from stator.llm.card import byte_card
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.worker import EngineConfig, LLMEngine


class Options(Config, frozen=True, kw_only=True):
    """What `--option` may set."""

    section: ClassVar[str] = "backwards"

    pause: Annotated[float, Setting(doc="time between tokens", unit="s", ge=0)] = 0.0


class Backwards(LLMEngine):
    """Needs no model: the built-in byte tokenizer turns text into ids and back."""

    options_type = Options

    def __init__(self, options: Options) -> None:
        self.options = options

    async def start(self, instance_id: int) -> EngineConfig:
        card = await asyncio.to_thread(byte_card, "backwards")  # reads files: not on the event loop
        return EngineConfig(model="backwards", card=card)

    async def generate(self, request: PreprocessedRequest, context: stator.Context) -> AsyncIterator[EngineOutput]:
        text = bytes(request.token_ids).decode()[::-1]
        for token in text.encode():
            if context.is_stopped:
                yield EngineOutput(token_ids=[], finish_reason="cancelled")
                return
            yield EngineOutput(token_ids=[token])
            await asyncio.sleep(self.options.pause)
        yield EngineOutput(token_ids=[], finish_reason="stop")
