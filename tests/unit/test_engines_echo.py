"""The echo engine: what it answers, when it suspends, how it ends."""

import asyncio
import time

import pytest

from stator.engines.echo import EchoEngine, EchoOptions
from stator.errors import ConfigError
from stator.llm.card import is_byte_card
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest, StopConditions
from stator.runtime.context import Context
from stator.testing.engine_suite import EngineSuite, collect

pytestmark = pytest.mark.timeout(30)


class TestEchoContract(EngineSuite):
    """The engine kit's contract, with a delay so that requests last."""

    prompt = tuple(range(200)) * 5

    def make(self) -> EchoEngine:
        return EchoEngine(EchoOptions(delay=0.002))


async def echo(
    token_ids: list[int], *, options: EchoOptions | None = None, eos: list[int] | None = None, **stop: object
) -> list[EngineOutput]:
    request = PreprocessedRequest(
        token_ids=token_ids,
        eos_token_ids=eos or [],
        stop_conditions=StopConditions(**stop),  # pyright: ignore[reportArgumentType]
    )
    return await collect(EchoEngine(options).generate(request, Context("r")))


def tokens(items: list[EngineOutput]) -> list[int]:
    return [token for item in items for token in item.token_ids]


async def test_repeats_the_whole_prompt_one_token_per_item() -> None:
    items = await echo([5, 6, 7])
    assert [item.token_ids for item in items] == [[5], [6], [7]]
    assert [item.finish_reason for item in items] == [None, None, "stop"]
    usage = items[-1].completion_usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 3, 6)


async def test_chunk_sets_the_tokens_per_item() -> None:
    items = await echo(list(range(7)), options=EchoOptions(chunk=3))
    assert [item.token_ids for item in items] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("limit", "expected", "reason"),
    [(2, [5, 6], "length"), (3, [5, 6, 7], "stop"), (9, [5, 6, 7], "stop"), (0, [], "length")],
)
async def test_max_tokens(limit: int, expected: list[int], reason: str) -> None:
    items = await echo([5, 6, 7], max_tokens=limit)
    assert tokens(items) == expected
    assert items[-1].finish_reason == reason


async def test_a_stop_token_ends_the_answer_and_is_reported() -> None:
    items = await echo([5, 6, 7], stop_token_ids=[6])
    assert tokens(items) == [5, 6]
    assert (items[-1].finish_reason, items[-1].stop_reason) == ("stop", 6)


async def test_min_tokens_outlasts_a_stop_token() -> None:
    assert tokens(await echo([6, 5, 6, 7], stop_token_ids=[6], min_tokens=2)) == [6, 5, 6]


async def test_end_of_sequence_ids_are_not_repeated() -> None:
    items = await echo([5, 2, 6, 2], eos=[2])
    assert tokens(items) == [5, 6]
    assert items[-1].finish_reason == "stop"
    assert tokens(await echo([5, 2, 6], stop_token_ids_hidden=[2])) == [5, 6]


async def test_a_prompt_of_nothing_to_repeat_still_ends() -> None:
    items = await echo([2], eos=[2])
    assert [(item.token_ids, item.finish_reason) for item in items] == [([], "stop")]


async def test_without_delay_it_never_suspends() -> None:
    stream = EchoEngine().generate(PreprocessedRequest(token_ids=list(range(1000))), Context("r"))
    items = 0
    while True:
        try:
            stream.__anext__().send(None)  # a suspending generator would yield here instead of raising
        except StopIteration:
            items += 1
        except StopAsyncIteration:
            break
    assert items == 1000


async def test_delay_paces_the_items_on_one_beat() -> None:
    engine = EchoEngine(EchoOptions(delay=0.02))
    request = PreprocessedRequest(token_ids=list(range(5)))
    began = time.monotonic()
    answers = await asyncio.gather(*(collect(engine.generate(request, Context(str(n)))) for n in range(50)))
    took = time.monotonic() - began
    assert all(tokens(items) == list(range(5)) for items in answers)
    assert 0.09 <= took < 1.0


async def test_abort_ends_a_long_delay() -> None:
    engine = EchoEngine(EchoOptions(delay=3600))
    context = Context("r")
    waiting = asyncio.ensure_future(collect(engine.generate(PreprocessedRequest(token_ids=[1, 2]), context)))
    await asyncio.sleep(0)
    context.stop()
    await engine.abort(context)
    async with asyncio.timeout(1):
        items = await waiting
    assert [(item.token_ids, item.finish_reason) for item in items] == [([], "cancelled")]


async def test_the_default_card_is_the_byte_tokenizer() -> None:
    engine = EchoEngine(EchoOptions(name="parrot"))
    config = await engine.start(1)
    assert is_byte_card(config.card)
    assert config.card.display_name == "parrot"


async def test_a_model_that_is_no_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        await EchoEngine(EchoOptions(model="/nowhere/at/all")).start(1)
