"""The transformers engine on a tiny Llama: the same tokens as `generate`, several requests at once, every way to end one."""

import asyncio
import random
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stator.engines.transformers import TransformersEngine, TransformersOptions
from stator.errors import ConfigError, EngineError, Overloaded
from stator.llm.output import EngineOutput
from stator.llm.request import GuidedDecoding, OutputOptions, PreprocessedRequest, SamplingOptions, StopConditions
from stator.runtime.context import Context
from stator.testing.engine_suite import INSTANCE, EngineSuite, RunningEngine, check_answer, collect
from stator.testing.plane_suite import eventually
from stator.testing.tiny_model import build_tiny_llama
from stator.worker.snapshot import ComponentSnapshot

torch = pytest.importorskip("torch", reason="needs the extra 'transformers'")
pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]
torch.set_num_threads(1)  # for models this small, threads that wait for each other only take time from other tests

CONTEXT = 512


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("tiny"), context_length=CONTEXT)


@pytest.fixture(scope="module")
def reference(model_directory: Path) -> Any:
    """The model as the library itself runs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()


def generate(reference: Any, prompt: list[int], count: int) -> list[int]:
    """`model.generate`, greedy, without the prompt."""
    ids = torch.tensor([prompt])
    output = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


def prompts(count: int, *, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 380) for _ in range(rng.randrange(1, 60))] for _ in range(count)]


def request(prompt: list[int], count: int | None = 16, **fields: Any) -> PreprocessedRequest:
    """A greedy request unless `sampling_options` are given."""
    fields.setdefault("sampling_options", SamplingOptions(temperature=0.0))
    fields.setdefault("stop_conditions", StopConditions(max_tokens=count))
    return PreprocessedRequest(token_ids=prompt, **fields)


ENDLESS = request([5] * 4, stop_conditions=StopConditions(ignore_eos=True))
"""runs to the end of the context: half a second"""


def tokens(items: list[EngineOutput]) -> list[int]:
    return [token for item in items for token in item.token_ids]


@asynccontextmanager
async def started(directory: Path, **options: Any) -> AsyncGenerator[RunningEngine]:
    class Suite(EngineSuite):
        def make(self) -> TransformersEngine:
            return TransformersEngine(TransformersOptions(model=str(directory), threads=1, **options))

    async with Suite().started() as running:
        yield running


def engine_of(running: RunningEngine) -> TransformersEngine:
    assert isinstance(running.engine, TransformersEngine)
    return running.engine


class TestTransformersContract(EngineSuite):
    """The engine kit's contract."""

    @pytest.fixture(autouse=True)
    def directory(self, model_directory: Path) -> None:
        self.model_directory = model_directory

    def make(self) -> TransformersEngine:
        return TransformersEngine(TransformersOptions(model=str(self.model_directory), threads=1, max_num_seqs=4))


async def test_greedy_tokens_are_those_of_generate_one_at_a_time(model_directory: Path, reference: Any) -> None:
    async with started(model_directory) as running:
        for prompt in prompts(6):
            items = await running.answer(request(prompt, 24))
            check_answer(items)
            assert tokens(items) == generate(reference, prompt, 24)


@pytest.mark.parametrize("rows", [1, 3, 8])
async def test_greedy_tokens_are_those_of_generate_eight_at_once(model_directory: Path, reference: Any, rows: int) -> None:
    """Prompts and lengths differ, so that sequences join and leave the batches all the time."""
    asked = [(prompt, 8 + 5 * n) for n, prompt in enumerate(prompts(16, seed=rows))]
    async with started(model_directory, max_num_seqs=8, max_batch_rows=rows) as running:
        answers = await asyncio.gather(*(running.answer(request(prompt, count)) for prompt, count in asked))
        assert (engine_of(running).running, engine_of(running).waiting) == (0, 0)
    for (prompt, count), items in zip(asked, answers, strict=True):
        assert tokens(items) == generate(reference, prompt, count)


async def test_requests_share_their_steps(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight at once take far fewer forward passes than eight times one."""
    from stator.engines.causal_lm import CausalLM

    forward, passes = CausalLM._forward, 0  # pyright: ignore[reportPrivateUsage]  # there is no other place to count passes

    def counting(self: Any, **arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(self, **arguments)

    async with started(model_directory) as running:
        monkeypatch.setattr(CausalLM, "_forward", counting)
        await asyncio.gather(*(running.answer(request(prompt, 32)) for prompt in prompts(8)))
    assert passes < 8 + 31 + 16


async def test_usage_is_on_the_last_item(model_directory: Path) -> None:
    async with started(model_directory) as running:
        items = await running.answer(request([5, 6, 7], 4))
    usage = items[-1].completion_usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 4, 7)
    assert items[-1].finish_reason == "length"


async def test_max_tokens_defaults_to_what_is_left_of_the_context(model_directory: Path) -> None:
    async with started(model_directory, context_length=40) as running:
        items = await running.answer(request([5] * 30, None))
        assert (len(tokens(items)), items[-1].finish_reason) == (10, "length")
        items = await running.answer(request([5] * 30, 100))
        assert (len(tokens(items)), items[-1].finish_reason) == (10, "length")
        assert running.config.context_length == 40


async def test_no_tokens_asked_for(model_directory: Path) -> None:
    async with started(model_directory) as running:
        items = await running.answer(request([5], 0))
    assert [(item.token_ids, item.finish_reason) for item in items] == [([], "length")]


async def test_a_stop_token_ends_the_answer_and_is_part_of_it(model_directory: Path, reference: Any) -> None:
    prompt = prompts(1)[0]
    expected = generate(reference, prompt, 16)
    stop = expected[4]
    cut = expected[: expected.index(stop) + 1]
    async with started(model_directory) as running:
        items = await running.answer(request(prompt, stop_conditions=StopConditions(max_tokens=16, stop_token_ids=[stop])))
        assert (tokens(items), items[-1].finish_reason, items[-1].stop_reason) == (cut, "stop", stop)
        hidden = StopConditions(max_tokens=16, stop_token_ids_hidden=[stop])
        items = await running.answer(request(prompt, stop_conditions=hidden))
        assert (tokens(items), items[-1].finish_reason, items[-1].stop_reason) == (cut, "eos", None)


async def test_the_end_of_sequence_ends_the_answer_unless_ignored(model_directory: Path, reference: Any) -> None:
    prompt = prompts(1)[0]
    expected = generate(reference, prompt, 16)
    eos = expected[4]
    async with started(model_directory) as running:
        items = await running.answer(request(prompt, eos_token_ids=[eos]))
        assert (tokens(items), items[-1].finish_reason) == (expected[: expected.index(eos) + 1], "eos")
        ignored = StopConditions(max_tokens=16, ignore_eos=True, stop_token_ids_hidden=[eos])
        items = await running.answer(request(prompt, eos_token_ids=[eos], stop_conditions=ignored))
        assert (tokens(items), items[-1].finish_reason) == (expected, "length")


async def test_min_tokens_keeps_the_end_away(model_directory: Path, reference: Any) -> None:
    prompt = prompts(1)[0]
    first = generate(reference, prompt, 1)[0]
    stop = StopConditions(max_tokens=12, min_tokens=6)
    async with started(model_directory) as running:
        items = await running.answer(request(prompt, eos_token_ids=[first], stop_conditions=stop))
    assert first not in tokens(items)[:6]
    assert len(tokens(items)) >= 6


async def test_a_seed_makes_sampling_repeatable(model_directory: Path) -> None:
    prompt = prompts(1)[0]

    def sampled(seed: int | None) -> PreprocessedRequest:
        return request(prompt, 24, sampling_options=SamplingOptions(temperature=1.0, seed=seed))

    async with started(model_directory) as running:
        one, two, other, free = [tokens(await running.answer(sampled(seed))) for seed in (7, 7, 8, None)]
        crowd = await asyncio.gather(*(running.answer(sampled(seed)) for seed in (7, 8, 7, 9)))
    assert one == two != other
    assert free not in (one, other)
    assert [tokens(items) for items in crowd[:3]] == [one, other, one]


async def test_sampling_options_shape_the_choice(model_directory: Path, reference: Any) -> None:
    prompt = prompts(1)[0]
    expected = generate(reference, prompt, 8)
    async with started(model_directory) as running:
        for greedy in (
            SamplingOptions(temperature=1.0, top_k=1, seed=1),
            SamplingOptions(temperature=1.0, top_p=1e-6, seed=1),
            SamplingOptions(temperature=1.0, min_p=1.0, seed=1),
            SamplingOptions(temperature=1e-4, seed=1),
            SamplingOptions(),
        ):
            assert tokens(await running.answer(request(prompt, 8, sampling_options=greedy))) == expected, greedy
        banned = SamplingOptions(temperature=0.0, repetition_penalty=1e6)
        unique = tokens(await running.answer(request(prompt, 40, sampling_options=banned)))
        assert len(set(unique)) == len(unique), "so strong a penalty leaves no repetition"


async def test_a_frequency_penalty_counts_the_answer_alone(model_directory: Path) -> None:
    """A model that repeats itself stops doing so."""
    prompt = prompts(1)[0]
    async with started(model_directory) as running:
        plain = tokens(await running.answer(request(prompt, 60)))
        penalty = SamplingOptions(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0)
        varied = tokens(await running.answer(request(prompt, 60, sampling_options=penalty)))
    assert varied[0] == plain[0], "nothing was generated before the first token"
    assert len(set(varied)) > len(set(plain))


async def test_log_probabilities(model_directory: Path, reference: Any) -> None:
    prompt = prompts(1)[0]
    async with started(model_directory) as running:
        items = await running.answer(request(prompt, 3, output_options=OutputOptions(logprobs=2)))
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt])).logits[0, -1]
    expected = torch.log_softmax(logits, dim=-1)
    first = items[0]
    assert first.log_probs is not None
    assert first.top_logprobs is not None
    assert first.log_probs[0] == pytest.approx(float(expected.max()), abs=1e-4)
    top = first.top_logprobs[0]
    assert [(alternative.rank, alternative.token_id) for alternative in top] == [
        (1, first.token_ids[0]),
        (2, int(expected.topk(2).indices[1])),
    ]


async def test_stopping_frees_the_slot_for_the_one_that_waits(model_directory: Path) -> None:
    async with started(model_directory, max_num_seqs=1) as running:
        context = Context("long")
        long = running.generate(ENDLESS, context)
        await anext(long)
        waiting = asyncio.ensure_future(running.answer(request([6] * 4, 2)))
        await eventually(lambda: engine_of(running).waiting == 1)
        context.stop()
        rest = await collect(long)
        assert rest[-1].finish_reason == "cancelled"
        assert len(tokens(rest)) < CONTEXT - 10
        check_answer(await waiting)
        await eventually(lambda: engine_of(running).running == 0)


async def test_a_waiting_request_that_is_killed_leaves_the_queue(model_directory: Path) -> None:
    async with started(model_directory, max_num_seqs=1) as running:
        long = running.generate(ENDLESS)
        await anext(long)
        waiting = asyncio.ensure_future(running.answer(request([6] * 4, 2)))
        await eventually(lambda: engine_of(running).waiting == 1)
        waiting.cancel()
        await eventually(lambda: engine_of(running).waiting == 0)
        assert engine_of(running).running == 1
        await collect(long)


async def test_a_stopped_request_in_the_queue_ends_at_once(model_directory: Path) -> None:
    async with started(model_directory, max_num_seqs=1) as running:
        long = running.generate(ENDLESS)
        await anext(long)
        context = Context("waiting")
        waiting = asyncio.ensure_future(running.answer(request([6] * 4, 2), context))
        await eventually(lambda: engine_of(running).waiting == 1)
        context.stop()
        items = await waiting
        assert [(item.token_ids, item.finish_reason) for item in items] == [([], "cancelled")]
        assert tokens(await collect(long)), "the running one went on"


async def test_a_full_queue_refuses_before_anything_is_yielded(model_directory: Path) -> None:
    async with started(model_directory, max_num_seqs=1, max_waiting=1) as running:
        long = [running.generate(ENDLESS) for _ in range(2)]
        first = await anext(long[0])
        second = asyncio.ensure_future(anext(long[1]))
        await eventually(lambda: engine_of(running).waiting == 1)
        with pytest.raises(Overloaded, match="2 requests"):
            running.generate(request([5], 2))
        assert first.finish_reason is None
        rest = await collect(long[0])
        assert rest[-1].finish_reason == "length"
        await second
        await collect(long[1])
        check_answer(await running.answer(request([5], 2)))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"token_ids": [5, 100_000]}, "token id 100000 is outside"),
        ({"token_ids": [-1]}, "token id -1 is outside"),
        ({"token_ids": [5] * CONTEXT}, "leaves no room"),
        ({"sampling_options": SamplingOptions(temperature=-1.0)}, "temperature must be at least 0"),
        ({"sampling_options": SamplingOptions(temperature=float("nan"))}, "temperature"),
        ({"sampling_options": SamplingOptions(top_p=0.0)}, "top_p must be above 0 and at most 1"),
        ({"sampling_options": SamplingOptions(n=2)}, "one choice"),
        ({"sampling_options": SamplingOptions(use_beam_search=True)}, "beam search"),
        ({"sampling_options": SamplingOptions(guided_decoding=GuidedDecoding(regex="a+"))}, "guided decoding"),
    ],
)
async def test_what_cannot_be_done_is_an_invalid_argument(
    model_directory: Path, fields: dict[str, Any], complaint: str
) -> None:
    async with started(model_directory) as running:
        with pytest.raises(EngineError, match=complaint) as caught:
            await running.answer(PreprocessedRequest(**({"token_ids": [5]} | fields)))
    assert caught.value.kind == "InvalidArgument"


async def test_a_failing_step_ends_its_requests_and_nothing_else(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(model_directory) as running:
        from stator.engines.causal_lm import CausalLM

        def fail(self: Any, batch: Any) -> Any:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(CausalLM, "_step", fail)
            answers = await asyncio.gather(*(running.answer(request(prompt)) for prompt in prompts(3)), return_exceptions=True)
        for error in answers:
            assert isinstance(error, EngineError)
            assert "out of memory" in error.message
        assert engine_of(running).running == 0
        check_answer(await running.answer(request([5, 6])))


async def test_a_failing_prefill_ends_one_request(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with started(model_directory) as running:
        from stator.engines.causal_lm import CausalLM

        prefill = CausalLM.prefill

        def fail(self: Any, sequence: Any, most: int) -> Any:
            if sequence.tokens[0] == 9:
                raise RuntimeError("this prompt")
            return prefill(self, sequence, most)

        monkeypatch.setattr(CausalLM, "prefill", fail)
        good, bad = await asyncio.gather(
            running.answer(request([5, 6])), running.answer(request([9, 6])), return_exceptions=True
        )
    assert isinstance(bad, EngineError)
    assert isinstance(good, list)
    check_answer(good)


@pytest.mark.parametrize("part", [1, 7, 16])
async def test_prompts_read_in_parts_have_the_same_answers(model_directory: Path, reference: Any, part: int) -> None:
    asked = prompts(8, seed=part)
    async with started(model_directory, max_num_seqs=4, max_prefill_tokens=part) as running:
        answers = await asyncio.gather(*(running.answer(request(prompt, 24)) for prompt in asked))
    for prompt, items in zip(asked, answers, strict=True):
        assert tokens(items) == generate(reference, prompt, 24)


async def test_a_long_prompt_may_be_abandoned_while_it_is_read(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slot and its blocks go to the next one; others get their tokens meanwhile."""
    from stator.engines.causal_lm import CausalLM

    prefill, reading, go_on = CausalLM.prefill, threading.Event(), threading.Event()

    def slow(self: Any, sequence: Any, most: int) -> Any:
        choice = prefill(self, sequence, most)
        if sequence.prompt_length == 400:
            reading.set()
            assert go_on.wait(10)
        return choice

    monkeypatch.setattr(CausalLM, "prefill", slow)
    async with started(model_directory, max_num_seqs=1, max_prefill_tokens=8) as running:
        context = Context("long")
        long = asyncio.ensure_future(collect(running.generate(request([5] * 400), context)))
        assert await asyncio.to_thread(reading.wait, 10)
        waiting = asyncio.ensure_future(running.answer(request([6] * 4, 2)))
        await eventually(lambda: engine_of(running).waiting == 1)
        context.stop()
        items = await asyncio.wait_for(long, 10)
        assert [(item.token_ids, item.finish_reason) for item in items] == [([], "cancelled")]
        go_on.set()
        check_answer(await waiting)


async def test_answers_that_outgrow_the_blocks_are_the_same(model_directory: Path, reference: Any) -> None:
    """Six answers of up to 100 tokens share 160 places: some give way, and are read again."""
    asked = prompts(6, seed=3)
    async with started(model_directory, block_size=8, total_kv_blocks=20) as running:
        assert running.config.total_kv_blocks == 20
        assert running.config.kv_cache_block_size == 8
        answers = await asyncio.gather(*(running.answer(request(prompt, 40)) for prompt in asked))
        assert engine_of(running).preemptions > 0
    for prompt, items in zip(asked, answers, strict=True):
        assert tokens(items) == generate(reference, prompt, 40)


async def test_a_prompt_that_never_fits_the_blocks_is_refused(model_directory: Path) -> None:
    async with started(model_directory, block_size=16, total_kv_blocks=4) as running:
        assert running.config.context_length == 64
        with pytest.raises(EngineError, match="the KV cache of 64 leaves no room") as caught:
            await running.answer(request([5] * 64))
        assert caught.value.kind == "InvalidArgument"
        items = await running.answer(request([5] * 60, stop_conditions=StopConditions(ignore_eos=True)))
        assert (len(tokens(items)), items[-1].finish_reason) == (4, "length")


class Snapshots:
    """What was published, and by how many threads."""

    dp_ranks = (0,)

    def __init__(self) -> None:
        self.published: list[ComponentSnapshot] = []
        self.threads: set[int] = set()

    def publish(self, dp_rank: int, snapshot: ComponentSnapshot) -> None:
        assert dp_rank == 0
        self.threads.add(threading.get_ident())
        self.published.append(snapshot)


async def test_each_step_publishes_what_the_cache_holds(model_directory: Path) -> None:
    async with started(model_directory, block_size=8, max_num_seqs=4) as running:
        engine, sink = engine_of(running), Snapshots()
        assert tuple(engine.snapshot_ranks()) == (0,)
        engine.attach_snapshots(sink)
        total = 4 * CONTEXT // 8
        empty = ComponentSnapshot(kv_used_blocks=0, kv_total_blocks=total, gpu_cache_usage=0.0)
        assert sink.published == [empty]
        assert running.config.total_kv_blocks == total
        await asyncio.gather(
            *(
                running.answer(request([5] * 20, 8, stop_conditions=StopConditions(ignore_eos=True, max_tokens=8)))
                for _ in range(2)
            )
        )
        await eventually(lambda: sink.published[-1] == empty and len(sink.published) > 2)
    used = [snapshot.kv_used_blocks for snapshot in sink.published]
    assert max(used) == 2 * 4, "twenty tokens and seven that were stored of the answer fill four blocks"
    assert all(snapshot.gpu_cache_usage == snapshot.kv_used_blocks / total for snapshot in sink.published)
    assert all(snapshot.kv_cache_hit_rate is None for snapshot in sink.published)
    assert len(sink.threads) == 2


async def test_a_model_that_breaks_is_told_as_the_engines_end(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stator.engines.causal_lm import CausalLM

    def broken(self: Any, **_: Any) -> Any:
        raise RuntimeError("device-side assert")

    async with started(model_directory) as running:
        failed = asyncio.ensure_future(engine_of(running).failed())
        check_answer(await running.answer(request([5])))
        assert not failed.done()
        monkeypatch.setattr(CausalLM, "_forward", broken)
        answers = await asyncio.gather(*(running.answer(request([5])) for _ in range(6)), return_exceptions=True)
        assert all(isinstance(answer, EngineError) for answer in answers)
        assert "device-side assert" in await asyncio.wait_for(failed, 5)
        with pytest.raises(EngineError, match="cannot be stepped any more") as caught:
            await running.answer(request([5]))
        assert caught.value.kind == "EngineShutdown"


async def test_requests_end_when_the_step_thread_does(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stator.engines.causal_lm import CausalLM

    def leave(self: Any) -> Any:
        raise SystemExit("gone")

    async with started(model_directory, max_num_seqs=1) as running:
        monkeypatch.setattr(CausalLM, "decode", leave)
        answers = await asyncio.gather(*(running.answer(ENDLESS) for _ in range(3)), return_exceptions=True)
        for error in answers:
            assert isinstance(error, EngineError)
            assert error.kind == "EngineShutdown"
        assert "SystemExit: gone" in await asyncio.wait_for(engine_of(running).failed(), 5)


async def test_cleanup_ends_what_still_runs(model_directory: Path) -> None:
    engine = TransformersEngine(TransformersOptions(model=str(model_directory), threads=1))
    await engine.start(INSTANCE)
    running = asyncio.ensure_future(collect(engine.generate(ENDLESS, Context("r"))))
    await eventually(lambda: engine.running == 1)
    await engine.cleanup()
    with pytest.raises(EngineError, match="shutting down") as caught:
        await running
    assert caught.value.kind == "EngineShutdown"
    assert engine.running == 0
    with pytest.raises(EngineError, match="not running"):
        await anext(engine.generate(request([5]), Context("late")))


async def test_progress_is_reported_while_the_model_loads(model_directory: Path) -> None:
    engine = TransformersEngine(TransformersOptions(model=str(model_directory), threads=1))
    reports: list[str] = []
    engine.follow_progress(reports.append)
    await engine.start(INSTANCE)
    await engine.cleanup()
    assert any("loading" in text for text in reports)
    assert any("loaded" in text for text in reports)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"context_length": CONTEXT + 1}, "more than the model's 512"),
        ({"dtype": "float99"}, "dtype 'float99'"),
        ({"device": "warp:9"}, "device 'warp:9'"),
    ],
)
async def test_a_setting_the_model_cannot_have_is_named(model_directory: Path, options: dict[str, Any], complaint: str) -> None:
    engine = TransformersEngine(TransformersOptions(model=str(model_directory), **options))
    with pytest.raises(ConfigError, match=complaint):
        await engine.start(INSTANCE)
    await engine.cleanup()


async def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    engine = TransformersEngine(TransformersOptions(model=str(tmp_path)))
    with pytest.raises(Exception, match=r"config\.json"):
        await engine.start(INSTANCE)
    await engine.cleanup()


async def test_an_id_is_fetched_and_keeps_its_name(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stator.engines import model_source

    monkeypatch.setattr(model_source, "snapshot_download", lambda source, allow_patterns: str(model_directory))
    engine = TransformersEngine(TransformersOptions(model="someone/tiny", threads=1))
    config = await engine.start(INSTANCE)
    await engine.cleanup()
    assert (config.card.display_name, config.card.source_path) == ("someone/tiny", "someone/tiny")


async def test_an_id_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from stator.engines import model_source

    def fail(source: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(model_source, "snapshot_download", fail)
    engine = TransformersEngine(TransformersOptions(model="someone/tiny", threads=1))
    with pytest.raises(ConfigError, match=r"'someone/tiny' is no directory.*no route to the hub$"):
        await engine.start(INSTANCE)
    await engine.cleanup()
