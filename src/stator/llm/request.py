"""What a frontend sends to a worker (`spec/50 §11`): token ids and everything the engine must know.

Encoding writes the reference's JSON: its key order, explicit nulls where it writes them, absent keys where it omits them
(those are `UNSET`, which is false in a condition). Decoding ignores unknown keys and lets everything but `token_ids` be absent.
"""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from stator.errors import EngineError

__all__ = [
    "GuidedDecoding",
    "OutputOptions",
    "PreprocessedRequest",
    "Routing",
    "SamplingOptions",
    "StopConditions",
    "encode_request",
    "read_request",
]


class StopConditions(msgspec.Struct, frozen=True, kw_only=True):
    """When the engine, or the frontend for it, ends a choice. Counts are in tokens."""

    max_tokens: int | None = None
    """null: the client gave none and the worker chooses"""
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    """end the choice, are not shown, and are reported as `stop_reason`"""
    stop_token_ids_visible: list[int] | None = None
    """end the choice and are shown"""
    stop_token_ids_hidden: list[int] | None = None
    """end the choice and are not shown; the model's end-of-sequence ids"""
    min_tokens: int | None = None
    """no rule but `max_tokens` ends the choice before this many"""
    ignore_eos: bool | None = None
    max_thinking_tokens: int | None = None


class GuidedDecoding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A grammar the output must follow; only the given keys are written."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    backend: str | None = None
    whitespace_pattern: str | None = None
    structural_tag: Any = None


class SamplingOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the engine chooses tokens; null leaves the choice to the engine."""

    n: int | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """-1: all"""
    min_p: float | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    seed: int | None = None
    include_stop_str_in_output: bool | None = None
    guided_decoding: GuidedDecoding | None = None


class OutputOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer should contain beside the tokens."""

    logprobs: int | None = None
    """number of alternatives per token; null: no log probabilities at all"""
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    """null means true"""
    formatted_prompt: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class Routing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Wishes about the worker; only the set keys are written. Worker ids are instance ids (u64)."""

    backend_instance_id: int | None = None
    prefill_worker_id: int | None = None
    decode_worker_id: int | None = None
    dp_rank: int | None = None
    prefill_dp_rank: int | None = None
    expected_output_tokens: int | None = None
    lora_name: str | None = None
    priority_jump: float | None = None
    strict_priority: int | None = None
    priority: int | None = None
    allowed_worker_ids: list[int] | None = None
    routing_constraints: dict[str, Any] | None = None


class PreprocessedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request as a worker gets it: n ≥ 1 choices over one prompt of `token_ids` (u32, length ≥ 1)."""

    model: str = ""
    token_ids: list[int]
    prompt_embeds: str | UnsetType | None = UNSET
    multi_modal_data: dict[str, Any] | UnsetType | None = UNSET
    mm_routing_info: dict[str, Any] | UnsetType | None = UNSET
    stop_conditions: StopConditions = StopConditions()
    sampling_options: SamplingOptions = SamplingOptions()
    output_options: OutputOptions = OutputOptions()
    eos_token_ids: list[int] = []
    mdc_sum: str | None = None
    annotations: list[str] = []
    routing: Routing | UnsetType | None = UNSET
    router_config_override: dict[str, Any] | None = None
    prefill_result: dict[str, Any] | UnsetType | None = UNSET
    encoder_result: dict[str, Any] | UnsetType | None = UNSET
    migration_link: dict[str, Any] | UnsetType | None = UNSET
    bootstrap_info: dict[str, Any] | UnsetType | None = UNSET
    extra_args: dict[str, Any] | UnsetType | None = UNSET
    require_reasoning: bool | UnsetType = UNSET
    router: dict[str, Any] | UnsetType | None = UNSET
    agent_context: dict[str, Any] | UnsetType | None = UNSET
    mm_processor_kwargs: dict[str, Any] | UnsetType | None = UNSET
    request_timestamp_ms: float | UnsetType | None = UNSET
    health_check: bool | UnsetType = msgspec.field(default=UNSET, name="_HEALTH_CHECK")
    """true on canary probes"""


_encoder = msgspec.json.Encoder()


def encode_request(request: PreprocessedRequest) -> bytes:
    """Compact JSON, the payload of a request envelope."""
    return _encoder.encode(request)


def read_request(body: Any) -> PreprocessedRequest:
    """Type a payload that was decoded to plain values.

    Raises `EngineError` of kind `InvalidArgument` naming the field that does not fit: the request is at fault, not the worker.
    """
    try:
        return msgspec.convert(body, PreprocessedRequest)
    except msgspec.ValidationError as error:
        raise EngineError(f"request cannot be read: {error}", kind="InvalidArgument") from error
