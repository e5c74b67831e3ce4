"""One request with its tokens: a simulated sequence whose answer is made up as it is needed."""

import asyncio
import random
import struct
from array import array
from collections.abc import Sequence as Tokens

from xxhash import xxh3_64_intdigest

from stator.errors import EngineError
from stator.kv.hashing import local_hashes, sequence_hashes
from stator.mocker.sequence import Sequence

__all__ = ["LETTERS", "REFERENCE", "Answer", "answer_seed"]

LETTERS: Tokens[int] = tuple(b"abcdefghijklmnopqrstuvwxyz    ")
"""tokens of the byte tokenizer"""
REFERENCE: Tokens[int] = tuple(range(1000, 2000))
"""what the reference's mocker generates from, whatever the model"""

_AHEAD = 32
"""tokens made at once"""


def answer_seed(prompt: Tokens[int], *, engine_seed: int, request_seed: int | None) -> int:
    """The same for equal requests, wherever and whenever they come; `prompt` are token ids (u32)."""
    seeds = struct.pack("<QQ", engine_seed % 2**64, 0 if request_seed is None else request_seed % 2**64)
    return xxh3_64_intdigest(array("I", prompt).tobytes() + seeds)


class Answer(Sequence):
    """`tokens` are those of the answer made up so far, perhaps more than the scheduler has given yet.

    Raises `EngineError` of kind `InvalidArgument` for a prompt of something else than u32.
    """

    __slots__ = ("_block_size", "_rng", "_seed", "_vocabulary", "error", "lora_name", "prompt", "tokens", "waiter")

    def __init__(
        self,
        prompt: list[int],
        *,
        max_tokens: int,
        block_size: int,
        prefix_caching: bool,
        vocabulary: Tokens[int],
        engine_seed: int,
        request_seed: int | None = None,
        lora_name: str | None = None,
    ) -> None:
        try:
            self._seed = answer_seed(prompt, engine_seed=engine_seed, request_seed=request_seed)
        except (OverflowError, TypeError) as error:
            raise EngineError(f"token_ids must be from 0 to 2**32 - 1: {error}", kind="InvalidArgument") from error
        names = sequence_hashes(local_hashes(prompt, block_size=block_size, lora_name=lora_name)) if prefix_caching else []
        super().__init__(prompt_length=len(prompt), max_tokens=max_tokens, hashes=names, hash_of_next=_hash_of_next)
        self._rng: random.Random | None = None
        self._vocabulary = vocabulary
        self._block_size = block_size
        self.lora_name = lora_name
        self.prompt = prompt
        self.tokens: list[int] = []
        self.waiter: asyncio.Future[None] | None = None
        """whoever reads the answer and has all there is"""
        self.error: Exception | None = None
        """why there will be no more"""

    def read(self, start: int, end: int) -> list[int]:
        """Tokens `start` … `end` - 1 of the answer."""
        if end > len(self.tokens):
            self._reach(end)
        return self.tokens[start:end]

    def block_tokens(self, first: int, count: int) -> list[int]:
        """Prompt and answer together: the tokens of `count` blocks from block `first` on."""
        start, end, prompt = first * self._block_size, (first + count) * self._block_size, len(self.prompt)
        if end <= prompt:
            return self.prompt[start:end]
        return self.prompt[start:] + self.read(max(start - prompt, 0), end - prompt)

    def hash_of(self, index: int) -> int:
        """The hash of full block `index`, all before which have one."""
        local = local_hashes(self.block_tokens(index, 1), block_size=self._block_size, lora_name=self.lora_name)
        return sequence_hashes(local, parent=self.hashes[index - 1] if index else None)[0]

    def wake(self) -> None:
        """Let the reader go on."""
        waiter = self.waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _reach(self, count: int) -> None:
        if self._rng is None:
            self._rng = random.Random(self._seed)
        missing = count - len(self.tokens)
        self.tokens += self._rng.choices(self._vocabulary, k=max(missing, _AHEAD))


def _hash_of_next(sequence: Sequence) -> int:
    assert isinstance(sequence, Answer), "answers have tokens"
    return sequence.hash_of(len(sequence.hashes))
