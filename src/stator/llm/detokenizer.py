"""Token ids to text, one at a time, never half a character.

However an answer is cut into items, the texts joined are what decoding all of its tokens at once gives, bytes that are no
UTF-8 included: those become U+FFFD as soon as it is certain that nothing can complete them, at the latest on `flush`.
(One exception, for tokenizers with byte fallback: decoding at once gives up a whole run of fallback bytes when one of
them is wrong; here the characters that were complete before it have been shown.)
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

from stator.llm.pieces import PieceTable
from stator.llm.tokenizer import Tokenizer

__all__ = ["Detokenizer", "OffsetDetokenizer", "PieceDetokenizer", "open_detokenizer"]


class Detokenizer(Protocol):
    """The text of one choice as it grows."""

    def push(self, token_id: int) -> str:
        """The text that is certain now; "" while a character is incomplete or the token is hidden."""
        ...

    def flush(self) -> str:
        """What is left at the end of the answer."""
        ...


def open_detokenizer(tokenizer: Tokenizer, *, context: Sequence[int] = (), skip_special: bool = True) -> Detokenizer:
    """The fastest detokenizer for `tokenizer`. `context`: the tokens before the answer, which decide about a leading space."""
    if tokenizer.pieces is not None:
        return PieceDetokenizer(tokenizer.pieces, skip_special=skip_special)
    return OffsetDetokenizer(tokenizer, context=context, skip_special=skip_special)


class PieceDetokenizer:
    """For tokenizers with a piece table: one look-up for a token of whole characters, an incremental decoder for the rest."""

    __slots__ = ("_pending", "_raw", "_texts")

    def __init__(self, pieces: PieceTable, *, skip_special: bool = True) -> None:
        self._raw = pieces.raw
        self._texts = pieces.texts(skip_special=skip_special)
        self._pending = b""

    def push(self, token_id: int) -> str:
        """Token path."""
        try:
            text = self._texts[token_id]
        except IndexError:
            return ""
        if text is None or (self._pending and text):
            return self._join(token_id)
        return text

    def _join(self, token_id: int) -> str:
        data = self._pending + self._raw[token_id]
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def flush(self) -> str:
        text = self._pending.decode(errors="replace")
        self._pending = b""
        return text


class OffsetDetokenizer:
    """For any tokenizer: decode the last few tokens twice, without and with the new one, and show the difference.

    Decoding from a token that was shown before keeps what depends on the place in the text, e.g. a leading space; the window
    is short, so that the cost per token does not grow with the answer.
    """

    _CONTEXT = 5
    """tokens of the prompt in the first window"""
    _PATIENCE = 8
    """tokens without new text before the window moves on; a character has at most 4 bytes"""

    def __init__(self, tokenizer: Tokenizer, *, context: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window = list(context[-self._CONTEXT :])
        self._shown_tokens = len(self._window)
        self._shown = self._decode()

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode()
        incomplete = len(text) <= len(self._shown) or text.endswith("\ufffd")
        if incomplete and len(self._window) - self._shown_tokens <= self._PATIENCE:
            return ""
        return self._show(text)

    def flush(self) -> str:
        return self._show(self._decode())

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        del self._window[: self._shown_tokens]
        self._shown_tokens = len(self._window)
        self._shown = self._decode()
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special=self._skip_special)
