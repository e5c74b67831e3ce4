"""One simulated request, as the scheduler sees it: lengths, blocks and times, but no tokens."""

from collections.abc import Callable
from enum import IntEnum

from stator.mocker.blocks import Block

__all__ = ["Phase", "Sequence"]


class Phase(IntEnum):
    """Where a sequence stands."""

    WAITING = 0
    """has no slot; also after a preemption"""
    PREFILLING = 1
    """has a slot, and not all its tokens are computed"""
    DECODING = 2
    """gets a token in every pass"""
    FINISHED = 3
    """all tokens are there, or it was withdrawn"""
    REJECTED = 4
    """can never run"""


class Sequence:
    """A prompt of `prompt_length` ≥ 1 tokens and an answer of `max_tokens` ≥ 1.

    `hashes` are those of the prompt's full blocks, in order; `hash_of_next` is asked for the hash of the next block when the answer
    has filled it. Everything else belongs to the scheduler. Times are nanoseconds on the scheduler's clock, -1 before they come.
    """

    __slots__ = (
        "admitted_at",
        "base",
        "blocks",
        "cached",
        "computed",
        "due",
        "ended_at",
        "first_token_at",
        "hash_of_next",
        "hashes",
        "index",
        "last_token_at",
        "loose",
        "made",
        "max_tokens",
        "order",
        "phase",
        "preemptions",
        "prompt_length",
        "submitted_at",
    )

    def __init__(
        self,
        *,
        prompt_length: int,
        max_tokens: int,
        hashes: list[int],
        hash_of_next: Callable[["Sequence"], int],
        index: int = 0,
    ) -> None:
        self.prompt_length = prompt_length
        self.max_tokens = max_tokens
        self.hashes = hashes
        self.hash_of_next = hash_of_next
        self.index = index
        """for its owner"""
        self.phase = Phase.WAITING
        self.blocks: list[Block] = []
        """named blocks held, the beginning of the sequence"""
        self.loose = 0
        """blocks held after those"""
        self.computed = 0
        """tokens whose keys and values are in the blocks; not kept up while decoding"""
        self.made = 0
        """tokens of the answer; not kept up while decoding: see `Scheduler.made`"""
        self.base = 0
        """while decoding: the scheduler's count of beats when the answer had no token, as if it had decoded ever since"""
        self.due = 0
        """while decoding: the beat at which it needs a block or ends"""
        self.order = 0
        """place among the running ones"""
        self.cached = 0
        """prompt tokens found in the prefix cache; the most of all admissions"""
        self.preemptions = 0
        self.submitted_at = -1
        self.admitted_at = -1
        self.first_token_at = -1
        self.last_token_at = -1
        """of the last token before a preemption, or of all"""
        self.ended_at = -1

    def hash_at(self, index: int) -> int:
        """The hash of full block `index`, at most one after those asked for before."""
        hashes = self.hashes
        if index == len(hashes):
            hashes.append(self.hash_of_next(self))
        return hashes[index]
