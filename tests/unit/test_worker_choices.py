"""Several answers to one prompt out of an engine that gives one."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from stator.errors import EngineError
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest, SamplingOptions
from stator.runtime.context import Context
from stator.worker.choices import MAX_CHOICES, Choices

pytestmark = pytest.mark.timeout(10)


class Counting:
    """Answers with the seed, twice; notes what runs."""

    def __init__(self) -> None:
        self.requests: list[PreprocessedRequest] = []
        self.running = 0
        self.contexts: list[Context] = []
        self.hold: asyncio.Event | None = None
        self.error_for_seed: int | None = None

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        self.requests.append(request)
        self.contexts.append(context)
        self.running += 1
        seed = request.sampling_options.seed or 0
        try:
            yield EngineOutput(token_ids=[seed])
            if self.hold is not None:
                await self.hold.wait()
            if seed == self.error_for_seed:
                raise EngineError("this one fails")
            yield EngineOutput(token_ids=[seed], finish_reason="stop")
        finally:
            self.running -= 1


def request(n: int | None, seed: int | None = 10) -> PreprocessedRequest:
    return PreprocessedRequest(token_ids=[1], sampling_options=SamplingOptions(n=n, seed=seed))


@pytest.mark.parametrize("n", [None, 1])
async def test_one_choice_passes_through_untouched(n: int | None) -> None:
    engine = Counting()
    asked, context = request(n), Context("r")
    items = [item async for item in Choices(engine).generate(asked, context)]
    assert engine.requests == [asked]
    assert engine.contexts == [context]
    assert [item.index for item in items] == [None, None]


async def test_each_choice_has_its_index_and_its_seed() -> None:
    engine = Counting()
    items = [item async for item in Choices(engine).generate(request(3), Context("r"))]
    for index in range(3):
        own = [item for item in items if item.index == index]
        assert [item.token_ids for item in own] == [[10 + index], [10 + index]]
        assert [item.finish_reason for item in own] == [None, "stop"]
    assert {asked.sampling_options.n for asked in engine.requests} == {1}


async def test_no_seed_stays_none() -> None:
    engine = Counting()
    assert [item async for item in Choices(engine).generate(request(2, None), Context("r"))]
    assert [asked.sampling_options.seed for asked in engine.requests] == [None, None]


@pytest.mark.parametrize("n", [0, -1, MAX_CHOICES + 1])
async def test_a_number_out_of_range_is_an_invalid_argument(n: int) -> None:
    engine = Counting()
    with pytest.raises(EngineError, match=f"got {n}") as caught:
        await anext(Choices(engine).generate(request(n), Context("r")))
    assert caught.value.kind == "InvalidArgument"
    assert not engine.requests


async def test_the_first_error_ends_all() -> None:
    engine = Counting()
    engine.error_for_seed = 11
    with pytest.raises(EngineError, match="this one fails"):
        assert [item async for item in Choices(engine).generate(request(3), Context("r"))]
    assert engine.running == 0


async def test_leaving_early_ends_all() -> None:
    engine = Counting()
    engine.hold = asyncio.Event()
    stream = Choices(engine).generate(request(4), Context("r"))
    await anext(stream)
    assert engine.running == 4
    await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
    assert engine.running == 0


async def test_stop_reaches_every_choice() -> None:
    engine = Counting()
    engine.hold = asyncio.Event()
    context = Context("r")
    stream = Choices(engine).generate(request(2), context)
    await anext(stream)
    context.stop()
    assert all(child.is_stopped for child in engine.contexts)
    engine.hold.set()
    assert [item async for item in stream]


async def test_choices_do_not_run_ahead_of_a_slow_reader() -> None:
    """At most n items wait, whatever the engine could produce."""
    produced = 0

    class Eager:
        async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
            nonlocal produced
            for token in range(1000):
                produced += 1
                yield EngineOutput(token_ids=[token])

    stream = Choices(Eager()).generate(request(2), Context("r"))
    await anext(stream)
    for _ in range(50):
        await asyncio.sleep(0)
    assert produced <= 8
    await stream.aclose()  # pyright: ignore[reportAttributeAccessIssue]  # a generator
