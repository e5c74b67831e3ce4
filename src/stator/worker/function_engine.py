"""An async generator function as an engine: the author writes what comes out, the adapter does the rest of the contract."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import msgspec

from stator.config import Config, Setting
from stator.errors import ConfigError, EngineError, UsageError
from stator.llm.card import ModelCard, byte_card, card_from_directory
from stator.llm.model_files import load_tokenizer
from stator.llm.output import CompletionUsage, EngineOutput, read_output
from stator.llm.request import PreprocessedRequest
from stator.llm.stop import StopRules
from stator.llm.tokenizer import Tokenizer
from stator.runtime.context import Context
from stator.runtime.engine import Generate, Handler, generate_function
from stator.worker.closing import close_stream
from stator.worker.engine import EngineConfig, LLMEngine
from stator.worker.interruption import Interruption

__all__ = ["FunctionEngine", "FunctionOptions"]


class FunctionOptions(Config, frozen=True, kw_only=True):
    """Settings of an engine that is a plain function."""

    section: ClassVar[str] = "function"

    name: Annotated[str, Setting(doc="model name to serve; empty: the function's")] = ""
    model: Annotated[str, Setting(doc="directory of a model whose tokenizer is used; empty: the built-in byte tokenizer")] = ""
    context_length: Annotated[
        int | None, Setting(doc="longest prompt and answer together; none: the model's limit", unit="tokens", ge=2)
    ] = None
    max_num_seqs: Annotated[int | None, Setting(doc="requests that generate at once; none: no limit", ge=1)] = None


class FunctionEngine(LLMEngine):
    """Wraps `async def generate(request, context)`, or one of `(request)` alone.

        async def shout(request, context):
            yield bytes(request.token_ids).decode().upper()

        engine = FunctionEngine(shout)

    The function may yield text, a token id, a list of token ids, a dict with the keys of `EngineOutput`, or an `EngineOutput`. It need not
    know of the rest: the answer ends with `stop` when the function does, at a stop token, with `length` at `max_tokens`, and with
    `cancelled` when the request is stopped, wherever the function waits then (it is cancelled at that `await`). Usage is counted.
    """

    options_type = FunctionOptions

    def __init__(self, function: Handler, options: FunctionOptions | None = None, *, card: ModelCard | None = None) -> None:
        """`card` describes the model; without one, `options.model` or the byte tokenizer does. Raises `UsageError` for a function that is
        no async generator.
        """
        self.options = options or FunctionOptions()
        self._function: Generate = generate_function(function)
        self._given = card
        self._name = self.options.name or str(getattr(function, "__name__", "")) or "function"
        self._tokenizer: Tokenizer | None = None
        self._waiting: dict[Context, Interruption] = {}

    async def start(self, instance_id: int) -> EngineConfig:
        """Raises `ConfigError` if the model directory cannot be used."""
        card, self._tokenizer = await asyncio.to_thread(self._open)
        return EngineConfig(
            model=self.options.model or self._name,
            card=card,
            served_name=self.options.name or None,
            context_length=self.options.context_length,
            max_num_seqs=self.options.max_num_seqs,
        )

    def _open(self) -> tuple[ModelCard, Tokenizer]:
        card = self._given
        try:
            if card is None and self.options.model:
                card = card_from_directory(Path(self.options.model))
            card = card or byte_card(self._name)
            return card, load_tokenizer(card)
        except UsageError as error:
            raise ConfigError(error.message) from error

    def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        """What the function raises when it is called is raised here."""
        interruption = Interruption()
        answer = self._answer(request, context, interruption)
        interruption.of(answer)
        return answer

    async def _answer(
        self, request: PreprocessedRequest, context: Context, interruption: Interruption
    ) -> AsyncGenerator[EngineOutput]:
        if not request.token_ids:
            raise EngineError("token_ids must not be empty", kind="InvalidArgument")
        answer = _Answer(request)
        if not answer.left:
            yield answer.last([], "length")
            return
        interruption.begin()
        self._waiting[context] = interruption
        stream = self._function(request, context)
        try:
            async for item in stream:
                if context.is_stopped:
                    break
                output = answer.take(self._read(item))
                yield output
                if output.finish_reason is not None:
                    return
                if context.is_stopped:
                    break
            yield answer.last([], "cancelled" if context.is_stopped else "stop")
        except asyncio.CancelledError:
            if not interruption.ends():
                raise
            yield answer.last([], "cancelled")
        finally:
            self._waiting.pop(context, None)
            interruption.close()
            await close_stream(stream)

    def _read(self, item: Any) -> EngineOutput:
        """Any of the forms as an item."""
        if isinstance(item, EngineOutput):
            return item
        if isinstance(item, str):
            assert self._tokenizer is not None, "generate comes after start"
            return EngineOutput(token_ids=self._tokenizer.encode(item))
        if isinstance(item, int):
            return read_output({"token_ids": [item]})
        if isinstance(item, list):
            return read_output({"token_ids": item})
        if isinstance(item, dict):
            return read_output({"token_ids": [], **cast(dict[str, Any], item)})
        raise EngineError(
            f"invalid chunk shape: the function yielded {type(item).__name__}, expected text, token ids, a dict or EngineOutput",
            kind="InvalidArgument",
        )

    async def abort(self, context: Context) -> None:
        """Ends what the function waits for."""
        interruption = self._waiting.get(context)
        if interruption is not None and not context.is_killed:  # a killed one is cancelled anyway
            interruption.interrupt()


class _Answer:
    """One answer on its way: what ends it, and what was counted."""

    __slots__ = ("_count", "_ends", "_prompt", "_rules", "left")

    def __init__(self, request: PreprocessedRequest) -> None:
        self._rules = rules = StopRules.of(request)
        self._ends = rules.silent | rules.reported | rules.visible
        self._prompt = len(request.token_ids)
        self._count = 0
        self.left = rules.max_tokens is None or rules.max_tokens > 0
        """whether any token is wanted"""

    def take(self, output: EngineOutput) -> EngineOutput:
        """The item that may go out: cut at a stop token or the last token that is wanted, and then the last."""
        tokens, rules = output.token_ids, self._rules
        for place, token in enumerate(tokens):
            count = self._count + place + 1
            if token in self._ends and count >= rules.min_tokens:
                return self._cut(output, place + 1, "stop", None if token in rules.silent else token)
            if count == rules.max_tokens:
                return self._cut(output, place + 1, output.finish_reason or "length", None)
        self._count += len(tokens)
        return output if output.finish_reason is None or output.completion_usage is not None else self._with_usage(output)

    def last(self, tokens: list[int], reason: str) -> EngineOutput:
        """A last item of our own."""
        return self._with_usage(EngineOutput(token_ids=tokens, finish_reason=reason))

    def _cut(self, output: EngineOutput, size: int, reason: Any, stop_reason: int | None) -> EngineOutput:
        self._count += size
        log_probs, top = output.log_probs, output.top_logprobs
        shorter = msgspec.structs.replace(
            output,
            token_ids=output.token_ids[:size],
            log_probs=None if log_probs is None else log_probs[:size],
            top_logprobs=None if top is None else top[:size],
            finish_reason=reason,
            stop_reason=stop_reason if stop_reason is not None else output.stop_reason,
        )
        return self._with_usage(shorter)

    def _with_usage(self, output: EngineOutput) -> EngineOutput:
        total = self._prompt + self._count
        usage = CompletionUsage(prompt_tokens=self._prompt, completion_tokens=self._count, total_tokens=total)
        return msgspec.structs.replace(output, completion_usage=usage)
