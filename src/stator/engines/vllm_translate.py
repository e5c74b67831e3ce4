"""Between our requests and items and those of vLLM. Nothing here imports it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from stator.engines.foreign_answer import End, Explained, ForeignAnswer
from stator.engines.foreign_request import chosen_fields, ending_ids
from stator.llm.output import EngineOutput, FinishError, TopLogprob
from stator.llm.request import GuidedDecoding, PreprocessedRequest

__all__ = [
    "AnswerReader",
    "CompletionLike",
    "LogprobLike",
    "RequestOutputLike",
    "guided_fields",
    "sampling_fields",
]


class LogprobLike(Protocol):
    """`vllm.logprobs.Logprob`"""

    @property
    def logprob(self) -> float: ...

    @property
    def rank(self) -> int | None: ...


class CompletionLike(Protocol):
    """`vllm.outputs.CompletionOutput`, of one step"""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def logprobs(self) -> Sequence[Mapping[int, LogprobLike] | None] | None: ...

    @property
    def finish_reason(self) -> str | None: ...

    @property
    def stop_reason(self) -> int | str | None: ...


class RequestOutputLike(Protocol):
    """`vllm.outputs.RequestOutput`"""

    @property
    def outputs(self) -> Sequence[CompletionLike]: ...

    @property
    def num_cached_tokens(self) -> int | None: ...


def sampling_fields(request: PreprocessedRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `SamplingParams`, but the guided decoding. What the request leaves open is as in `defaults`, the model's own
    generation config, or vLLM's own default. Without `max_tokens` the answer may fill the context.
    """
    stop = request.stop_conditions
    eos, stops = ending_ids(request)
    fields = chosen_fields(
        request,
        defaults,
        seed=request.sampling_options.seed,
        min_tokens=stop.min_tokens,
        logprobs=request.output_options.logprobs,
        thinking_token_budget=stop.max_thinking_tokens,
    )
    fields["max_tokens"] = stop.max_tokens
    if ids := sorted(eos | stops):
        fields["stop_token_ids"] = ids
    if stop.ignore_eos:
        fields["ignore_eos"] = True
    return fields


def guided_fields(guided: GuidedDecoding) -> dict[str, Any]:
    """Arguments of `StructuredOutputsParams`. The backend is the engine's choice."""
    tag = guided.structural_tag
    asked = {
        "json": guided.json,
        "regex": guided.regex,
        "choice": guided.choice,
        "grammar": guided.grammar,
        "whitespace_pattern": guided.whitespace_pattern,
        "structural_tag": tag if tag is None or isinstance(tag, str) else msgspec.json.encode(tag).decode(),
    }
    return {name: value for name, value in asked.items() if value is not None}


class AnswerReader(ForeignAnswer):
    """Reads the steps of one answer (`RequestOutputKind.DELTA`)."""

    def __init__(self, request: PreprocessedRequest) -> None:
        super().__init__(request)
        self._cached: int | None = None

    def read(self, step: RequestOutputLike) -> EngineOutput:
        """The item for a step. Token path."""
        completion = step.outputs[0]
        token_ids = list(completion.token_ids)
        self._count += len(token_ids)
        if step.num_cached_tokens is not None:
            self._cached = step.num_cached_tokens
        if completion.finish_reason is None and self._logprobs is None:
            return EngineOutput(token_ids=token_ids)
        explained = self._explained(token_ids, completion.logprobs)
        reason = completion.finish_reason
        end = None if reason is None else self._end(reason, completion.stop_reason)
        return self._item(token_ids, explained, end, cached=self._cached)

    def _end(self, reason: str, stop_reason: int | str | None) -> End:
        match reason:
            case "stop" | "repetition":
                return self._stopped(stop_reason)
            case "length":
                return "length", None
            case "abort":
                return "cancelled", None
            case _:
                return FinishError(f"vLLM ended the answer: {reason}"), None

    def _explained(self, token_ids: list[int], logprobs: Sequence[Mapping[int, LogprobLike] | None] | None) -> Explained:
        if self._logprobs is None or logprobs is None:
            return None, None
        chosen: list[float | None] = []
        top: list[list[TopLogprob]] = []
        for token, position in zip(token_ids, logprobs, strict=False):
            known = position or {}
            chosen.append(known[token].logprob if token in known else None)
            ranked = sorted((one.rank or 0, other, one.logprob) for other, one in known.items())
            top.append(
                [
                    TopLogprob(rank=rank, token_id=other, logprob=value)
                    for rank, other, value in ranked
                    if 0 < rank <= self._logprobs
                ]
            )
        return chosen, top
