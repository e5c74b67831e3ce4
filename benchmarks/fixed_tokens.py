"""What the workers of `http_serving` answer: the same four tokens over and over, until `max_tokens`."""

from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.steps import Steps

__all__ = ["MODEL_NAME", "FixedTokens", "fixed_tokens"]

MODEL_NAME = "tiny"


def fixed_tokens(model: Path) -> list[int]:
    """Four token ids of the model's tokenizer."""
    return Tokenizer.from_file(str(model / "tokenizer.json")).encode("hello world the weather").ids[:4]


class FixedTokens:
    """`step` is the seconds between two tokens of a stream, all streams at once; 0 sends without delay."""

    def __init__(self, model: Path, step: float) -> None:
        self._ids = fixed_tokens(model)
        self._steps = Steps(step) if step else None

    async def stream(self, count: int) -> AsyncIterator[tuple[list[int], str | None]]:
        """`count` times the token ids of one item (one id) and the finish reason, `length` in the last."""
        ids, last = self._ids, count - 1
        waiting = self._steps.ticks() if self._steps is not None else nullcontext()
        with waiting as ticks:
            for i in range(count):
                if ticks is not None:
                    await ticks.get()
                yield [ids[i & 3]], "length" if i == last else None
