"""The official client against the frontend: what it is asked for is what it gets, and errors are its own classes."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import openai
import pytest

from stator.errors import (
    ConnectFailed,
    EngineError,
    Overloaded,
    PeerProtocolError,
    StatorError,
    StreamIncomplete,
    Timeout,
    Unavailable,
)
from stator.llm.output import CompletionUsage, EngineOutput, FinishError, TopLogprob
from stator.testing.fake_models import EngineCall, FakeEngine, FakeModels
from stator.testing.frontend_kit import RunningFrontend, frontend

pytestmark = pytest.mark.timeout(30)

TEXT = 'Grüße, 世界! مرحبا بالعالم 👩‍👩‍👧‍👦 — \u2028 "quotes" \\ \t\n and नमस्ते'


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
async def client(running: RunningFrontend) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        yield client


async def test_chat_unary(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="echo", messages=message(TEXT))
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    size = len(TEXT.encode())
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (size, size, 2 * size)


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="echo", messages=message(TEXT), stream=True)
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == TEXT
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "echo", "chat.completion.chunk")
    }
    assert all(chunk.usage is None for chunk in chunks)


async def test_include_usage_is_one_more_chunk(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="echo", messages=message("abc"), stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 3)


async def test_continuous_usage(client: openai.AsyncOpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = await client.chat.completions.create(
        model="echo",
        messages=message("abc"),
        stream=True,
        stream_options=options,  # pyright: ignore
    )
    assert [chunk.usage.completion_tokens async for chunk in stream if chunk.usage] == [1, 2, 3, 3]


async def test_sync_client(running: RunningFrontend) -> None:
    def talk() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=10) as client:
            answer = client.chat.completions.create(model="echo", messages=message(TEXT))
            stream = client.completions.create(model="echo", prompt=TEXT, stream=True)
            return answer.choices[0].message.content, "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(talk) == (TEXT, TEXT)


async def test_completion_unary_and_stream(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="echo", prompt="hello", max_tokens=3)
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == ("text_completion", "hel", "length")
    assert answer.id.startswith("cmpl-")
    chunks = [chunk async for chunk in await client.completions.create(model="echo", prompt=[104, 105], stream=True)]
    assert [chunk.choices[0].text for chunk in chunks] == ["h", "i"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "stop"]


async def test_batch_is_numbered_prompt_by_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="echo", prompt=["one", "zwei"], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "one"), (1, "one"), (2, "zwei"), (3, "zwei")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3 + 4, 2 * (3 + 4))


async def test_n_makes_calls_with_seeds_of_their_own(client: openai.AsyncOpenAI, models: FakeModels) -> None:
    engine = models.add("counted", FakeEngine())
    stream = await client.chat.completions.create(
        model="counted", messages=message("hey"), n=3, seed=2**63 - 2, stream=True, stream_options={"include_usage": True}
    )
    texts = {0: "", 1: "", 2: ""}
    roles: dict[int, list[str | None]] = {0: [], 1: [], 2: []}
    usage = None
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index].append(choice.delta.role)
        usage = chunk.usage or usage
    assert texts == {0: "hey", 1: "hey", 2: "hey"}
    assert all(seen == ["assistant", None, None] for seen in roles.values())
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 9)
    assert [call.request.sampling_options.seed for call in engine.calls] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert [call.request.sampling_options.n for call in engine.calls] == [None] * 3
    ids = [call.request_id for call in engine.calls]
    assert [text.removeprefix(ids[0][:-1]) for text in ids] == ["0", "1", "2"]


async def test_stop_string_ends_and_kills(client: openai.AsyncOpenAI, models: FakeModels) -> None:
    async def endless(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        while True:
            yield [EngineOutput(token_ids=[byte]) for byte in b"tick tock "]
            await asyncio.sleep(0)

    engine = models.add("endless", FakeEngine(endless))
    answer = await client.chat.completions.create(model="endless", messages=message("x"), stop=["tock"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("tick ", "stop")
    stream = await client.chat.completions.create(model="endless", messages=message("x"), stop=["tock"], stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "tick "
    assert [call.outcome for call in engine.calls] == ["killed", "killed"]


async def test_a_worker_that_finished_is_not_killed(client: openai.AsyncOpenAI, models: FakeModels) -> None:
    engine = models.add("polite", FakeEngine())
    await client.chat.completions.create(model="polite", messages=message("abc"), max_completion_tokens=2)
    await client.chat.completions.create(model="polite", messages=message("abc"))
    assert [call.outcome for call in engine.calls] == ["complete", "complete"]


async def test_a_worker_that_goes_on_after_its_last_word_is_killed(client: openai.AsyncOpenAI, models: FakeModels) -> None:
    async def chatty(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        yield [EngineOutput(token_ids=[97], finish_reason="stop")]
        while True:
            await asyncio.sleep(0.01)
            yield [EngineOutput(token_ids=[98])]

    engine = models.add("chatty", FakeEngine(chatty))
    answer = await client.chat.completions.create(model="chatty", messages=message("x"))
    assert answer.choices[0].message.content == "a"
    assert engine.calls[0].outcome == "killed"


async def test_logprobs(client: openai.AsyncOpenAI, models: FakeModels) -> None:
    async def sure(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        for token in b"hi":
            top = [TopLogprob(token_id=token, logprob=-0.5, rank=1), TopLogprob(token_id=120, logprob=-1.5, rank=2)]
            yield [EngineOutput(token_ids=[token], log_probs=[-0.5], top_logprobs=[top])]

    models.add("sure", FakeEngine(sure))
    answer = await client.chat.completions.create(model="sure", messages=message("x"), logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(entry.token, entry.logprob, entry.bytes) for entry in logprobs.content] == [("h", -0.5, [104]), ("i", -0.5, [105])]
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["h", "x"]
    stream = await client.chat.completions.create(
        model="sure", messages=message("x"), logprobs=True, top_logprobs=1, stream=True
    )
    seen = [chunk.choices[0].logprobs async for chunk in stream]
    assert [entry.content[0].token for entry in seen if entry and entry.content] == ["h", "i"]
    plain = await client.completions.create(model="sure", prompt="x", logprobs=2)
    text = plain.choices[0].logprobs
    assert text is not None
    assert (text.tokens, text.token_logprobs, text.text_offset) == (["h", "i"], [-0.5, -0.5], [0, 1])
    assert text.top_logprobs == [{"h": -0.5, "x": -1.5}, {"i": -0.5, "x": -1.5}]


async def test_worker_usage_wins_for_the_prompt(
    client: openai.AsyncOpenAI, models: FakeModels, running: RunningFrontend
) -> None:
    async def counting(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        usage = CompletionUsage(prompt_tokens=40, completion_tokens=9, prompt_tokens_details={"cached_tokens": 32})
        yield [EngineOutput(token_ids=[97], completion_usage=usage, finish_reason="stop")]

    models.add("counting", FakeEngine(counting))
    usage = (await client.chat.completions.create(model="counting", messages=message("x"))).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (40, 1, 41)
    assert usage.prompt_tokens_details.cached_tokens == 32
    assert running.sample("dynamo_frontend_cached_tokens_sum", model="counting") == 32


async def test_empty_answer(client: openai.AsyncOpenAI, models: FakeModels) -> None:
    async def silent(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        return
        yield

    models.add("silent", FakeEngine(silent))
    answer = await client.chat.completions.create(model="silent", messages=message("x"))
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")
    stream = await client.chat.completions.create(model="silent", messages=message("x"), stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert [(choice.delta.role, choice.delta.content, choice.finish_reason) for choice in chunks] == [("assistant", "", "stop")]


async def test_models_come_and_go(client: openai.AsyncOpenAI, models: FakeModels) -> None:
    assert [model.id async for model in client.models.list()] == ["echo"]
    models.add("org/new", FakeEngine())
    assert [model.id async for model in client.models.list()] == ["echo", "org/new"]
    assert (await client.models.retrieve("org/new")).created == 1_700_000_000
    models.remove("org/new")
    with pytest.raises(openai.NotFoundError) as raised:
        await client.models.retrieve("org/new")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as raised:
        await client.chat.completions.create(model="org/new", messages=message("x"))
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


async def test_a_model_only_for_completions(client: openai.AsyncOpenAI, models: FakeModels) -> None:
    models.add("base", FakeEngine(), model_type="Completions")
    with pytest.raises(openai.NotFoundError) as raised:
        await client.chat.completions.create(model="base", messages=message("x"))
    assert raised.value.code == "unsupported_model"
    assert (await client.completions.create(model="base", prompt="ok")).choices[0].text == "ok"


async def test_bad_requests_name_the_parameter(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(model="echo", messages=message("x"), temperature=3)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as raised:
        await client.chat.completions.create(model="echo", messages=message("x" * 70_000))
    assert raised.value.code == "context_length_exceeded"


REFUSALS: list[tuple[StatorError, int, str]] = [
    (Overloaded("secret"), 503, "overloaded"),
    (Unavailable("secret"), 503, "unavailable"),
    (Timeout("secret", phase="first item"), 504, "timeout"),
    (ConnectFailed("secret"), 502, "worker_lost"),
    (StreamIncomplete("secret"), 502, "worker_lost"),
    (PeerProtocolError("secret"), 502, "bad_worker"),
    (EngineError("secret"), 500, "engine"),
    (EngineError("RuntimeError: secret", kind="Unknown"), 500, "engine"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code"), REFUSALS, ids=[case[0].code + str(i) for i, case in enumerate(REFUSALS)])
async def test_errors_before_the_first_token_have_a_status(
    client: openai.AsyncOpenAI, models: FakeModels, error: StatorError, status: int, code: str, stream: bool
) -> None:
    async def late(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        raise error
        yield

    for engine in (FakeEngine(refusal=error), FakeEngine(late)):
        models.add("bad", engine)
        with pytest.raises(openai.APIStatusError) as raised:
            await client.chat.completions.create(model="bad", messages=message("x"), stream=stream)
        assert (raised.value.status_code, raised.value.code) == (status, code)
        assert "secret" not in raised.value.message
        assert raised.value.request_id is not None
        assert raised.value.request_id in raised.value.message
        assert ("retry-after" in raised.value.response.headers) == (status == 503)


@pytest.mark.parametrize("stream", [False, True])
async def test_invalid_argument_of_the_engine_is_the_clients_fault(
    client: openai.AsyncOpenAI, models: FakeModels, stream: bool
) -> None:
    models.add("picky", FakeEngine(refusal=EngineError("ValueError: no such voice", kind="InvalidArgument")))
    with pytest.raises(openai.BadRequestError, match="no such voice"):
        await client.chat.completions.create(model="picky", messages=message("x"), stream=stream)


async def test_errors_in_mid_stream_raise(client: openai.AsyncOpenAI, models: FakeModels, running: RunningFrontend) -> None:
    async def breaks(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        yield [EngineOutput(token_ids=[97])]
        yield [EngineOutput(token_ids=[98])]
        raise StreamIncomplete("secret address")

    models.add("breaks", FakeEngine(breaks))
    stream = await client.chat.completions.create(model="breaks", messages=message("x"), stream=True)
    text = ""
    with pytest.raises(openai.APIError) as raised:
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == "ab"
    assert raised.value.code == "worker_lost"
    assert "secret" not in raised.value.message
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="breaks", messages=message("x"))
    labels = {"model": "breaks", "endpoint": "chat_completions", "status": "error", "error_type": "internal"}
    for request_type in ("stream", "unary"):
        assert running.sample("dynamo_frontend_requests_total", request_type=request_type, **labels) == 1


async def test_finish_with_error_is_an_error(client: openai.AsyncOpenAI, models: FakeModels) -> None:
    async def fails(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        yield [EngineOutput(token_ids=[], finish_reason=FinishError("secret"))]

    models.add("fails", FakeEngine(fails))
    with pytest.raises(openai.InternalServerError) as raised:
        await client.chat.completions.create(model="fails", messages=message("x"))
    assert "secret" not in raised.value.message


async def test_one_failed_choice_fails_the_request_and_kills_the_others(client: openai.AsyncOpenAI, models: FakeModels) -> None:
    async def half(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        if call.request_id.endswith("-1"):
            await asyncio.sleep(0.01)
            raise EngineError("half broken")
        while True:
            yield [EngineOutput(token_ids=[97])]
            await asyncio.sleep(0.001)

    engine = models.add("half", FakeEngine(half))
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="half", messages=message("x"), n=3)
    assert [call.outcome for call in engine.calls] == ["killed", "failed", "killed"]


async def test_overload_status_and_limit(models: FakeModels) -> None:
    hold = asyncio.Event()

    async def waits(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        await hold.wait()
        yield [EngineOutput(token_ids=[97], finish_reason="stop")]

    engine = models.add("waits", FakeEngine(waits))
    async with (
        frontend(models, max_requests=1, overload_status=529, retry_after=7) as running,
        openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=10) as client,
        asyncio.TaskGroup() as group,
    ):
        first = group.create_task(client.chat.completions.create(model="waits", messages=message("x")))
        async with asyncio.timeout(5):
            while not engine.calls:
                await asyncio.sleep(0.001)
        with pytest.raises(openai.APIStatusError) as raised:
            await client.chat.completions.create(model="waits", messages=message("x"))
        assert (raised.value.status_code, raised.value.code) == (529, "overloaded")
        assert raised.value.response.headers["retry-after"] == "7"
        hold.set()
        assert (await first).choices[0].message.content == "a"


async def test_many_at_once(client: openai.AsyncOpenAI, running: RunningFrontend) -> None:
    async def one(number: int) -> None:
        text = f"{number} {TEXT}"
        if number % 2:
            stream = await client.chat.completions.create(model="echo", messages=message(text), stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text
        else:
            assert (await client.completions.create(model="echo", prompt=text)).choices[0].text == text

    await asyncio.gather(*[one(number) for number in range(40)])
    await running.until_idle()
    assert running.sample("dynamo_frontend_inflight_requests", model="echo") == 0
    assert running.sample("dynamo_frontend_queued_requests", model="echo") == 0
    tokens = sum(len(f"{number} {TEXT}".encode()) for number in range(40))
    assert running.sample("dynamo_frontend_output_tokens_total", model="echo") == tokens
