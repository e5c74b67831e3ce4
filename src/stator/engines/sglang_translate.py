"""Between our requests and items and those of SGLang. Nothing here imports it."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stator.engines.foreign_answer import End, Explained, ForeignAnswer
from stator.engines.foreign_request import chosen_fields, ending_ids
from stator.errors import EngineError, Overloaded
from stator.llm.output import EngineOutput, FinishError, TopLogprob
from stator.llm.request import GuidedDecoding, PreprocessedRequest

__all__ = ["AnswerReader", "sampling_fields"]

_BAD_REQUEST = 400
_UNAVAILABLE = 503


def sampling_fields(request: PreprocessedRequest, defaults: Mapping[str, Any], *, context_length: int) -> dict[str, Any]:
    """SGLang's `sampling_params`. What the request leaves open is as in `defaults`, the model's own generation config, or SGLang's own
    default; without `max_tokens` the answer may fill the context. Raises `EngineError` of kind `InvalidArgument` for guided decoding
    of an unknown kind.
    """
    sampling, stop = request.sampling_options, request.stop_conditions
    eos, stops = ending_ids(request)
    left = max(context_length - len(request.token_ids), 1)
    fields = chosen_fields(
        request,
        defaults,
        sampling_seed=sampling.seed,
        min_new_tokens=stop.min_tokens,
        ignore_eos=stop.ignore_eos,
        stop_token_ids=sorted(eos | stops) or None,
        max_new_tokens=left if stop.max_tokens is None else min(stop.max_tokens, left),
    )
    if sampling.guided_decoding is not None:
        fields |= _guided(sampling.guided_decoding)
    return fields


def _guided(guided: GuidedDecoding) -> dict[str, Any]:
    if guided.choice is not None:
        return {"regex": "|".join(f"({_escaped(choice)})" for choice in guided.choice)}
    for name, value in (("json_schema", guided.json), ("structural_tag", guided.structural_tag)):
        if value is not None:
            return {name: value if isinstance(value, str) else msgspec.json.encode(value).decode()}
    for name, value in (("regex", guided.regex), ("ebnf", guided.grammar)):
        if value is not None:
            return {name: value}
    raise EngineError("guided decoding needs one of json, regex, choice, grammar and structural_tag", kind="InvalidArgument")


def _escaped(text: str) -> str:
    """`text` as a regular expression that matches it alone."""
    return "".join(f"\\{letter}" if letter in r"\.^$*+?{}[]|()/-" else letter for letter in text)


class AnswerReader(ForeignAnswer):
    """Reads the chunks of one answer (`stream=True`), whether each has the new tokens alone (`incremental`) or all so far."""

    def __init__(self, request: PreprocessedRequest, *, incremental: bool) -> None:
        super().__init__(request)
        self._incremental = incremental

    def read(self, chunk: Mapping[str, Any]) -> EngineOutput:
        """The item for a chunk. Raises the error that it tells of. Token path."""
        ids: Sequence[int] = chunk.get("output_ids") or ()
        token_ids = list(ids if self._incremental else ids[self._count :])
        self._count += len(token_ids)
        meta: Mapping[str, Any] = chunk["meta_info"]
        finish: Mapping[str, Any] | None = meta.get("finish_reason")
        if finish is None and self._logprobs is None:
            return EngineOutput(token_ids=token_ids)
        explained = self._explained(len(token_ids), meta)
        end = None if finish is None else self._end(finish)
        return self._item(token_ids, explained, end, cached=meta.get("cached_tokens"))

    def _end(self, finish: Mapping[str, Any]) -> End:
        match finish.get("type"):
            case "stop":
                return self._stopped(finish.get("matched"))
            case "length":
                return "length", None
            case "abort":
                return self._aborted(finish)
            case other:
                return FinishError(f"SGLang ended the answer: {other}"), None

    def _aborted(self, finish: Mapping[str, Any]) -> End:
        message, status = str(finish.get("message") or "aborted"), finish.get("status_code")
        if status == _BAD_REQUEST:
            raise EngineError(message, kind="InvalidArgument")
        if status == _UNAVAILABLE:
            raise Overloaded(message, phase="accept")
        return ("cancelled", None) if status is None else (FinishError(message), None)

    def _explained(self, new: int, meta: Mapping[str, Any]) -> Explained:
        """The last `new` entries: `(logprob, token id, text)`, and for the alternatives lists of those."""
        if self._logprobs is None:
            return None, None
        chosen: Sequence[Any] = meta.get("output_token_logprobs") or ()
        ranked: Sequence[Any] = meta.get("output_top_logprobs") or ()
        first = max(len(chosen) - new, 0)
        return (
            [logprob for logprob, *_ in chosen[first:]],
            [_alternatives(position) for position in ranked[max(len(ranked) - new, 0) :]] or [[] for _ in chosen[first:]],
        )


def _alternatives(position: Sequence[Any] | None) -> list[TopLogprob]:
    return [
        TopLogprob(rank=rank, token_id=token_id, logprob=logprob)
        for rank, (logprob, token_id, *_) in enumerate(position or (), start=1)
    ]
