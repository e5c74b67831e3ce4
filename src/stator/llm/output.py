"""What a worker yields (`spec/50 §12`): one item with the next tokens of one choice.

This is the token path: an item is decoded straight into its struct, and most items have one token and nothing else. The structs
opt out of the garbage collector: they come from decoded JSON or are built by engines field by field, and neither makes a cycle.
"""

from typing import Annotated, Any

import msgspec

from stator.errors import EngineError

__all__ = [
    "CompletionUsage",
    "EngineOutput",
    "FinishError",
    "TopLogprob",
    "decode_output",
    "decode_outputs",
    "encode_output",
    "read_output",
    "read_outputs",
]


class FinishError(msgspec.Struct, frozen=True, gc=False):
    """`finish_reason` of a choice that failed in the engine; the text is for logs, not for clients."""

    error: str


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One alternative at one position; `rank` counts from 1. `bytes` are the UTF-8 bytes of the token, if given."""

    rank: int = 0
    token_id: int
    token: str | None = None
    logprob: float | None = None
    bytes: list[int] | None = None


class CompletionUsage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The engine's own count of tokens; `prompt_tokens_details` has `cached_tokens` and `audio_tokens`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: dict[str, int | None] | None = None
    completion_tokens_details: dict[str, int | None] | None = None


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The next tokens of choice `index`. Absent and null mean the same; unknown keys are ignored; only set fields are
    written.
    """

    token_ids: list[Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]]
    """new tokens since the item before (u32); may be empty"""
    tokens: list[str | None] | None = None
    text: str | None = None
    """text of exactly these tokens; shown instead of what `token_ids` decode to"""
    output_type: str | None = None
    content_parts: list[dict[str, Any]] | None = None
    cum_log_probs: float | None = None
    log_probs: list[float | None] | None = None
    """one per token"""
    top_logprobs: list[list[TopLogprob]] | None = None
    """the best alternatives, per token"""
    finish_reason: str | FinishError | None = None
    """`eos`, `stop`, `length`, `cancelled`, `abort`, `content_filter`, or an error; ends the choice"""
    stop_reason: str | int | None = None
    index: int | None = None
    """number of the choice; null is 0"""
    disaggregated_params: Any = None
    encoder_result: dict[str, Any] | None = None
    worker_trace_link: dict[str, Any] | None = None
    extra_args: dict[str, Any] | None = None
    completion_usage: CompletionUsage | None = None
    engine_data: Any = None
    routing_data: dict[str, Any] | None = None


_encoder = msgspec.json.Encoder()
_one = msgspec.json.Decoder(EngineOutput)
_many = msgspec.json.Decoder(list[EngineOutput])


def encode_output(output: EngineOutput) -> bytes:
    """Compact JSON with the set fields only."""
    return _encoder.encode(output)


def decode_output(data: bytes | memoryview) -> EngineOutput:
    """Read one item; `EngineError` when it has another shape."""
    try:
        return _one.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _misshapen(error) from error


def decode_outputs(data: bytes | memoryview) -> list[EngineOutput]:
    """Read a JSON array of items; `EngineError` when one has another shape."""
    try:
        return _many.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _misshapen(error) from error


def read_output(item: Any) -> EngineOutput:
    """Type one item that was decoded to plain values; `EngineError` when it has another shape."""
    try:
        return msgspec.convert(item, EngineOutput)
    except msgspec.ValidationError as error:
        raise _misshapen(error) from error


def read_outputs(items: list[Any]) -> list[EngineOutput]:
    """Type a list of plain items at once; `EngineError` when one has another shape."""
    try:
        return msgspec.convert(items, list[EngineOutput])
    except msgspec.ValidationError as error:
        raise _misshapen(error) from error


def _misshapen(error: Exception) -> EngineError:
    return EngineError(f"the worker yielded an item that is no engine output: {error}")
