"""The bodies of `/v1/chat/completions` and `/v1/completions` (`spec/50 §2–3`), typed and checked.

What a request may contain is OpenAI's API plus the reference's extensions; a parameter that is unknown, or known but
without effect here, is refused by name: a client never wonders why its parameter did nothing.
"""

from typing import Any, Literal

import msgspec

from stator.llm.body import Allowed, InvalidRequest, check_ranges, read_body
from stator.llm.nvext import NvExt
from stator.llm.request import GuidedDecoding

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "ContentPart",
    "GenerationRequest",
    "InvalidRequest",
    "ResponseFormat",
    "StreamOptions",
    "Tool",
    "ToolFunction",
    "parse_chat",
    "parse_completion",
]

MAX_MESSAGES = 16_384
MAX_PROMPTS = 2_048
"""prompts in one batch request"""
MAX_TOOLS = 512
MAX_STOPS = 4
MAX_STOP_LENGTH = 1_024
"""characters of one stop string; bounds what is held back from a stream"""
MAX_N = 128
_U32 = 2**32 - 1
_I64 = 2**63


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`include_usage`: one more chunk with the usage at the end; `continuous_usage_stats`: the running usage in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message; only text is taken."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message. Fields beyond OpenAI's are those that chat templates know."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None

    def text(self) -> str | None:
        """The content as one string, text parts joined by newlines as in the reference; None when there is no content."""
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "\n".join(part.text or part.refusal or "" for part in self.content)


class ToolFunction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A function the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    type: Literal["function"]
    function: ToolFunction


class _NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True):
    """`tool_choice` of one function."""

    type: Literal["function"]
    function: _NamedFunction


class JsonSchema(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """`text`, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What chat and completions share. None means that the client did not say."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    """strings, or token ids, not both"""
    user: str | None = None
    metadata: dict[str, Any] | None = None
    logit_bias: dict[str, float] | None = None
    # Extensions of the reference.
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    return_tokens_as_token_ids: bool | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: str | None = None
    nvext: NvExt | None = None

    @property
    def stop_strings(self) -> list[str]:
        """The texts that end a choice."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if isinstance(stop, str)]

    @property
    def stop_ids(self) -> list[int]:
        """The token ids that end a choice, from `stop_token_ids` and from numbers in `stop`."""
        numbers = [stop for stop in self.stop if isinstance(stop, int)] if isinstance(self.stop, list) else []
        return [*(self.stop_token_ids or ()), *numbers]

    def guided_decoding(self) -> GuidedDecoding | None:
        """The grammar the client asked for by the `guided_` parameters; None without any."""
        guided = GuidedDecoding(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
            backend=self.guided_decoding_backend,
            whitespace_pattern=self.guided_whitespace_pattern,
        )
        return guided if guided != GuidedDecoding() else None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `/v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    """wins over `max_tokens`"""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_args: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking: Any = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    # Accepted, without effect on what is generated.
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    verbosity: str | None = None
    # Known and refused unless neutral.
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None

    @property
    def template_args(self) -> dict[str, Any]:
        """The client's variables for the chat template, under either name."""
        return {**(self.chat_template_args or {}), **(self.chat_template_kwargs or {})}


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of `/v1/completions`."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    logprobs: int | None = None
    # Known and refused unless neutral.
    echo: bool | None = None
    suffix: str | None = None
    prompt_embeds: Any = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one: each a text, or its token ids. At least one; none is empty."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(CompletionRequest)

_RANGES = {
    "n": Allowed(1, MAX_N),
    "max_tokens": Allowed(1, _U32),
    "temperature": Allowed(0, 2),
    "top_p": Allowed(0, 1),
    "presence_penalty": Allowed(-2, 2),
    "frequency_penalty": Allowed(-2, 2),
    "seed": Allowed(-_I64, _I64 - 1),
    "min_tokens": Allowed(0, _U32),
    "top_k": Allowed(-1, 2**31 - 1),
    "min_p": Allowed(0, 1),
    "repetition_penalty": Allowed(0, 100),
    "prompt_logprobs": Allowed(0, 20),
}
_CHAT_RANGES = {**_RANGES, "max_completion_tokens": Allowed(1, _U32), "top_logprobs": Allowed(0, 20)}
_COMPLETION_RANGES = {**_RANGES, "best_of": Allowed(1, MAX_N), "logprobs": Allowed(0, 5)}
_CHAT_REFUSED = {
    "audio": "this server answers with text only",
    "prediction": "predicted outputs are not available",
    "web_search_options": "there is no web search",
    "functions": "use 'tools' instead",
    "function_call": "use 'tool_choice' instead",
    "logit_bias": "token biases are not available",
}
_COMPLETION_REFUSED = {
    "echo": "the prompt is never repeated in the answer",
    "suffix": "text can only be continued at its end",
    "prompt_embeds": "prompts are text or token ids",
    "logit_bias": "token biases are not available",
}


def parse_chat(body: bytes) -> ChatRequest:
    """Read and check a chat request; `InvalidRequest` names the parameter at fault and what is allowed."""
    request = read_body(body, _chat_decoder, ChatRequest)
    _check_common(request, _CHAT_RANGES, _CHAT_REFUSED)
    _check_messages(request.messages)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
    if request.modalities is not None and request.modalities != ["text"]:
        raise InvalidRequest("Invalid 'modalities': this server answers with ['text'] only.", param="modalities")
    _check_tools(request)
    response_format = request.response_format
    if response_format is not None and response_format.type == "json_schema":
        schema = response_format.json_schema
        if schema is None or schema.schema is None:
            message = "Missing required parameter: 'response_format.json_schema.schema'."
            raise InvalidRequest(message, param="response_format", code="missing_required_parameter")
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Read and check a completion request; `InvalidRequest` names the parameter at fault and what is allowed."""
    request = read_body(body, _completion_decoder, CompletionRequest)
    _check_common(request, _COMPLETION_RANGES, _COMPLETION_REFUSED)
    _check_prompt(request.prompt)
    if request.best_of is not None and request.best_of < (request.n or 1):
        message = f"'best_of' must be greater than or equal to 'n', got best_of={request.best_of} and n={request.n or 1}."
        raise InvalidRequest(message, param="best_of")
    return request


def _check_common(request: GenerationRequest, ranges: dict[str, Allowed], refused: dict[str, str]) -> None:
    if not request.model:
        raise InvalidRequest("Invalid 'model': empty string. Expected the name of a model.", param="model")
    check_ranges(request, ranges)
    for name, reason in refused.items():
        if getattr(request, name):
            raise InvalidRequest(f"Unsupported parameter: '{name}' ({reason}).", param=name, code="unsupported_parameter")
    if request.top_k == 0:
        raise InvalidRequest("Invalid 'top_k': expected null, -1 or a value >= 1, but got 0 instead.", param="top_k")
    if request.repetition_penalty == 0:
        raise InvalidRequest("Invalid 'repetition_penalty': expected a value > 0.", param="repetition_penalty")
    if request.stream_options is not None and not request.stream:
        message = "The 'stream_options' field is only allowed when 'stream' is set to true."
        raise InvalidRequest(message, param="stream_options")
    _check_stop(request)


def _check_stop(request: GenerationRequest) -> None:
    strings, ids = request.stop_strings, request.stop_ids
    count = len(request.stop) if isinstance(request.stop, list) else 0
    if isinstance(request.stop, list) and 0 < len(strings) < count:
        raise InvalidRequest("Invalid 'stop': strings and token ids cannot be mixed.", param="stop")
    if count > MAX_STOPS:
        raise _too_long("stop", MAX_STOPS, count)
    if len(request.stop_token_ids or ()) > MAX_STOPS:
        raise _too_long("stop_token_ids", MAX_STOPS, len(ids))
    if any(not text or len(text) > MAX_STOP_LENGTH for text in strings):
        message = f"Invalid 'stop': each stop sequence must have 1 to {MAX_STOP_LENGTH} characters."
        raise InvalidRequest(message, param="stop")
    _check_token_ids(ids, "stop_token_ids")


def _check_messages(messages: list[ChatMessage]) -> None:
    if not messages:
        message = "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead."
        raise InvalidRequest(message, param="messages", code="empty_array")
    if len(messages) > MAX_MESSAGES:
        raise _too_long("messages", MAX_MESSAGES, len(messages))
    for index, message in enumerate(messages):
        if isinstance(message.content, list):
            _check_parts(message.content, index)
        elif message.content is None and message.role != "assistant":
            raise InvalidRequest(
                f"Invalid value for 'messages[{index}].content': expected a string or an array of text parts, got null.",
                param=f"messages[{index}].content",
                code="invalid_type",
            )


def _check_parts(parts: list[ContentPart], index: int) -> None:
    for place, part in enumerate(parts):
        param = f"messages[{index}].content[{place}]"
        if part.type not in ("text", "refusal"):
            message = f"Invalid value for '{param}.type': this model takes text only, got a part of type '{part.type[:32]}'."
            raise InvalidRequest(message, param=f"{param}.type", code="invalid_value")
        if (part.text if part.type == "text" else part.refusal) is None:
            message = f"Missing required parameter: '{param}.{part.type}'."
            raise InvalidRequest(message, param=f"{param}.{part.type}", code="missing_required_parameter")


def _check_tools(request: ChatRequest) -> None:
    tools = request.tools or []
    if len(tools) > MAX_TOOLS:
        raise _too_long("tools", MAX_TOOLS, len(tools))
    choice = request.tool_choice
    if choice is not None and choice != "none" and not tools:
        raise InvalidRequest("'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in {tool.function.name for tool in tools}:
        message = f"Invalid value for 'tool_choice': there is no tool named '{choice.function.name[:64]}' in 'tools'."
        raise InvalidRequest(message, param="tool_choice")


def _check_prompt(prompt: str | list[str | int | list[int]]) -> None:
    if not prompt:
        raise InvalidRequest("Invalid 'prompt': must not be empty.", param="prompt", code="empty_array")
    if isinstance(prompt, str):
        return
    if len({type(part) for part in prompt}) > 1:
        message = "Invalid 'prompt': expected a string, an array of strings, of token ids or of arrays of token ids."
        raise InvalidRequest(message, param="prompt", code="invalid_type")
    if isinstance(prompt[0], int):
        _check_token_ids([token for token in prompt if isinstance(token, int)], "prompt")
        return
    if len(prompt) > MAX_PROMPTS:
        raise _too_long("prompt", MAX_PROMPTS, len(prompt))
    for part in prompt:
        if not part:
            raise InvalidRequest("Invalid 'prompt': no prompt of the array may be empty.", param="prompt")
        if isinstance(part, list):
            _check_token_ids(part, "prompt")


def _check_token_ids(ids: list[int], param: str) -> None:
    if any(not 0 <= token <= _U32 for token in ids):
        raise InvalidRequest(f"Invalid '{param}': token ids are integers from 0 to {_U32}.", param=param)


def _too_long(name: str, maximum: int, length: int) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid '{name}': array too long. Expected an array with maximum length {maximum}, "
        f"but got an array with length {length} instead.",
        param=name,
        code="array_above_max_length",
    )
