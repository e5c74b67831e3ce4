"""Answers as OpenAI's clients read them: chunks of a stream, whole objects, usage.

A chunk of plain text is three pieces of bytes, two of them made once per choice; only the text is encoded. This is the
token path.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from stator.llm.postprocess import TextDelta, TokenLogprob

__all__ = ["CHAT_SHAPE", "TEXT_SHAPE", "ChunkWriter", "FinishedChoice", "Shape", "Usage"]

_encode = msgspec.json.Encoder().encode


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Counts of tokens; the details only if the worker told them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int | None] | None = None
    completion_tokens_details: dict[str, int | None] | None = None


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How an API writes one choice of a chunk: what stands before its text (first, later, without text) and after."""

    id_prefix: str
    whole: str
    chunk: str
    first: bytes
    text: bytes
    no_text: bytes
    close: bytes


CHAT_SHAPE = Shape(
    id_prefix="chatcmpl-",
    whole="chat.completion",
    chunk="chat.completion.chunk",
    first=b'"delta":{"role":"assistant","content":',
    text=b'"delta":{"content":',
    no_text=b'"delta":{',
    close=b"}",
)
TEXT_SHAPE = Shape(
    id_prefix="cmpl-",
    whole="text_completion",
    chunk="text_completion",
    first=b'"text":',
    text=b'"text":',
    no_text=b'"text":""',
    close=b"",
)


class FinishedChoice(msgspec.Struct, kw_only=True):
    """One choice of a unary answer."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: list[TokenLogprob] | None


class _Head:
    """What is known of a choice's chunks before their text."""

    __slots__ = ("first", "no_text", "offset", "text")

    def __init__(self, envelope: bytes, index: int, shape: Shape) -> None:
        opening = b'%b"choices":[{"index":%d,' % (envelope, index)
        self.first: bytes | None = opening + shape.first
        """None once the choice had its first chunk"""
        self.text = opening + shape.text
        self.no_text = opening + shape.no_text
        self.offset = 0
        """characters of the tokens so far; kept up with log probabilities only"""


class ChunkWriter:
    """Writes the answer to one request; `id`, `created` (wall time in seconds) and `model` are the same in all of it."""

    def __init__(self, shape: Shape, *, id: str, created: int, model: str, choices: int, include_usage: bool) -> None:
        self._shape = shape
        self._id = shape.id_prefix + id
        self._created = created
        self._model = model
        common = {"id": self._id, "object": shape.chunk, "created": created, "model": model, "system_fingerprint": None}
        self._envelope = b"data: " + _encode(common)[:-1] + b","
        self._heads = [_Head(self._envelope, index, shape) for index in range(choices)]
        self._null_usage = b',"usage":null' if include_usage else b""
        self._plain_end = shape.close + b',"logprobs":null,"finish_reason":null}]' + self._null_usage + b"}\n\n"

    def write(self, out: list[bytes], index: int, deltas: Iterable[TextDelta], usage: Usage | None = None) -> None:
        """Append the events for the next `deltas` of choice `index`; `usage` if the client wants the running one."""
        head = self._heads[index]
        text, end = head.text, self._plain_end
        for delta in deltas:
            if delta.finish_reason is None and delta.logprobs is None and head.first is None and usage is None:
                out += (text, _encode(delta.text), end)
            else:
                self._write_any(out, head, delta, usage)

    def _write_any(self, out: list[bytes], head: _Head, delta: TextDelta, usage: Usage | None) -> None:
        shape = self._shape
        if head.first is not None:
            out += (head.first, _encode(delta.text))
            head.first = None
        elif delta.text:
            out += (head.text, _encode(delta.text))
        else:
            out.append(head.no_text)
        out += (shape.close, b',"logprobs":', _encode(self._logprobs(delta.logprobs, head)))
        out += (b',"finish_reason":', _encode(delta.finish_reason), b"}]")
        out += (self._null_usage if usage is None else b',"usage":' + _encode(usage), b"}\n\n")

    def usage_event(self, usage: Usage) -> bytes:
        """The one chunk without choices."""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._envelope, _encode(usage))

    def whole(self, choices: Sequence[FinishedChoice], usage: Usage) -> bytes:
        """The unary answer."""
        return _encode(
            {
                "id": self._id,
                "object": self._shape.whole,
                "created": self._created,
                "model": self._model,
                "system_fingerprint": None,
                "choices": [self._whole_choice(choice) for choice in choices],
                "usage": usage,
            }
        )

    def _whole_choice(self, choice: FinishedChoice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.logprobs, _Head(b"", choice.index, self._shape))
        if self._shape is CHAT_SHAPE:
            content: dict[str, Any] = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        else:
            content = {"text": choice.text}
        return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _logprobs(self, entries: list[TokenLogprob] | None, head: _Head) -> dict[str, Any] | None:
        if entries is None:
            return None
        if self._shape is CHAT_SHAPE:
            return {
                "content": [{**_entry(each), "top_logprobs": [_entry(top) for top in each.top]} for each in entries],
                "refusal": None,
            }
        return _completion_logprobs(entries, head)


def _entry(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.token, "logprob": entry.logprob, "bytes": entry.bytes}


def _completion_logprobs(entries: list[TokenLogprob], head: _Head) -> dict[str, Any]:
    offsets: list[int] = []
    for entry in entries:
        offsets.append(head.offset)
        head.offset += len(bytes(entry.bytes).decode(errors="ignore"))
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{top.token: top.logprob for top in entry.top} for entry in entries],
        "text_offset": offsets,
    }
