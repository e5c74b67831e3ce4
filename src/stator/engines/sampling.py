"""Choosing the next token from logits, with the processors of the transformers library."""

# pyright: basic, reportMissingImports=false
# torch and transformers belong to an extra (absent where types are checked) and are largely untyped.

from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stator.engines.sequence import Sequence, TokenChoice, TopToken

__all__ = ["Sampler"]


class Sampler:
    """One sequence's way of choosing: built once, called once per step.

    The order of the processors is that of `generate`: penalties and bans first, then temperature, top-k, top-p, min-p.
    `plain` sequences take the likeliest token and nothing else, so that a batch of them needs one `argmax`.
    """

    __slots__ = ("_generator", "_logprobs", "_processors", "_sampled", "plain")

    def __init__(self, sequence: Sequence, *, defaults: Any, device: Any) -> None:
        sampling = sequence.sampling
        self._processors = _penalties(sequence, defaults, device)
        self._sampled = sampling.temperature > 0
        self._generator = None
        if self._sampled:
            self._processors += _warpers(sequence)
            self._generator = torch.Generator(device=device)
            self._generator.manual_seed(sampling.seed)
        self._logprobs = sampling.logprobs
        self.plain = not self._sampled and not self._processors and self._logprobs is None

    def choose(self, sequence: Sequence, logits: torch.Tensor) -> TokenChoice:
        """`logits`: float32 [1, vocabulary], may be overwritten."""
        scores = logits
        if self._processors:
            ids: Any = torch.tensor([sequence.tokens], device=logits.device)
            scores = self._processors(ids, logits.clone())
        if self._sampled:
            probabilities = torch.softmax(scores, dim=-1)
            token_id = int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))
        else:
            token_id = int(torch.argmax(scores, dim=-1))
        if self._logprobs is None:
            return TokenChoice(token_id)
        return _explain(token_id, torch.log_softmax(logits[0], dim=-1), self._logprobs)


def _explain(token_id: int, logprobs: torch.Tensor, count: int) -> TokenChoice:
    """The chosen token's log probability under the model itself, before penalties and temperature, and the `count`
    likeliest."""
    values, ids = torch.topk(logprobs, min(count, logprobs.shape[-1]))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    top = tuple(TopToken(rank, token, value) for rank, (token, value) in enumerate(pairs, start=1))
    return TokenChoice(token_id, float(logprobs[token_id]), top)


def _penalties(sequence: Sequence, defaults: Any, device: Any) -> LogitsProcessorList:
    """What applies to greedy and sampled answers alike; `defaults` is the model's generation config."""
    sampling = sequence.sampling
    chosen = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        chosen.append(_CountPenalty(sequence.prompt_length, sampling.presence_penalty, sampling.frequency_penalty))
    if ngram := getattr(defaults, "no_repeat_ngram_size", None):
        chosen.append(NoRepeatNGramLogitsProcessor(ngram))
    ending = sorted(sequence.ending_ids)
    if bad_words := getattr(defaults, "bad_words_ids", None):
        chosen.append(NoBadWordsLogitsProcessor(bad_words, torch.tensor(ending, device=device) if ending else None))
    if sequence.min_tokens and ending:
        chosen.append(
            MinNewTokensLengthLogitsProcessor(sequence.prompt_length, sequence.min_tokens, ending, device=str(device))
        )
    if suppressed := getattr(defaults, "suppress_tokens", None):
        chosen.append(SuppressTokensLogitsProcessor(suppressed, device=str(device)))
    return chosen


def _warpers(sequence: Sequence) -> LogitsProcessorList:
    """What shapes the distribution of sampled answers."""
    sampling = sequence.sampling
    chosen = LogitsProcessorList()
    if sampling.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chosen.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        chosen.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chosen.append(MinPLogitsWarper(sampling.min_p))
    return chosen


class _CountPenalty(LogitsProcessor):
    """Presence and frequency penalty over the generated tokens, as OpenAI documents them: logit -= presence·[n>0] +
    frequency·n."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._prompt_length = prompt_length
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(scores)
        generated = input_ids[:, self._prompt_length :]
        counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts
