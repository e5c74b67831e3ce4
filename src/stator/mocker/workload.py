"""What a simulation is given to do: requests with their times, from a generator or a trace."""

import random
from collections.abc import Iterable
from pathlib import Path

import msgspec

from stator.errors import UsageError

__all__ = ["Arrival", "block_hashes", "mooncake_trace", "read_mooncake_trace", "synthetic_load"]

_MASK = 2**64 - 1


class Arrival(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request. Lengths are in tokens; `time` in seconds from the beginning."""

    time: float
    prompt_tokens: int
    output_tokens: int
    content: tuple[tuple[int, int], ...] = ()
    """(what, tokens) of each part of the prompt: equal beginnings are found in prefix caches. Empty: like no other prompt"""
    session: str = ""
    """requests of one session run one after another, in order; all but the first come `delay` after the end of the one before, and not
    at their `time`"""
    delay: float = 0.0


def synthetic_load(
    *,
    requests: int,
    rate: float,
    prompt_tokens: int,
    output_tokens: int,
    spread: float = 0.0,
    shared_prefix_ratio: float = 0.0,
    num_prefix_groups: int = 1,
    poisson: bool = True,
    seed: int = 0,
) -> list[Arrival]:
    """`rate` requests per second, at random intervals or, without `poisson`, at equal ones; the first comes at 0.

    Lengths are uniform within ± `spread` (0 … 1) of those given. The first `shared_prefix_ratio` of a prompt is that of its group, one of
    `num_prefix_groups` at random.
    """
    if rate <= 0 or prompt_tokens < 1 or output_tokens < 1 or not 0 <= spread <= 1 or not 0 <= shared_prefix_ratio <= 1:
        raise UsageError("rate and lengths must be positive, spread and shared_prefix_ratio from 0 to 1")
    rng = random.Random(seed)
    arrivals: list[Arrival] = []
    time = 0.0
    for number in range(requests):
        prompt = _around(prompt_tokens, spread, rng)
        shared = int(prompt * shared_prefix_ratio)
        own = (2 * number + 1, prompt - shared)
        group = (2 * rng.randrange(num_prefix_groups), shared)
        arrivals.append(
            Arrival(
                time=time,
                prompt_tokens=prompt,
                output_tokens=_around(output_tokens, spread, rng),
                content=(group, own) if shared else (own,),
            )
        )
        time += rng.expovariate(rate) if poisson else 1 / rate
    return arrivals


def _around(length: int, spread: float, rng: random.Random) -> int:
    return max(1, round(length * (1 + spread * (2 * rng.random() - 1)))) if spread else length


class _Row(msgspec.Struct, frozen=True):
    timestamp: float = 0.0
    input_length: int = 0
    output_length: int = 0
    hash_ids: list[int] = []
    session_id: str | None = None
    delay: float = 0.0


def mooncake_trace(lines: Iterable[str | bytes], *, block_size: int = 512) -> list[Arrival]:
    """Rows of a Mooncake trace, one JSON object a line (`spec/50 §24`); `block_size` is what a hash id stands for.

    Raises `UsageError` naming the line that cannot be read.
    """
    arrivals: list[Arrival] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=_Row)
        except msgspec.MsgspecError as error:
            raise UsageError(f"trace line {number} cannot be read: {error}") from error
        if row.input_length < 1 or row.output_length < 1 or len(row.hash_ids) * block_size < row.input_length:
            raise UsageError(f"trace line {number}: lengths must be positive, and hash_ids must cover input_length")
        arrivals.append(
            Arrival(
                time=row.timestamp / 1000,
                prompt_tokens=row.input_length,
                output_tokens=row.output_length,
                content=tuple((hash_id, block_size) for hash_id in row.hash_ids),
                session=row.session_id or "",
                delay=row.delay / 1000,
            )
        )
    return arrivals


def read_mooncake_trace(path: Path, *, block_size: int = 512) -> list[Arrival]:
    """`mooncake_trace` of a file. Blocks."""
    with path.open("rb") as file:
        return mooncake_trace(file, block_size=block_size)


def block_hashes(arrival: Arrival, *, number: int, block_size: int) -> list[int]:
    """Hashes of the prompt's full blocks: equal for equal beginnings, each made from the one before.

    What `content` does not cover is like no other prompt; `number` makes it so.
    """
    hashes: list[int] = []
    parts = iter(arrival.content)
    own = (-1 - number, arrival.prompt_tokens)
    what, end = next(parts, own)
    begin = chained = 0
    for start in range(0, arrival.prompt_tokens - block_size + 1, block_size):
        while end <= start:
            begin = end
            what, length = next(parts, own)
            end += length
        chained = _mixed(chained, what, start - begin)
        while end < start + block_size:  # parts that meet within the block
            begin = end
            what, length = next(parts, own)
            end += length
            chained = _mixed(chained, what, length)
        hashes.append(chained)
    return hashes


def _mixed(before: int, what: int, offset: int) -> int:
    """A 64-bit number that hardly any other three give."""
    value = (before ^ (what & _MASK)) * 0x9E3779B97F4A7C15 + offset * 0xC2B2AE3D27D4EB4F + 0x165667B19E3779F9 & _MASK
    return value ^ value >> 29
