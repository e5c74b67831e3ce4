"""The handler every worker serves, whatever carries it. Needs the standard library only.

A request is `{"mode": …, "n": …}`; an item is ~35 bytes of JSON unless the table says otherwise,
`expected_items(n)` are the items of a right answer.

| mode | answer |
|---|---|
| `fast` | n items without waiting |
| `paced` | n items, one per scheduler step; one step wakes all paced streams at once (`benchmarks.steps`) |
| `idle` | one item, then silence until a `release`, then a second item |
| `release` | wakes all idle streams; one item, how many there were |
| `large` | one item, a text of n characters |
| `census` | one item: idle streams now, CPU seconds and resident bytes of this process |
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.children import resident_bytes
from benchmarks.steps import Steps

__all__ = ["ENDPOINT", "expected_items", "generate"]

ENDPOINT = "demo.backend.generate"

Item = dict[str, Any]

_steps = Steps()
_idle: set[asyncio.Future[None]] = set()


def expected_items(n: int) -> list[Item]:
    """What a right answer to a `fast`, `paced` (n items) or `idle` (n = 2) request holds."""
    return [{"token_ids": [i], "text": "tok"} for i in range(n)]


async def generate(request: Item, context: object = None) -> AsyncIterator[Item | str]:
    """The handler. `context` differs between contenders and is not looked at."""
    mode, n = request["mode"], request["n"]
    if mode == "fast":
        for i in range(n):
            yield {"token_ids": [i], "text": "tok"}
    elif mode == "paced":
        with _steps.ticks() as ticks:
            for i in range(n):
                await ticks.get()
                yield {"token_ids": [i], "text": "tok"}
    elif mode == "idle":
        released = asyncio.get_running_loop().create_future()
        _idle.add(released)
        try:
            yield {"token_ids": [0], "text": "tok"}
            await released
            yield {"token_ids": [1], "text": "tok"}
        finally:
            _idle.discard(released)
    elif mode == "release":
        yield _release()
    elif mode == "large":
        yield "x" * n
    elif mode == "census":
        gc.collect()
        yield {"idle": len(_idle), "cpu": time.process_time(), "resident": resident_bytes()}
    else:
        raise ValueError(f"unknown mode {mode!r}")


def _release() -> Item:
    waiting = [released for released in _idle if not released.done()]
    for released in waiting:
        released.set_result(None)
    return {"released": len(waiting)}
