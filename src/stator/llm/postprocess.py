"""From a worker's items to what a client reads: text, the reason it ended, counts (`spec/50 §13`). One object per choice.

This is the token path of the frontend. An item of one token with nothing special about it takes the short way in `push`;
everything else takes `_take`, which is the whole meaning.
"""

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from stator.errors import EngineError
from stator.llm.detokenizer import open_detokenizer
from stator.llm.logprobs import LogprobCollector, TokenLogprob
from stator.llm.output import CompletionUsage, EngineOutput, FinishError
from stator.llm.request import PreprocessedRequest
from stator.llm.stop import StopMatch, StopRules, StopScanner
from stator.llm.tokenizer import Tokenizer

__all__ = ["Postprocessor", "TextDelta", "TokenLogprob"]

_FINISH = {
    "eos": "stop",
    "stop": "stop",
    "cancelled": "stop",
    "abort": "stop",
    "length": "length",
    "content_filter": "content_filter",
}
_UNLIMITED = 2**62


class TextDelta(msgspec.Struct, frozen=True, gc=False):
    """The next piece of a choice; one chunk of a stream.

    `tokens` were received since the delta before, hidden ones included. `finish_reason` is `stop`, `length` or `content_filter`
    on the last delta, else None; `stop_reason` is the stop string or the client's stop token id that ended it.
    """

    text: str
    tokens: int
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None


class Postprocessor:
    """The way out for one choice: `push` items in order until `done`, then kill the stream; `finish` when it ends by itself."""

    done: bool
    """the choice is complete; what the worker still sends is not wanted"""
    completion_tokens: int
    """tokens received and counted, hidden ones included"""
    usage: CompletionUsage | None
    """the worker's own count, from the last item that had one: `prompt_tokens` and its details win over ours"""

    def __init__(self, tokenizer: Tokenizer, request: PreprocessedRequest, *, top_logprobs: int | None = None) -> None:
        """`top_logprobs`: alternatives to show per token; by default as many as the request asks the worker for."""
        options, rules = request.output_options, StopRules.of(request)
        self.done = False
        self.completion_tokens = 0
        self.usage = None
        self._rules = rules
        self._limit = _UNLIMITED if rules.max_tokens is None else rules.max_tokens
        self._hidden = rules.silent | rules.reported
        self._enders = self._hidden | rules.visible
        self._detokenizer = open_detokenizer(
            tokenizer, context=request.token_ids, skip_special=options.skip_special_tokens is not False
        )
        self._decode = self._detokenizer.push
        self._scanner = StopScanner(rules.strings, include=rules.include_string) if rules.strings else None
        self._logprobs = None
        if options.logprobs is not None:
            top = options.logprobs if top_logprobs is None else top_logprobs
            as_ids = bool(options.return_tokens_as_token_ids)
            self._logprobs = LogprobCollector(tokenizer, top=top, as_ids=as_ids)
        self._plain = self._scanner is None and self._logprobs is None and not rules.min_tokens
        self._reported = 0
        """tokens already told in deltas"""
        self._seen = 0
        """characters detokenised; kept up with log probabilities only"""
        self._shown = 0
        """characters given out; kept up with log probabilities only"""

    def push(self, output: EngineOutput) -> TextDelta | None:
        """Take the next item; None when it shows nothing yet. After `done`: always None.

        Raises `EngineError` when the worker ended the choice with an error, or for a reason nobody knows.
        """
        if (
            self._plain
            and output.finish_reason is None
            and output.text is None
            and output.completion_usage is None
            and not self.done
        ):
            ids = output.token_ids
            if len(ids) == 1 and ids[0] not in self._enders and (count := self.completion_tokens) < self._limit:
                self.completion_tokens = count = count + 1
                text = self._decode(ids[0])
                if not text:
                    return None
                tokens, self._reported = count - self._reported, count
                return TextDelta(text, tokens)
        return None if self.done else self._take(output)

    def push_many(self, outputs: Iterable[EngineOutput]) -> list[TextDelta]:
        """Take items in order; the deltas they give, at most one each."""
        push = self.push
        return [delta for output in outputs if (delta := push(output)) is not None]

    def finish(self) -> TextDelta | None:
        """The worker's stream is at its end. None if the choice was `done`; else its last delta.

        A worker that did not say why it ended is taken to have stopped, or to have reached `max_tokens` if it sent that many.
        """
        if self.done:
            return None
        return self._end("", "length" if self.completion_tokens >= self._limit else "stop", None)

    def _take(self, output: EngineOutput) -> TextDelta | None:
        finish = _finish_reason(output)
        if output.completion_usage is not None:
            self.usage = output.completion_usage
        cut = self._cut(output.token_ids)
        text = ""
        for position, piece in enumerate(self._pieces(output, cut)):
            self.completion_tokens += position < len(output.token_ids)
            if self._logprobs is not None:
                self._logprobs.add(output, position, start=self._seen)
                self._seen += len(piece)
            shown = self._scan(piece)
            text += shown.text if isinstance(shown, StopMatch) else shown
            if isinstance(shown, StopMatch):
                return self._end(text, "stop", shown.string, matched=True)
        if cut is not None:
            self.completion_tokens += cut.counted - cut.shown
            return self._end(text, cut.reason, cut.token)
        if finish is not None:
            return self._end(text, finish, output.stop_reason)
        return self._delta(text) if text else None

    def _cut(self, ids: list[int]) -> "_Cut | None":
        """Where one of `ids` ends the choice; None if none does."""
        rules, before = self._rules, self.completion_tokens
        for position, token in enumerate(ids):
            if before + position >= self._limit:
                return _Cut(position, position, "length", None)
            if token in self._enders and before + position >= rules.min_tokens:
                shown = position + (token in rules.visible)
                return _Cut(shown, position + 1, "stop", None if token in rules.silent else token)
        return None

    def _pieces(self, output: EngineOutput, cut: "_Cut | None") -> list[str]:
        """The text of each token to be shown. The worker's own text is that of all its tokens: it counts with the last one."""
        ids = output.token_ids if cut is None else output.token_ids[: cut.shown]
        if output.text is not None and cut is None:
            return [""] * (len(ids) - 1) + [output.text]
        # A hidden token that is still here came too early to end anything.
        return ["" if token in self._hidden else self._decode(token) for token in ids]

    def _scan(self, text: str) -> str | StopMatch:
        if self._scanner is None or not text:
            return text
        minimum = self._rules.min_tokens
        return self._scanner.feed(text, armed=not minimum or self.completion_tokens > minimum)

    def _end(self, text: str, reason: str, cause: str | int | None, *, matched: bool = False) -> TextDelta:
        """The last delta. Unless a stop string matched, what was held back is text after all."""
        self.done = True
        if not matched:
            rest = self._scan(self._detokenizer.flush())
            if isinstance(rest, StopMatch):
                text, reason, cause, matched = text + rest.text, "stop", rest.string, True
            else:
                text += rest + (self._scanner.release() if self._scanner is not None else "")
        return self._delta(text, reason, cause, matched=matched)

    def _delta(
        self, text: str, reason: str | None = None, cause: str | int | None = None, *, matched: bool = False
    ) -> TextDelta:
        tokens, self._reported = self.completion_tokens - self._reported, self.completion_tokens
        logprobs = None
        if self._logprobs is not None:
            self._shown += len(text)
            # Entries of tokens inside a stop string are not shown; at any other end all are.
            logprobs = self._logprobs.take(None if reason is not None and not matched else self._shown)
        return TextDelta(text, tokens, reason, cause, logprobs)


class _Cut(NamedTuple):
    """A token rule ends the choice: the first `shown` tokens of the item are shown, the first `counted` are counted."""

    shown: int
    counted: int
    reason: str
    token: int | None
    """the client's stop token, if it was one"""


def _finish_reason(output: EngineOutput) -> str | None:
    """The worker's reason in OpenAI's words."""
    given = output.finish_reason
    if given is None:
        return None
    if isinstance(given, FinishError):
        raise EngineError(given.error)
    reason = _FINISH.get(given)
    if reason is None:
        raise EngineError(f"the worker ended the answer with the unknown finish reason {given[:64]!r}")
    return reason
