"""The `nvext` object of a request (`spec/50 §9`): routing wishes and extras of the reference's API. Unknown keys are errors."""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from stator.llm.request import Routing

__all__ = ["AgentHints", "NvExt"]


class AgentHints(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an agent framework knows about the request."""

    priority: int | None = None
    strict_priority: int | None = None
    osl: int | None = None
    """expected length of the answer, in tokens"""
    speculative_prefill: bool | None = None
    latency_sensitivity: float | None = None


class NvExt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ids are instance ids (u64)."""

    greed_sampling: bool | None = None
    use_raw_prompt: bool | None = None
    annotations: list[str] | None = None
    backend_instance_id: int | None = None
    token_data: list[int] | None = None
    """used as the prompt's token ids; nothing is rendered or tokenised"""
    max_thinking_tokens: int | None = None
    cache_salt: str | None = None
    extra_fields: list[str] | None = None
    metadata_upload: dict[str, Any] | None = None
    prefill_worker_id: int | None = None
    decode_worker_id: int | None = None
    dp_rank: int | None = None
    prefill_dp_rank: int | None = None
    agent_hints: AgentHints | None = None
    request_timestamp_ms: float | None = None
    routing_constraints: dict[str, Any] | None = None
    router: dict[str, Any] | None = None

    def routing(self) -> Routing:
        """The wishes about the worker; neutral ones give an empty object, as in the reference."""
        hints = self.agent_hints or AgentHints()
        return Routing(
            backend_instance_id=self.backend_instance_id,
            prefill_worker_id=self.prefill_worker_id,
            decode_worker_id=self.decode_worker_id,
            dp_rank=self.dp_rank,
            prefill_dp_rank=self.prefill_dp_rank,
            expected_output_tokens=hints.osl,
            priority_jump=None if hints.priority is None else float(max(hints.priority, 0)),
            strict_priority=hints.strict_priority,
            priority=hints.priority,
            routing_constraints=self.routing_constraints,
        )

    def extra_args(self) -> dict[str, Any] | UnsetType:
        """What travels under `extra_args.nvext`; `UNSET` when there is nothing."""
        extra = {
            "extra_fields": self.extra_fields,
            "cache_salt": self.cache_salt,
            "metadata_upload": self.metadata_upload,
            "token_in": None if self.token_data is None else True,
        }
        given = {name: value for name, value in extra.items() if value is not None}
        return {"nvext": given} if given else UNSET
