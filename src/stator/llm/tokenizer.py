"""Text to token ids and back: the built-in byte tokenizer, and Hugging Face tokenizers of real models.

The byte tokenizer takes any text, needs no files, and is its own inverse: one token per UTF-8 byte.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from stator.errors import UsageError
from stator.llm.pieces import PieceTable

if TYPE_CHECKING:
    import tokenizers

__all__ = ["ByteTokenizer", "HuggingFaceTokenizer", "Tokenizer"]


class Tokenizer(Protocol):
    """Stateless after construction and safe to use from several threads."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer; may be empty."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def pieces(self) -> PieceTable | None:
        """The bytes of all tokens, if a text is the joined bytes of its tokens; None if this tokenizer is not of that kind."""
        ...

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`. `special`: also add what the model wants around a text, e.g. a begin-of-sequence token.

        Raises `UsageError` for text that is no Unicode (a lone surrogate).
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids without a token become nothing."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes one token stands for, where that can be told."""
        ...


class ByteTokenizer:
    """Ids 0…255 are the bytes of the text in UTF-8; then come the special tokens of `SPECIAL`, which no text encodes to."""

    SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    END = 256
    """`<|endoftext|>`: what an engine sends to end an answer"""

    def __init__(self) -> None:
        raw = [bytes((value,)) for value in range(256)] + [token.encode() for token in self.SPECIAL]
        self._pieces = PieceTable(raw, special=frozenset(range(256, len(raw))))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (self.END, self.END + self.SPECIAL.index("<|im_end|>"))

    @property
    def vocab_size(self) -> int:
        return len(self._pieces.raw)

    @property
    def pieces(self) -> PieceTable:
        return self._pieces

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return list(_utf8(text))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        if not skip_special:
            return b"".join(self._pieces.bytes(token) or b"" for token in ids).decode(errors="replace")
        return bytes(token for token in ids if 0 <= token < 256).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes | None:
        return self._pieces.bytes(token_id)


class _Step(msgspec.Struct, frozen=True):
    type: str = ""
    decoders: list["_Step"] = []


class _DecoderOnly(msgspec.Struct, frozen=True):
    """The one part of `tokenizer.json` that is read here; the rest, megabytes of vocabulary, is skipped over."""

    decoder: _Step | None = None


_FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer:
    """A `tokenizer.json`. Loading takes up to seconds for a large vocabulary: do it in a thread."""

    def __init__(self, path: str | Path, *, eos_token_ids: Sequence[int] = ()) -> None:
        """`path` is the file or its directory. Raises `UsageError` when it cannot be read or the extra is missing."""
        path = Path(path)
        self._path = path / "tokenizer.json" if path.is_dir() else path
        self._tokenizer = _load(self._path)
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def pieces(self) -> PieceTable | None:
        return self._table

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, e.g. `<|im_end|>`."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        _utf8(text)
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes | None:
        if self.pieces is not None:
            return self.pieces.bytes(token_id)
        token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None or "ByteFallback" not in self._decoders:
            return None
        fallback = _FALLBACK_BYTE.fullmatch(token)
        return bytes.fromhex(fallback[1]) if fallback else token.replace("▁", " ").encode()

    @cached_property
    def _table(self) -> PieceTable | None:
        """Built on first use, up to a second; given only if every entry agrees with the tokenizer's own decoding."""
        if self._decoders != ["ByteLevel"]:
            return None
        raw = [_byte_level(self._tokenizer.id_to_token(token) or "") for token in range(self.vocab_size)]
        alone = [self.decode([token], skip_special=False) for token in range(self.vocab_size)]
        if any(piece.decode(errors="replace") != text for piece, text in zip(raw, alone, strict=True)):
            return None
        added = self._tokenizer.get_added_tokens_decoder()
        return PieceTable(raw, special=frozenset(token for token, entry in added.items() if entry.special))

    @cached_property
    def _decoders(self) -> list[str]:
        """Types of the decoding steps, in order."""
        decoder = msgspec.json.decode(self._path.read_bytes(), type=_DecoderOnly).decoder or _Step()
        return [step.type for step in (decoder.decoders if decoder.type == "Sequence" else [decoder])]


def _load(path: Path) -> "tokenizers.Tokenizer":
    try:
        from tokenizers import Tokenizer as Native
    except ImportError as error:
        raise UsageError("real models need the extra 'models': pip install 'stator[models]'") from error
    try:
        tokenizer = Native.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"cannot load the tokenizer {path}: {error}") from error
    # A file saved after training may carry the limits of the training batches.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """By printable stand-in: the byte it means in a byte-level vocabulary. Unprintable bytes have theirs from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + place): value for place, value in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    """The bytes of a vocabulary entry. Added tokens may have characters outside the alphabet; they stand for themselves."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the text is not valid Unicode: lone surrogate at character {error.start}") from error
