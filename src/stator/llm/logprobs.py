"""Log probabilities for clients: of each shown token, and of the alternatives to it (`spec/50 §2.4`)."""

from collections import deque

import msgspec

from stator.llm.output import EngineOutput, TopLogprob
from stator.llm.tokenizer import Tokenizer

__all__ = ["LogprobCollector", "TokenLogprob"]

IMPOSSIBLE = -9999.0
"""what OpenAI writes for a probability of zero"""


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One token; `bytes` are its own bytes, which may be a part of a character. `top` are the best alternatives, best first."""

    token: str
    token_id: int
    logprob: float
    bytes: list[int]
    top: list["TokenLogprob"] = []


class LogprobCollector:
    """Keeps the entries of tokens whose text is held back, so that text and entries leave together."""

    def __init__(self, tokenizer: Tokenizer, *, top: int, as_ids: bool) -> None:
        """`top`: how many alternatives to show; `as_ids`: write tokens as `token_id:<id>`."""
        self._tokenizer = tokenizer
        self._top = top
        self._as_ids = as_ids
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()

    def add(self, output: EngineOutput, position: int, *, start: int) -> None:
        """Note token `position` of `output`, whose text begins at character `start` of the answer."""
        logprobs, alternatives = output.log_probs, output.top_logprobs
        if logprobs is None or position >= min(len(logprobs), len(output.token_ids)):
            return
        token_id = output.token_ids[position]
        given = alternatives[position] if alternatives is not None and position < len(alternatives) else []
        own = next((each for each in given if each.token_id == token_id), None) or TopLogprob(token_id=token_id)
        top = [self._entry(each, each.logprob) for each in given[: self._top]]
        self._waiting.append((start, self._entry(own, logprobs[position], top)))

    def take(self, shown: int | None) -> list[TokenLogprob] | None:
        """The entries of tokens that begin before character `shown`; None means all. None if there are none."""
        taken: list[TokenLogprob] = []
        while self._waiting and (shown is None or self._waiting[0][0] < shown):
            taken.append(self._waiting.popleft()[1])
        return taken or None

    def _entry(self, token: TopLogprob, logprob: float | None, top: list[TokenLogprob] | None = None) -> TokenLogprob:
        text = token.token
        if text is None:
            text = self._tokenizer.decode([token.token_id], skip_special=False)
        data = token.bytes
        if data is None:
            known = self._tokenizer.token_bytes(token.token_id) if token.token is None else None
            data = list(text.encode(errors="replace") if known is None else known)
        return TokenLogprob(
            token=f"token_id:{token.token_id}" if self._as_ids else text,
            token_id=token.token_id,
            logprob=IMPOSSIBLE if logprob is None else max(logprob, IMPOSSIBLE),
            bytes=data,
            top=top or [],
        )
