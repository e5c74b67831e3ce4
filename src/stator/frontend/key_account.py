"""What one API key may do, and has used of it: two buckets and a count of running requests.

    begin ─▶ prompt ─▶ generated … ─▶ end

Tokens of a prompt are taken before it goes to a worker, those of the answer as they come. The answer cannot be stopped for want of
tokens, so that it may overdraw; while a key is overdrawn nothing begins, and what refills pays the debt first.
"""

import math
from typing import Literal

from stator.frontend.errors import Failure, Rejected, rate_limited
from stator.frontend.key_file import KeyRecord
from stator.frontend.key_metrics import KeyCounters
from stator.frontend.rate_headers import rate_headers
from stator.frontend.token_bucket import TokenBucket

__all__ = ["Grant", "KeyAccount"]

_BUSY_RETRY = 1.0
"""seconds after which a request refused for the number of running ones may be tried again: nobody knows when one ends"""


class KeyAccount:
    """One key. Its limits hold for `shares` processes together: each gives its part. Times are monotonic, in seconds."""

    __slots__ = ("_shares", "counters", "record", "requests", "running", "tokens")

    def __init__(self, record: KeyRecord, *, shares: int, counters: KeyCounters, now: float) -> None:
        self._shares = shares
        self.counters = counters
        self.running = 0
        self.requests: TokenBucket | None = None
        self.tokens: TokenBucket | None = None
        self.change(record, now)

    def change(self, record: KeyRecord, now: float) -> None:
        """Other limits from now on; what was used stays used."""
        self.record = record
        self.requests = self._changed(self.requests, record.requests_per_minute, now)
        self.tokens = self._changed(self.tokens, record.tokens_per_minute, now)

    def _changed(self, bucket: TokenBucket | None, limit: int | None, now: float) -> TokenBucket | None:
        if limit is None:
            return None
        part = limit / self._shares
        if bucket is None:
            return TokenBucket(part, now)
        bucket.relimit(part, now)
        return bucket

    @property
    def name(self) -> str:
        """The key's name, which is the tenant."""
        return self.record.name

    def begin(self, now: float) -> "Grant":
        """Let one more request in. Raises `Rejected` with 429, and then nothing was used."""
        record, concurrent = self.record, self.record.concurrent_requests
        if concurrent is not None and self.running >= max(1, concurrent // self._shares):
            raise self._refusal("concurrent", "requests", f"{self._limit(concurrent)} requests at one time", _BUSY_RETRY)
        if self.tokens is not None and self.tokens.level(now) <= 0:
            raise self._refusal("tokens", "tokens", self._tokens_text(), self.tokens.wait(1.0, now))
        if self.requests is not None and not self.requests.take(1.0, now):
            text = f"{self._limit(record.requests_per_minute or 0)} requests per minute"
            raise self._refusal("requests", "requests", text, self.requests.wait(1.0, now))
        self.running += 1
        self.counters.requests.inc()
        return Grant(self)

    def take_prompt(self, tokens: int, now: float) -> None:
        """Take the tokens of a prompt. Raises `Rejected` with 429, and then none were taken."""
        if self.tokens is not None and not self.tokens.take(tokens, now):
            text = f"{self._tokens_text()}, and the prompt has {tokens}"
            raise self._refusal("tokens", "tokens", text, self.tokens.wait(tokens, now))
        self.counters.prompt.value += tokens

    def check_model(self, model: str) -> None:
        """Raises `Rejected` with 403 for a model that is not this key's."""
        if not self.record.allows(model):
            text = f"The API key `{self.name}` does not allow the model `{model[:200]}`."
            raise self.forbidden("model", text, param="model", code="model_not_allowed")

    def forbidden(self, reason: str, text: str, *, param: str | None = None, code: str) -> Rejected:
        """403, counted."""
        self.counters.refused(reason)
        return Rejected(Failure(status=403, message=text, param=param, code=code, label="forbidden"))

    def headers(self, now: float) -> dict[str, str]:
        """What an answer says of the limits."""
        headers: dict[str, str] = {}
        if self.requests is not None:
            headers |= rate_headers("requests", self.requests, now)
        if self.tokens is not None:
            headers |= rate_headers("tokens", self.tokens, now)
        return headers

    def _refusal(self, reason: str, kind: Literal["requests", "tokens"], text: str, wait: float) -> Rejected:
        self.counters.refused(reason)
        text = f"Rate limit of the API key `{self.name}` reached: {text}"
        return Rejected(rate_limited(text, kind=kind, wait=None if math.isinf(wait) else wait))

    def _tokens_text(self) -> str:
        return f"{self._limit(self.record.tokens_per_minute or 0)} tokens per minute"

    def _limit(self, limit: int) -> str:
        return str(limit) if self._shares == 1 else f"{limit} (at each of {self._shares} frontends its part of it)"


class Grant:
    """The right of one request. Bring it to its `end` exactly once, whatever becomes of it."""

    __slots__ = ("_account", "_generated", "_prompt")

    def __init__(self, account: KeyAccount) -> None:
        self._account = account
        self._prompt = 0
        self._generated = 0

    def prompt(self, tokens: int, now: float) -> None:
        """See `KeyAccount.take_prompt`."""
        self._account.take_prompt(tokens, now)
        self._prompt = tokens

    def generated(self, tokens: int, now: float) -> None:
        """So many tokens of the answer came. Token path: once per batch."""
        account = self._account
        account.counters.completion.value += tokens
        self._generated += tokens
        if account.tokens is not None:
            account.tokens.charge(tokens, now)

    def end(self, now: float, *, for_nothing: bool) -> None:
        """The request is over. `for_nothing`: we refused it, and if it got no token it costs none and does not count."""
        account = self._account
        account.running -= 1
        if for_nothing and not self._generated:
            if account.requests is not None:
                account.requests.give_back(1.0, now)
            if account.tokens is not None:
                account.tokens.give_back(self._prompt, now)
