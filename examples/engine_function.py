"""An engine in one function: it answers in capital letters.

    stator serve --engine engine_function:shout

in this directory; clients ask for the model "shout". Everything else (the end at `max_tokens`, cancellation, usage, metrics, health) is
done for it. An engine with a model to load, slots and a cache is a class: `engine_class.py`.
"""

import asyncio
from collections.abc import AsyncIterator

from stator.llm.request import PreprocessedRequest


async def shout(request: PreprocessedRequest) -> AsyncIterator[str]:
    for letter in bytes(request.token_ids).decode().upper():
        await asyncio.sleep(0.02)  # here a model would think, in a thread
        yield letter
