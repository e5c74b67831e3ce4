"""One answer in the making: its tokens so far and the rules that end it. No tensors here."""

from typing import Any

import msgspec

__all__ = ["Finish", "Sampling", "Sequence", "TokenChoice", "TopToken"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. The defaults change nothing: greedy, no penalty.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off. `seed` makes a sampled answer repeatable.
    `logprobs`: None for none, else how many of the likeliest tokens are reported beside the chosen one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logprobs: int | None = None


class TopToken(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a position; `rank` counts from 1."""

    rank: int
    token_id: int
    logprob: float


class TokenChoice(msgspec.Struct, frozen=True):
    """The outcome of one step for one sequence. `logprob` is set when the sequence asked for it."""

    token_id: int
    logprob: float | None = None
    top: tuple[TopToken, ...] = ()


class Finish(msgspec.Struct, frozen=True):
    """Why a sequence ended: `reason` as on the wire (`eos`, `stop`, `length`); `token_id` is the stop token that was met."""

    reason: str
    token_id: int | None = None


class Sequence:
    """A prompt and what was generated after it. Written by the step thread alone, except `cancelled`.

    `tokens` (length n ≥ 1) starts with the `prompt_length` ids of the prompt. `state` and `read` belong to the model; `read` is
    how many tokens a prefill has read. `cancelled` is set by the event loop; the step thread drops the sequence before its next
    step.
    """

    __slots__ = (
        "cancelled",
        "eos_ids",
        "max_tokens",
        "min_tokens",
        "prompt_length",
        "read",
        "sampling",
        "state",
        "stop_ids",
        "tokens",
    )

    def __init__(
        self,
        prompt: list[int],
        *,
        sampling: Sampling,
        max_tokens: int,
        min_tokens: int = 0,
        eos_ids: frozenset[int] = frozenset(),
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.min_tokens = min_tokens
        self.eos_ids = eos_ids
        self.stop_ids = stop_ids
        self.state: Any = None
        self.read = 0
        self.cancelled = False

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def ending_ids(self) -> frozenset[int]:
        """Every token that ends this sequence."""
        return self.eos_ids | self.stop_ids

    def append(self, token_id: int) -> Finish | None:
        """Take the next token, which stays part of the answer even if it ends it. Not None: the sequence is finished."""
        self.tokens.append(token_id)
        count = len(self.tokens) - self.prompt_length
        if count >= self.min_tokens:
            if token_id in self.eos_ids:
                return Finish("eos", token_id)
            if token_id in self.stop_ids:
                return Finish("stop", token_id)
        return Finish("length") if count >= self.max_tokens else None
