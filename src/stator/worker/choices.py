"""Several answers to one prompt: n requests for one answer each, merged into one stream."""

import asyncio
from collections.abc import AsyncIterator

import msgspec

from stator.errors import EngineError
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.runtime.engine import Engine
from stator.tasks import Scope
from stator.worker.closing import close_stream

__all__ = ["MAX_CHOICES", "Choices"]

MAX_CHOICES = 128
"""what OpenAI allows"""


class Choices:
    """An engine in front of one that generates a single choice. Choice i has the seed plus i, and its items carry `index` i.

    A request for one choice passes through untouched. The first error of any choice ends all of them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        """Items of one choice are in order; those of different choices interleave as they come."""
        n = request.sampling_options.n
        if n is None or n == 1:
            return self._engine.generate(request, context)
        return self._merge(request, n, context)

    async def _merge(self, request: PreprocessedRequest, n: int, context: Context) -> AsyncIterator[EngineOutput]:
        if not 1 < n <= MAX_CHOICES:
            raise EngineError(f"n must be from 1 to {MAX_CHOICES}, got {n}", kind="InvalidArgument")
        arrived: asyncio.Queue[EngineOutput | Exception | None] = asyncio.Queue(maxsize=n)
        async with Scope(f"choices of {context.id}") as scope:
            for index in range(n):
                scope.spawn(self._answer(_single(request, index), index, context, arrived), name=f"choice {index}")
            left = n
            while left:
                item = await arrived.get()
                if item is None:
                    left -= 1
                elif isinstance(item, EngineOutput):
                    yield item
                else:
                    raise item

    async def _answer(
        self,
        request: PreprocessedRequest,
        index: int,
        context: Context,
        arrived: asyncio.Queue[EngineOutput | Exception | None],
    ) -> None:
        """Puts the items of one choice, then None; or the error that ended it."""
        child = context.child()
        try:
            stream = self._engine.generate(request, child)
            try:
                async for output in stream:
                    await arrived.put(msgspec.structs.replace(output, index=index))
            finally:
                await close_stream(stream)
            await arrived.put(None)
        except Exception as error:
            await arrived.put(error)
        finally:
            context.release(child)


def _single(request: PreprocessedRequest, index: int) -> PreprocessedRequest:
    sampling = request.sampling_options
    seed = None if sampling.seed is None else sampling.seed + index
    return msgspec.structs.replace(request, sampling_options=msgspec.structs.replace(sampling, n=1, seed=seed))
