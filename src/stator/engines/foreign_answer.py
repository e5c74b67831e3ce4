"""What reading an answer of a foreign engine has in common, whatever the library's steps look like."""

from stator.engines.foreign_request import ending_ids
from stator.llm.output import CompletionUsage, EngineOutput, FinishError, TopLogprob
from stator.llm.request import PreprocessedRequest

__all__ = ["End", "Explained", "ForeignAnswer"]

End = tuple[str | FinishError, int | str | None]
"""why an answer ended, and the token that ended it"""
Explained = tuple[list[float | None] | None, list[list[TopLogprob]] | None]
"""log probabilities of the new tokens, and of their alternatives; None: not asked for"""


class ForeignAnswer:
    """One answer: counts its tokens, and makes its items."""

    def __init__(self, request: PreprocessedRequest) -> None:
        self._prompt = len(request.token_ids)
        self._logprobs = request.output_options.logprobs
        self._eos, _ = ending_ids(request)
        self._count = 0

    def _item(self, token_ids: list[int], explained: Explained, end: End | None, *, cached: int | None) -> EngineOutput:
        """With a count of all tokens so far if it is the last; `cached`: tokens of the prompt that were in the prefix cache."""
        log_probs, top = explained
        reason, stop_reason = end or (None, None)
        return EngineOutput(
            token_ids=token_ids,
            log_probs=log_probs,
            top_logprobs=top,
            finish_reason=reason,
            stop_reason=stop_reason,
            completion_usage=None if end is None else self._usage(cached),
        )

    def _stopped(self, token: int | str | None) -> End:
        """The libraries say `stop` of an end-of-sequence token too, and name none if it is the tokenizer's own."""
        return ("eos", None) if token is None or token in self._eos else ("stop", token)

    def _usage(self, cached: int | None) -> CompletionUsage:
        details: dict[str, int | None] | None = None if cached is None else {"cached_tokens": cached}
        return CompletionUsage(
            prompt_tokens=self._prompt,
            completion_tokens=self._count,
            total_tokens=self._prompt + self._count,
            prompt_tokens_details=details,
        )
