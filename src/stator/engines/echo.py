"""An engine that answers with the prompt: for first steps, tests and measurements."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, ClassVar

from stator.config import Config, Setting
from stator.engines.pacer import Pacer
from stator.errors import ConfigError, EngineError
from stator.llm.card import ModelCard, byte_card, card_from_directory
from stator.llm.output import CompletionUsage, EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.worker.engine import EngineConfig, LLMEngine

__all__ = ["EchoEngine", "EchoOptions"]


class EchoOptions(Config, frozen=True, kw_only=True):
    """Settings of the echo engine."""

    section: ClassVar[str] = "echo"

    model: Annotated[str, Setting(doc="directory of a model whose tokenizer is used; empty: the built-in byte tokenizer")] = ""
    name: Annotated[str, Setting(doc="model name to serve when no directory is given")] = "echo"
    delay: Annotated[float, Setting(doc="time between items; 0: as fast as they are read", unit="s", ge=0, le=3600)] = 0.0
    chunk: Annotated[int, Setting(doc="tokens per item", unit="tokens", ge=1)] = 1


class EchoEngine(LLMEngine):
    """Emits the prompt's token ids, `chunk` at a time, up to `max_tokens`.

    The finish reason is `stop` when the whole prompt was echoed or a stop token was met, `length` when it was cut,
    `cancelled` when the request was stopped. End-of-sequence ids of the prompt (between the turns of a chat) are left out:
    a frontend would end the answer there.
    """

    options_type = EchoOptions

    def __init__(self, options: EchoOptions | None = None) -> None:
        self.options = options or EchoOptions()
        self._pacer = Pacer(self.options.delay) if self.options.delay else None

    async def start(self, instance_id: int) -> EngineConfig:
        """Raises `ConfigError` if the model directory cannot be used."""
        card = await asyncio.to_thread(self._card)
        return EngineConfig(model=self.options.model or self.options.name, card=card)

    def _card(self) -> ModelCard:
        if not self.options.model:
            return byte_card(self.options.name)
        directory = Path(self.options.model)
        if not directory.is_dir():
            raise ConfigError(f"the echo engine needs a directory with a tokenizer, and {self.options.model!r} is none")
        return card_from_directory(directory)

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        """Without delay it never suspends: whoever reads it decides when the event loop gets its turn."""
        prompt = len(request.token_ids)
        if not prompt:
            raise EngineError("token_ids must not be empty", kind="InvalidArgument")
        tokens, reason, stop_reason = _answer(request)
        chunk, pacer, sent, total = self.options.chunk, self._pacer, 0, len(tokens)
        while True:  # token path
            if pacer is not None and total and not context.is_stopped:
                await pacer.beat(context)
            if context.is_stopped:
                yield _final([], "cancelled", prompt, sent)
                return
            if total - sent <= chunk:
                break
            yield EngineOutput(token_ids=tokens[sent : sent + chunk])
            sent += chunk
        yield _final(tokens[sent:], reason, prompt, total, stop_reason=stop_reason)

    async def abort(self, context: Context) -> None:
        """Ends the delay the request is in."""
        if self._pacer is not None:
            self._pacer.wake(context)

    async def cleanup(self) -> None:
        if self._pacer is not None:
            self._pacer.close()


def _answer(request: PreprocessedRequest) -> tuple[list[int], str, int | None]:
    """The ids to emit, the finish reason and, if a stop token ends them, that token."""
    stop = request.stop_conditions
    tokens = request.token_ids
    ends = {*request.eos_token_ids, *(stop.stop_token_ids_hidden or ())}
    if not ends.isdisjoint(tokens):
        tokens = [token for token in tokens if token not in ends]
    limit = len(tokens) if stop.max_tokens is None else max(stop.max_tokens, 0)
    stops = {*(stop.stop_token_ids or ()), *(stop.stop_token_ids_visible or ())}
    if not stops.isdisjoint(tokens):
        least = max(stop.min_tokens or 1, 1) - 1
        for place, token in enumerate(tokens[least:limit], start=least):
            if token in stops:
                return tokens[: place + 1], "stop", token
    return tokens[:limit], "stop" if limit >= len(tokens) else "length", None


def _final(tokens: list[int], reason: str, prompt: int, completion: int, *, stop_reason: int | None = None) -> EngineOutput:
    usage = CompletionUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
    return EngineOutput(token_ids=tokens, finish_reason=reason, stop_reason=stop_reason, completion_usage=usage)
