"""The table that makes detokenising cheap: the bytes of every token, where a text is the joined bytes of its tokens.

Byte-level tokenizers are of this kind. SentencePiece-like ones are not: a token's text depends on its place (a leading space is
dropped at the start), so they have no table.
"""

from collections.abc import Sequence
from functools import cached_property

__all__ = ["PieceTable"]


class PieceTable:
    """`raw[id]` are the bytes of token `id`, b"" for ids without a token; `special` are the ids that are normally hidden."""

    def __init__(self, raw: Sequence[bytes], *, special: frozenset[int]) -> None:
        self.raw = raw
        self.special = special

    def texts(self, *, skip_special: bool) -> Sequence[str | None]:
        """By token id: its text where its bytes are whole characters, None where they are not, "" for hidden tokens."""
        return self._visible if skip_special else self._all

    def bytes(self, token_id: int) -> bytes | None:
        """The bytes of one token, also of a special one; None when there is no such token."""
        return self.raw[token_id] if 0 <= token_id < len(self.raw) else None

    @cached_property
    def _all(self) -> list[str | None]:
        return [_whole(piece) for piece in self.raw]

    @cached_property
    def _visible(self) -> list[str | None]:
        texts = list(self._all)
        for token_id in self.special:
            texts[token_id] = ""
        return texts


def _whole(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None
