"""From a typed OpenAI request to what a worker gets: render, tokenise, check, translate the options (`spec/50 §10–11`)."""

from collections.abc import Sequence
from typing import Any, Self, cast

import msgspec
from msgspec import UNSET

from stator.clock import Clock
from stator.errors import UsageError
from stator.llm.card import ModelCard, mdcsum
from stator.llm.model_files import load_template, load_tokenizer
from stator.llm.nvext import NvExt
from stator.llm.openai import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest, InvalidRequest, NamedTool
from stator.llm.prompt_timing import UNTIMED, PromptTiming
from stator.llm.request import GuidedDecoding, OutputOptions, PreprocessedRequest, SamplingOptions, StopConditions
from stator.llm.template import ChatTemplate
from stator.llm.tokenizer import Tokenizer

__all__ = ["Preprocessor"]


class Preprocessor:
    """The way in for one model. Stateless after construction; its methods are synchronous and as slow as the tokenizer.

    A long prompt takes milliseconds (a Hugging Face tokenizer reads about 1 MB/s): call them in a thread for large requests.
    """

    def __init__(self, card: ModelCard, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        """`template` None: the model takes completions only."""
        self.card = card
        self.tokenizer = tokenizer
        self.template = template
        self.mdc_sum = mdcsum(card)

    @classmethod
    def from_card(cls, card: ModelCard, *, clock: Clock) -> Self:
        """Open the model's files. Blocks, up to seconds: run it in a thread. `UsageError` says what is missing."""
        return cls(card, load_tokenizer(card), load_template(card, clock))

    def chat(self, request: ChatRequest, timing: PromptTiming = UNTIMED) -> PreprocessedRequest:
        """Translate a chat request. Raises `InvalidRequest`: template refused, too long, token id unknown."""
        given = request.nvext.token_data if request.nvext else None
        if given is not None:
            token_ids = self._known(given, "nvext")
        else:
            token_ids = self._encode(self.render(request, timing), "messages", timing)
        self._check_length(token_ids, "messages")
        logprobs = (1 if request.top_logprobs is None else request.top_logprobs) if request.logprobs else None
        max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        built = self._build(request, token_ids, logprobs=logprobs, max_tokens=max_tokens, guided=_chat_guided(request))
        if request.mm_processor_kwargs is None:
            return built
        return msgspec.structs.replace(built, mm_processor_kwargs=request.mm_processor_kwargs)

    def completion(
        self, request: CompletionRequest, prompt: str | list[int], timing: PromptTiming = UNTIMED
    ) -> PreprocessedRequest:
        """Translate one prompt of a completion request (`request.prompts()`); a text is tokenised without template."""
        if request.nvext is not None and request.nvext.token_data is not None:
            prompt = request.nvext.token_data
        token_ids = self._encode(prompt, "prompt", timing) if isinstance(prompt, str) else self._known(prompt, "prompt")
        self._check_length(token_ids, "prompt")
        guided = request.guided_decoding()
        built = self._build(request, token_ids, logprobs=request.logprobs, max_tokens=request.max_tokens, guided=guided)
        if request.best_of is None:
            return built
        sampling = msgspec.structs.replace(built.sampling_options, best_of=request.best_of)
        return msgspec.structs.replace(built, sampling_options=sampling)

    def render(self, request: ChatRequest, timing: PromptTiming = UNTIMED) -> str:
        """The prompt text of a chat request."""
        if self.template is None:
            raise InvalidRequest(f"The model '{request.model}' has no chat template; use /v1/completions.", param="messages")
        hide_tools = request.tool_choice == "none" and self.card.runtime_config.exclude_tools_when_tool_choice_none
        tools = None if hide_tools or not request.tools else [msgspec.to_builtins(tool) for tool in request.tools]
        messages = [_template_message(message) for message in request.messages]
        began = timing.now()
        try:
            return self.template.render(messages, tools=tools, variables=_template_variables(request))
        finally:
            timing.rendered(began)

    def _encode(self, text: str, param: str, timing: PromptTiming) -> list[int]:
        began = timing.now()
        try:
            token_ids = self.tokenizer.encode(text)
        except UsageError as error:
            raise InvalidRequest(f"Invalid '{param}': {error.message}.", param=param) from error
        finally:
            timing.encoded(began)
        # Engines need something to go on from; by old custom the end of the text before.
        token_ids = token_ids or list(self.tokenizer.eos_token_ids[:1])
        if not token_ids:
            raise InvalidRequest(f"Invalid '{param}': the prompt has no tokens.", param=param)
        return token_ids

    def _known(self, token_ids: list[int], param: str) -> list[int]:
        if not token_ids:
            raise InvalidRequest(f"Invalid '{param}': the prompt has no tokens.", param=param)
        size = self.tokenizer.vocab_size
        unknown = next((token for token in token_ids if not 0 <= token < size), None)
        if unknown is not None:
            raise InvalidRequest(
                f"Invalid '{param}': token id {unknown} is not in the vocabulary (0 to {size - 1}).", param=param
            )
        return token_ids

    def _check_length(self, token_ids: Sequence[int], param: str) -> None:
        limit = self.card.context_length
        if limit and len(token_ids) >= limit:
            noun = "messages" if param == "messages" else "prompt"
            raise InvalidRequest(
                f"This model's maximum context length is {limit} tokens. However, your {noun} resulted in {len(token_ids)} "
                f"tokens. Please reduce the length of the {noun}.",
                param=param,
                code="context_length_exceeded",
            )

    def _build(
        self,
        request: GenerationRequest,
        token_ids: list[int],
        *,
        logprobs: int | None,
        max_tokens: int | None,
        guided: GuidedDecoding | None,
    ) -> PreprocessedRequest:
        extension = request.nvext or NvExt()
        eos = [] if request.ignore_eos else list(self.tokenizer.eos_token_ids)
        return PreprocessedRequest(
            model=request.model,
            token_ids=token_ids,
            stop_conditions=StopConditions(
                max_tokens=max_tokens,
                stop=request.stop_strings or None,
                stop_token_ids=request.stop_ids or None,
                stop_token_ids_hidden=eos or None,
                min_tokens=request.min_tokens,
                ignore_eos=request.ignore_eos,
                max_thinking_tokens=extension.max_thinking_tokens,
            ),
            sampling_options=_sampling(request, guided),
            output_options=OutputOptions(
                logprobs=logprobs,
                prompt_logprobs=request.prompt_logprobs,
                skip_special_tokens=request.skip_special_tokens,
                return_tokens_as_token_ids=request.return_tokens_as_token_ids,
            ),
            eos_token_ids=eos,
            mdc_sum=self.mdc_sum,
            annotations=extension.annotations or [],
            routing=UNSET if request.nvext is None else extension.routing(),
            extra_args=extension.extra_args(),
            router=UNSET if extension.router is None else extension.router,
            request_timestamp_ms=UNSET if extension.request_timestamp_ms is None else extension.request_timestamp_ms,
        )


def _sampling(request: GenerationRequest, guided: GuidedDecoding | None) -> SamplingOptions:
    engine_default = request.nvext is not None and bool(request.nvext.greed_sampling)
    return SamplingOptions(
        n=request.n,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        temperature=None if engine_default else request.temperature,
        top_p=None if engine_default else request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
        include_stop_str_in_output=request.include_stop_str_in_output,
        guided_decoding=guided,
    )


def _chat_guided(request: ChatRequest) -> GuidedDecoding | None:
    """The grammar of the answer: asked for directly, by `tool_choice`, or by `response_format`."""
    direct = request.guided_decoding()
    if direct is not None:
        return direct
    tools = {tool.function.name: tool.function.parameters or {"type": "object"} for tool in request.tools or []}
    if isinstance(request.tool_choice, NamedTool):
        return GuidedDecoding(json=tools[request.tool_choice.function.name])
    if request.tool_choice == "required":
        calls = [
            {
                "properties": {"name": {"type": "string", "enum": [name]}, "parameters": parameters},
                "required": ["name", "parameters"],
            }
            for name, parameters in tools.items()
        ]
        return GuidedDecoding(json={"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": calls}})
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    return GuidedDecoding(json=wanted.json_schema.schema if wanted.json_schema else {"type": "object"})


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it: content as one string, arguments of tool calls as objects, absent keys absent."""
    result: dict[str, Any] = {"role": message.role, "content": message.text()}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            result[name] = value
    if message.tool_calls:
        result["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    elif result["content"] is None:
        result["content"] = ""
    return result


def _template_call(call: dict[str, Any]) -> dict[str, Any]:
    value: object = call.get("function")
    function = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    try:
        arguments = msgspec.json.decode(function.get("arguments", ""))
    except (TypeError, ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _template_variables(request: ChatRequest) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
    thinking: object = request.thinking
    if isinstance(thinking, dict):
        thinking = cast(dict[str, Any], thinking).get("type") != "disabled"
    if isinstance(thinking, bool):
        variables.update(thinking=thinking, enable_thinking=thinking)
    return {**variables, **request.template_args}
