"""The vLLM engine over a stand-in for vLLM with its public interface."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loopback import fake_vllm
from stator.engines.vllm import VllmEngine, VllmOptions
from stator.errors import ConfigError, EngineError, Overloaded
from stator.kv.engine_socket import follow_engine_socket
from stator.kv.sources import ZmqSource
from stator.llm.output import EngineOutput
from stator.llm.request import (
    GuidedDecoding,
    OutputOptions,
    PreprocessedRequest,
    Routing,
    SamplingOptions,
    StopConditions,
)
from stator.runtime.context import Context
from stator.tasks import Scope
from stator.testing.engine_suite import INSTANCE, EngineSuite, RunningEngine, check_answer, collect
from stator.testing.list_sink import ListSink
from stator.testing.plane_suite import eventually
from stator.testing.tiny_tokenizers import build_model_directory
from stator.worker.snapshot import ComponentSnapshot

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)


@asynccontextmanager
async def started(model: Path, **options: Any) -> AsyncGenerator[RunningEngine]:
    class Suite(EngineSuite):
        def make(self) -> VllmEngine:
            return VllmEngine(VllmOptions(model=str(model), **options))

    async with Suite().started() as running:
        yield running


def request(prompt: Sequence[int] = (5, 6, 7), count: int | None = 8, **fields: Any) -> PreprocessedRequest:
    fields.setdefault("stop_conditions", StopConditions(max_tokens=count))
    return PreprocessedRequest(token_ids=list(prompt), **fields)


def expected(prompt: Sequence[int], count: int) -> list[int]:
    return [(sum(prompt) + number) % 500 + 5 for number in range(count)]


def tokens(items: list[EngineOutput]) -> list[int]:
    return [token for item in items for token in item.token_ids]


def params_of(running: RunningEngine, asked: PreprocessedRequest) -> Any:
    """What vLLM is given."""
    engine: Any = running.engine
    return engine._library.sampling_params(asked, engine._defaults)


class TestVllmContract(EngineSuite):
    """The engine kit's contract."""

    @pytest.fixture(autouse=True)
    def directory(self, model: Path) -> None:
        self.model = model

    def make(self) -> VllmEngine:
        return VllmEngine(VllmOptions(model=str(self.model)))


async def test_the_engine_describes_itself(model: Path) -> None:
    async with started(
        model, name="served", context_length=512, max_num_seqs=3, data_parallel_size=2, gpu_memory_utilization=0.5
    ) as running:
        config = running.config
        arguments = fake_vllm.AsyncLLM.last.arguments
    assert (config.model, config.served_name) == (str(model), "served")
    assert (config.context_length, config.kv_cache_block_size, config.total_kv_blocks) == (512, fake_vllm.BLOCK, 1000)
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.data_parallel_size) == (3, 2048, 2)
    assert config.card.tokenizer is not None
    assert (arguments.max_model_len, arguments.gpu_memory_utilization, arguments.dtype) == (512, 0.5, "auto")


async def test_more_arguments_are_vllms_own(model: Path) -> None:
    async with started(model, arguments="enforce-eager=true, max_model_len=99, dtype=bfloat16"):
        arguments = fake_vllm.AsyncLLM.last.arguments
        assert (arguments.enforce_eager, arguments.max_model_len, arguments.dtype) == (True, 99, "bfloat16")
    async with started(model, arguments='{"max_num_batched_tokens": 77}'):
        assert fake_vllm.AsyncLLM.last.arguments.max_num_batched_tokens == 77


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("enforce_eager=maybe", "vLLM does not take these arguments: .*enforce_eager Input should be a valid boolean"),
        ("speed=11", "vLLM does not take these arguments: .*'speed'"),
        ("enforce_eager", "NAME=VALUE"),
        ("{", "no JSON object"),
    ],
)
async def test_arguments_that_vllm_does_not_take_are_one_line(model: Path, arguments: str, complaint: str) -> None:
    engine = VllmEngine(VllmOptions(model=str(model), arguments=arguments))
    with pytest.raises(ConfigError, match=complaint) as caught:
        await engine.start(INSTANCE)
    assert "\n" not in caught.value.message
    await engine.cleanup()


def test_a_model_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs a model"):
        VllmEngine(VllmOptions())


async def test_a_missing_extra_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = VllmEngine(VllmOptions(model=str(model)))
    with pytest.raises(ConfigError, match=r'^the vllm engine needs vllm(\.\w+)*: pip install "stator\[vllm\]"$'):
        await engine.start(INSTANCE)
    await engine.cleanup()


async def test_an_old_version_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch, StructuredOutputsParams=None)
    engine = VllmEngine(VllmOptions(model=str(model)))
    with pytest.raises(ConfigError, match=r"0\.11 and later are.*StructuredOutputsParams"):
        await engine.start(INSTANCE)
    await engine.cleanup()


async def test_a_version_without_errors_of_its_own_for_requests(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch, VLLMClientError=None)
    async with started(model) as running:
        with pytest.raises(EngineError, match="this prompt") as caught:
            await running.answer(request([499, 1]))
        assert caught.value.kind == "InvalidArgument"


async def test_what_happens_while_loading_is_passed_on(tmp_path: Path) -> None:
    engine = VllmEngine(VllmOptions(model=f"{tmp_path}-that-fails"))
    with pytest.raises(RuntimeError, match="Engine core initialization failed"):
        await engine.start(INSTANCE)
    await engine.cleanup()


async def test_loading_does_not_block_our_loop_and_is_reported(model: Path) -> None:
    engine, reports, turns = VllmEngine(VllmOptions(model=str(model))), list[str](), 0
    engine.follow_progress(reports.append)
    starting = asyncio.ensure_future(engine.start(INSTANCE))
    while not starting.done():
        turns += 1
        await asyncio.sleep(0.001)
    await starting
    assert turns > 10
    await engine.cleanup()
    assert [report for report in reports if "starting vLLM" in report]
    assert fake_vllm.AsyncLLM.last.is_shut_down


# -- requests


async def test_tokens_usage_and_cached_tokens(model: Path) -> None:
    prompt = list(range(5, 45))
    async with started(model) as running:
        first, second = [await running.answer(request(prompt, 8)) for _ in range(2)]
    for items, cached in ((first, 0), (second, 32)):
        check_answer(items)
        assert tokens(items) == expected(prompt, 8)
        assert items[-1].finish_reason == "length"
        usage = items[-1].completion_usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (40, 8, 48)
        assert usage.prompt_tokens_details == {"cached_tokens": cached}


async def test_answers_end_where_they_should(model: Path) -> None:
    prompt = [5, 6, 7]
    text = expected(prompt, 8)
    async with started(model) as running:
        for stop, end in (
            (StopConditions(max_tokens=8, stop_token_ids=[text[3]]), ("stop", text[3])),
            (StopConditions(max_tokens=8, stop_token_ids_visible=[text[3]]), ("stop", text[3])),
            (StopConditions(max_tokens=8, stop_token_ids_hidden=[text[3]]), ("eos", None)),
        ):
            items = await running.answer(request(prompt, stop_conditions=stop))
            assert tokens(items) == text[:4]
            assert (items[-1].finish_reason, items[-1].stop_reason) == end
        items = await running.answer(request(prompt, eos_token_ids=[text[2]]))
        assert (tokens(items), items[-1].finish_reason) == (text[:3], "eos")
        ignored = StopConditions(max_tokens=8, ignore_eos=True, stop_token_ids_hidden=[text[2]])
        items = await running.answer(request(prompt, eos_token_ids=[text[2]], stop_conditions=ignored))
        assert (tokens(items), items[-1].finish_reason) == (text, "length")
        own = [fake_vllm.EOS - 5 - 3]  # the fourth token is the tokenizer's own end of sequence
        items = await running.answer(request(own))
        assert (len(tokens(items)), items[-1].finish_reason, items[-1].stop_reason) == (4, "eos", None)
        items = await running.answer(request(prompt, 0))
        assert [(item.token_ids, item.finish_reason) for item in items] == [([], "length")]


async def test_no_limit_is_the_end_of_the_context(model: Path) -> None:
    async with started(model, context_length=30) as running:
        items = await running.answer(request([5] * 10, None))
    assert (len(tokens(items)), items[-1].finish_reason) == (20, "length")


async def test_log_probabilities(model: Path) -> None:
    async with started(model) as running:
        items = await running.answer(request([5], 2, output_options=OutputOptions(logprobs=2)))
        chosen = await running.answer(request([5], 1, output_options=OutputOptions(logprobs=0)))
    for item, token in zip(items, expected([5], 2), strict=True):
        assert item.log_probs == [-1.0]
        assert item.top_logprobs is not None
        assert [(one.rank, one.token_id, one.logprob) for one in item.top_logprobs[0]] == [
            (1, token + 1, -0.5),
            (2, token, -1.0),
        ]
    assert (chosen[0].log_probs, chosen[0].top_logprobs) == ([-1.0], [[]])


async def test_sampling_is_passed_on(model: Path) -> None:
    async with started(model) as running:
        params = params_of(running, request(count=None))
        assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 20, None), "what the model wishes, but its length"
        assert (params.detokenize, params.output_kind.name, params.stop_token_ids) == (False, "DELTA", None)
        sampling = SamplingOptions(
            temperature=0.0,
            top_p=0.5,
            top_k=-1,
            min_p=0.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            repetition_penalty=1.1,
            seed=7,
            guided_decoding=GuidedDecoding(regex="a+", whitespace_pattern=" "),
        )
        stop = StopConditions(max_tokens=9, min_tokens=3, stop_token_ids=[8], stop_token_ids_hidden=[9], max_thinking_tokens=4)
        params = params_of(running, request(sampling_options=sampling, stop_conditions=stop, eos_token_ids=[3]))
        assert msgspec.structs.asdict(params) | {"structured_outputs": None} == msgspec.structs.asdict(
            fake_vllm.SamplingParams(
                temperature=0.0,
                top_p=0.5,
                top_k=-1,
                min_p=0.1,
                presence_penalty=0.2,
                frequency_penalty=0.3,
                repetition_penalty=1.1,
                seed=7,
                max_tokens=9,
                min_tokens=3,
                stop_token_ids=[3, 8, 9],
                thinking_token_budget=4,
                detokenize=False,
                output_kind=fake_vllm.RequestOutputKind.DELTA,
            )
        )
        assert (params.structured_outputs.regex, params.structured_outputs.whitespace_pattern) == ("a+", " ")
        tag = GuidedDecoding(structural_tag={"type": "structural_tag"})
        params = params_of(running, request(sampling_options=SamplingOptions(guided_decoding=tag)))
        assert params.structured_outputs.structural_tag == '{"type":"structural_tag"}'


async def test_the_copy_of_the_model_may_be_chosen(model: Path) -> None:
    async with started(model, data_parallel_size=2) as running:
        stream = running.generate(request(count=1000, routing=Routing(dp_rank=1)))
        await anext(stream)
        assert [each.rank for each in fake_vllm.AsyncLLM.last.requests] == [1]
        with pytest.raises(EngineError, match="out of range") as caught:
            await running.answer(request(routing=Routing(dp_rank=2)))
        assert caught.value.kind == "InvalidArgument"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt": [5] * 300}, "longer than the maximum model length"),
        ({"sampling_options": SamplingOptions(temperature=-1.0)}, "temperature must be non-negative"),
        ({"sampling_options": SamplingOptions(n=2)}, "more than one choice"),
        ({"sampling_options": SamplingOptions(use_beam_search=True)}, "beam search"),
        ({"sampling_options": SamplingOptions(guided_decoding=GuidedDecoding(backend="x"))}, "one kind of structured outputs"),
        ({"routing": Routing(lora_name="lora1")}, "LoRA adapters"),
        ({"multi_modal_data": {"image_url": []}}, "multimodal input"),
        ({"output_options": OutputOptions(prompt_logprobs=1)}, "prompt log probabilities"),
        ({"prompt": [499, 1]}, "^this prompt"),
    ],
)
async def test_what_cannot_be_done_is_an_invalid_argument(model: Path, fields: dict[str, Any], complaint: str) -> None:
    async with started(model, context_length=300) as running:
        with pytest.raises(EngineError, match=complaint) as caught:
            await running.answer(request(**({"prompt": [5]} | fields)))
        assert caught.value.kind == "InvalidArgument"
        check_answer(await running.answer(request()))


async def test_other_errors_are_the_engines_own(model: Path) -> None:
    async with started(model) as running:
        with pytest.raises(EngineError, match="RuntimeError: this prompt") as caught:
            await running.answer(request([499, 2]))
        assert caught.value.kind == "Unknown"
        assert isinstance(caught.value.__cause__, fake_vllm.EngineGenerateError)


async def test_a_full_queue_is_an_overload(model: Path) -> None:
    async with started(model) as running, Scope("crowd") as crowd:
        for _ in range(68):
            crowd.spawn(collect(running.generate(request(count=10_000))))
        await eventually(lambda: len(fake_vllm.AsyncLLM.last.waiting) == 64)
        with pytest.raises(Overloaded, match="currently busy"):
            await running.answer(request())


async def test_stopped_requests_are_aborted_over_there(model: Path) -> None:
    async with started(model) as running:
        context = Context("stopped")
        stream = running.generate(request(count=10_000), context)
        first = await anext(stream)
        context.stop()
        items = [first, *await collect(stream)]
        assert items[-1].finish_reason == "cancelled"
        usage = items[-1].completion_usage
        assert usage is not None
        assert usage.completion_tokens == len(tokens(items))
        engine = fake_vllm.AsyncLLM.last
        await eventually(lambda: not engine.requests and len(engine.aborted) == 1)


# -- load, events, death


class Snapshots:
    dp_ranks = (0, 1)

    def __init__(self) -> None:
        self.last: dict[int, ComponentSnapshot] = {}
        self.most = {0: 0, 1: 0}

    def publish(self, dp_rank: int, snapshot: ComponentSnapshot) -> None:
        self.last[dp_rank] = snapshot
        self.most[dp_rank] = max(self.most[dp_rank], snapshot.kv_used_blocks)


async def test_steps_are_snapshots(model: Path) -> None:
    prompt = [5] * 40
    async with started(model, data_parallel_size=2) as running:
        sink = Snapshots()
        assert list(running.engine.snapshot_ranks()) == [0, 1]
        running.engine.attach_snapshots(sink)
        empty = ComponentSnapshot(kv_used_blocks=0, kv_total_blocks=1000, gpu_cache_usage=0.0)
        assert sink.last == {0: empty, 1: empty}
        for _ in range(2):
            await running.answer(request(prompt, 20, routing=Routing(dp_rank=1)))
        await eventually(lambda: sink.last[1].kv_used_blocks == 0)
        assert sink.most == {0: 0, 1: 4}
        assert sink.last[1].kv_cache_hit_rate == pytest.approx(0.5)


async def test_kv_events_reach_us_without_a_port_open_to_others(model: Path) -> None:
    async with started(model, data_parallel_size=2) as running, Scope("followers") as scope:
        sources = running.engine.kv_event_sources()
        assert sources == running.engine.kv_event_sources()
        sink = ListSink(block_size=fake_vllm.BLOCK)
        for source in sources:
            assert isinstance(source, ZmqSource)
            assert source.endpoint.startswith("tcp://127.0.0.1:")
            scope.spawn(follow_engine_socket(source, sink.for_rank(source.dp_rank)))
        number = 0
        async with asyncio.timeout(10):
            while {told[0] for told in sink.told} != {0, 1}:
                number += 1
                for rank in (0, 1):
                    await running.answer(request([number + 5] * 20, 1, routing=Routing(dp_rank=rank)))
        rank, what, _, parent, ids, lora, tier = sink.told[-1]
        assert (what, parent, len(ids), lora, tier) == ("stored", None, fake_vllm.BLOCK, None, "device")
        assert set(ids) == {number + 5}


async def test_kv_events_may_be_switched_off_or_be_the_operators_own(model: Path) -> None:
    async with started(model, kv_events=False) as running:
        assert not running.engine.kv_event_sources()
        assert fake_vllm.AsyncLLM.last.arguments.kv_events_config is None
    async with started(model, arguments='{"kv_events_config": null}') as running:
        assert not running.engine.kv_event_sources()


async def test_the_death_of_the_engine_is_noticed_while_it_is_idle(model: Path) -> None:
    async with started(model) as running:
        failed = asyncio.ensure_future(running.engine.failed())
        check_answer(await running.answer(request()))
        assert not failed.done()
        fake_vllm.AsyncLLM.last.die()
        assert "EngineDeadError" in await asyncio.wait_for(failed, 5)
        with pytest.raises(EngineError, match="EngineDeadError") as caught:
            await running.answer(request())
        assert caught.value.kind == "EngineShutdown"


async def test_the_death_of_the_engine_ends_what_runs(model: Path) -> None:
    async with started(model) as running:
        stream = running.generate(request(count=10_000))
        await anext(stream)
        fake_vllm.AsyncLLM.last.die()
        with pytest.raises(EngineError, match="EngineDeadError") as caught:
            await collect(stream)
        assert caught.value.kind == "EngineShutdown"
        assert await asyncio.wait_for(running.engine.failed(), 0.5)
