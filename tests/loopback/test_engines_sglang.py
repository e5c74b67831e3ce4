"""The SGLang engine over a stand-in for SGLang with its public interface."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loopback import fake_sglang
from stator.engines.sglang import SglangEngine, SglangOptions
from stator.errors import ConfigError, EngineError, Overloaded
from stator.kv.engine_socket import follow_engine_socket
from stator.kv.sources import ZmqSource
from stator.llm.output import EngineOutput, FinishError
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
    fake_sglang.install(monkeypatch)


@asynccontextmanager
async def started(model: Path, **options: Any) -> AsyncGenerator[RunningEngine]:
    class Suite(EngineSuite):
        def make(self) -> SglangEngine:
            return SglangEngine(SglangOptions(model=str(model), **options))

    async with Suite().started() as running:
        yield running


def request(prompt: Sequence[int] = (5, 6, 7), count: int | None = 8, **fields: Any) -> PreprocessedRequest:
    fields.setdefault("stop_conditions", StopConditions(max_tokens=count))
    return PreprocessedRequest(token_ids=list(prompt), **fields)


def expected(prompt: Sequence[int], count: int) -> list[int]:
    return [(sum(prompt) + number) % 500 + 5 for number in range(count)]


def tokens(items: list[EngineOutput]) -> list[int]:
    return [token for item in items for token in item.token_ids]


class TestSglangContract(EngineSuite):
    """The engine kit's contract."""

    @pytest.fixture(autouse=True)
    def directory(self, model: Path) -> None:
        self.model = model

    def make(self) -> SglangEngine:
        return SglangEngine(SglangOptions(model=str(self.model)))


class TestSglangContractWithAllTokensInEachChunk(EngineSuite):
    """As SGLang streams when it is told to."""

    @pytest.fixture(autouse=True)
    def directory(self, model: Path) -> None:
        self.model = model

    def make(self) -> SglangEngine:
        options = SglangOptions(model=str(self.model), arguments="incremental_streaming_output=false")
        return SglangEngine(options)


async def test_the_engine_describes_itself(model: Path) -> None:
    async with started(
        model,
        name="served",
        context_length=512,
        max_num_seqs=3,
        data_parallel_size=2,
        mem_fraction_static=0.5,
        block_size=16,
    ) as running:
        config = running.config
        arguments = fake_sglang.Engine.last.server_args
    assert (config.model, config.served_name) == (str(model), "served")
    assert (config.context_length, config.kv_cache_block_size, config.total_kv_blocks) == (512, 16, 1000)
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.data_parallel_size) == (3, 4096, 2)
    assert config.card.tokenizer is not None
    assert (arguments.context_length, arguments.mem_fraction_static, arguments.tp_size) == (512, 0.5, 1)
    assert (arguments.skip_tokenizer_init, arguments.incremental_streaming_output) == (True, True)


async def test_more_arguments_are_sglangs_own(model: Path) -> None:
    async with started(model, guided_decoding=True, arguments="--enable-metrics=true, context_length=99"):
        arguments = fake_sglang.Engine.last.server_args
        assert (arguments.enable_metrics, arguments.context_length, arguments.skip_tokenizer_init) == (True, 99, False)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [("speed=11, gears=5", "SGLang does not take these arguments: gears, speed"), ("speed", "NAME=VALUE")],
)
async def test_arguments_that_sglang_does_not_take_are_one_line(model: Path, arguments: str, complaint: str) -> None:
    engine = SglangEngine(SglangOptions(model=str(model), arguments=arguments))
    with pytest.raises(ConfigError, match=complaint) as caught:
        await engine.start(INSTANCE)
    assert "\n" not in caught.value.message
    await engine.cleanup()


def test_a_model_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs a model"):
        SglangEngine(SglangOptions())


async def test_a_missing_extra_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sglang", None)
    engine = SglangEngine(SglangOptions(model=str(model)))
    with pytest.raises(ConfigError, match=r'^the sglang engine needs sglang(\.\w+)*: pip install "stator\[sglang\]"$'):
        await engine.start(INSTANCE)
    await engine.cleanup()


async def test_what_happens_while_loading_is_passed_on(tmp_path: Path) -> None:
    engine = SglangEngine(SglangOptions(model=f"{tmp_path}-that-fails"))
    with pytest.raises(RuntimeError, match="Initialization failed"):
        await engine.start(INSTANCE)
    await engine.cleanup()


async def test_loading_does_not_block_our_loop_and_everything_is_given_back(model: Path) -> None:
    engine, reports, turns = SglangEngine(SglangOptions(model=str(model))), list[str](), 0
    engine.follow_progress(reports.append)
    starting = asyncio.ensure_future(engine.start(INSTANCE))
    while not starting.done():
        turns += 1
        await asyncio.sleep(0.001)
    await starting
    assert turns > 10
    assert fake_sglang.Engine.last.loop is not asyncio.get_running_loop(), "it would take this loop's signals"
    await engine.cleanup()
    assert [report for report in reports if "starting SGLang" in report]
    assert fake_sglang.Engine.last.is_shut_down
    assert signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL


# -- requests


@pytest.mark.parametrize("incremental", ["true", "false"])
async def test_tokens_usage_and_cached_tokens(model: Path, incremental: str) -> None:
    prompt = list(range(5, 45))
    async with started(model, block_size=16, arguments=f"incremental_streaming_output={incremental}") as running:
        first, second = [await running.answer(request(prompt, 8)) for _ in range(2)]
    for items, cached in ((first, 0), (second, 32)):
        check_answer(items)
        assert tokens(items) == expected(prompt, 8)
        assert items[-1].finish_reason == "length"
        usage = items[-1].completion_usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (40, 8, 48)
        assert usage.prompt_tokens_details == {"cached_tokens": cached}


async def test_a_version_with_the_older_names(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sglang.install(monkeypatch, old=True)
    async with started(model, data_parallel_size=2) as running:
        arguments: Any = fake_sglang.Engine.last.server_args
        assert arguments.stream_output
        items = await running.answer(request([5, 6], 8, routing=Routing(dp_rank=1)))
        assert tokens(items) == expected([5, 6], 8)


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
        items = await running.answer(request(prompt, 0))
        assert [(item.token_ids, item.finish_reason) for item in items] == [([], "length")]


async def test_no_limit_is_the_end_of_the_context(model: Path) -> None:
    async with started(model, context_length=30) as running:
        for count in (None, 100):
            items = await running.answer(request([5] * 10, count))
            assert (len(tokens(items)), items[-1].finish_reason) == (20, "length")


@pytest.mark.parametrize("incremental", ["true", "false"])
async def test_log_probabilities(model: Path, incremental: str) -> None:
    async with started(model, arguments=f"incremental_streaming_output={incremental}") as running:
        items = await running.answer(request([5], 3, output_options=OutputOptions(logprobs=2)))
        chosen = await running.answer(request([5], 1, output_options=OutputOptions(logprobs=0)))
    values = [value for item in items for value in item.log_probs or ()]
    top = [position for item in items for position in item.top_logprobs or ()]
    assert values == [-1.0] * 3
    assert [[(one.rank, one.token_id, one.logprob) for one in position] for position in top] == [
        [(1, token + 1, -0.5), (2, token, -1.0)] for token in expected([5], 3)
    ]
    assert (chosen[0].log_probs, chosen[0].top_logprobs) == ([-1.0], [[]])


def params_of(running: RunningEngine, asked: PreprocessedRequest) -> dict[str, Any]:
    """What SGLang is given."""
    engine: Any = running.engine
    return engine._call(asked, "r")["sampling_params"]


async def test_sampling_is_passed_on(model: Path) -> None:
    async with started(model, context_length=100) as running:
        assert params_of(running, request(count=None)) == {"temperature": 0.6, "top_k": 20, "max_new_tokens": 97}
        sampling = SamplingOptions(
            temperature=0.0,
            top_p=0.5,
            top_k=-1,
            min_p=0.1,
            presence_penalty=0.2,
            frequency_penalty=0.3,
            repetition_penalty=1.1,
            seed=7,
        )
        stop = StopConditions(max_tokens=9, min_tokens=3, stop_token_ids=[8], stop_token_ids_hidden=[9], ignore_eos=False)
        assert params_of(running, request(sampling_options=sampling, stop_conditions=stop, eos_token_ids=[3])) == {
            "temperature": 0.0,
            "top_p": 0.5,
            "top_k": -1,
            "min_p": 0.1,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.3,
            "repetition_penalty": 1.1,
            "sampling_seed": 7,
            "max_new_tokens": 9,
            "min_new_tokens": 3,
            "stop_token_ids": [3, 8, 9],
            "ignore_eos": False,
        }


@pytest.mark.parametrize(
    ("guided", "field"),
    [
        (GuidedDecoding(json={"type": "object"}), {"json_schema": '{"type":"object"}'}),
        (GuidedDecoding(json='{"a":1}'), {"json_schema": '{"a":1}'}),
        (GuidedDecoding(regex="a+"), {"regex": "a+"}),
        (GuidedDecoding(grammar="root ::= 'a'"), {"ebnf": "root ::= 'a'"}),
        (GuidedDecoding(choice=["yes (1)", "no"]), {"regex": r"(yes \(1\))|(no)"}),
        (GuidedDecoding(structural_tag={"a": 1}), {"structural_tag": '{"a":1}'}),
    ],
)
async def test_guided_decoding_is_passed_on(model: Path, guided: GuidedDecoding, field: dict[str, str]) -> None:
    asked = request(sampling_options=SamplingOptions(guided_decoding=guided))
    async with started(model, guided_decoding=True) as running:
        params = params_of(running, asked)
        assert {
            name: value for name, value in params.items() if name not in ("temperature", "top_k", "max_new_tokens")
        } == field
        check_answer(await running.answer(asked))


async def test_the_copy_of_the_model_may_be_chosen(model: Path) -> None:
    async with started(model, data_parallel_size=2) as running:
        stream = running.generate(request(count=1000, routing=Routing(dp_rank=1)))
        await anext(stream)
        assert [each.rank for each in fake_sglang.Engine.last.tokenizer_manager.running] == [1]
        with pytest.raises(EngineError, match="out of range") as caught:
            await running.answer(request(routing=Routing(dp_rank=2)))
        assert caught.value.kind == "InvalidArgument"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt": [5] * 300}, "leaves no room"),
        ({"sampling_options": SamplingOptions(temperature=-1.0)}, "temperature must be non-negative"),
        ({"sampling_options": SamplingOptions(n=2)}, "more than one choice"),
        ({"sampling_options": SamplingOptions(guided_decoding=GuidedDecoding(regex="a"))}, "set sglang.guided_decoding"),
        ({"routing": Routing(lora_name="lora1")}, "LoRA adapters"),
        ({"prompt": [499, 1]}, "^this prompt"),
        ({"prompt": [498, 1]}, "^this prompt"),
    ],
)
async def test_what_cannot_be_done_is_an_invalid_argument(model: Path, fields: dict[str, Any], complaint: str) -> None:
    async with started(model, context_length=300) as running:
        with pytest.raises(EngineError, match=complaint) as caught:
            await running.answer(request(**({"prompt": [5]} | fields)))
        assert caught.value.kind == "InvalidArgument"
        check_answer(await running.answer(request()))


async def test_guided_decoding_needs_a_kind(model: Path) -> None:
    async with started(model, guided_decoding=True) as running:
        with pytest.raises(EngineError, match="needs one of") as caught:
            await running.answer(request(sampling_options=SamplingOptions(guided_decoding=GuidedDecoding(backend="x"))))
        assert caught.value.kind == "InvalidArgument"


async def test_other_errors_are_the_engines_own(model: Path) -> None:
    async with started(model) as running:
        with pytest.raises(EngineError, match="RuntimeError: this prompt") as caught:
            await running.answer(request([499, 2]))
        assert caught.value.kind == "Unknown"
        items = await running.answer(request([498, 2]))
        assert items[-1].finish_reason == FinishError("this prompt")
        for prompt in ([499, 3], [498, 3]):
            with pytest.raises(Overloaded):
                await running.answer(request(prompt))


@pytest.mark.parametrize("how", ["stopped", "killed", "left"])
async def test_requests_that_nobody_wants_are_aborted_over_there(model: Path, how: str) -> None:
    async with started(model) as running:
        context = Context(how)
        stream = running.generate(request(count=10_000), context)
        first = await anext(stream)
        manager = fake_sglang.Engine.last.tokenizer_manager
        assert len(manager.rid_to_state) == 1
        if how == "stopped":
            context.stop()
            items = [first, *await collect(stream)]
            assert items[-1].finish_reason == "cancelled"
            usage = items[-1].completion_usage
            assert usage is not None
            assert usage.completion_tokens == len(tokens(items))
        elif how == "killed":
            context.kill()
        else:
            await stream.aclose()  # type: ignore[attr-defined]
        await eventually(lambda: not manager.rid_to_state and len(manager.aborted) == 1)
        check_answer(await running.answer(request()))
        assert len(manager.aborted) == 1, "what has ended is not aborted"


# -- load, events, death


class Snapshots:
    dp_ranks = (0, 1)

    def __init__(self) -> None:
        self.last: dict[int, ComponentSnapshot] = {}

    def publish(self, dp_rank: int, snapshot: ComponentSnapshot) -> None:
        self.last[dp_rank] = snapshot


async def test_the_schedulers_load_is_published(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with started(model, data_parallel_size=2, block_size=16, load_interval=0.01) as running:
        sink = Snapshots()
        assert list(running.engine.snapshot_ranks()) == [0, 1]
        running.engine.attach_snapshots(sink)
        stream = running.generate(request([5] * 100, 10_000, routing=Routing(dp_rank=1)))
        await anext(stream)
        await eventually(lambda: sink.last[1].kv_used_blocks >= 7)
        one = sink.last[1]
        assert (one.kv_total_blocks, one.kv_cache_hit_rate) == (1000, 0.25)
        assert one.gpu_cache_usage == pytest.approx(one.kv_used_blocks / 1000, abs=0.001)
        assert sink.last[0].kv_used_blocks == 0
        manager = fake_sglang.Engine.last.tokenizer_manager
        manager.broken_loads = True
        await eventually(lambda: "SGLang does not tell its load" in caplog.text)
        manager.broken_loads = False
        before = sink.last[1].kv_used_blocks
        await eventually(lambda: sink.last[1].kv_used_blocks > before)
        assert caplog.text.count("SGLang does not tell its load") == 1


async def test_kv_events_reach_us_without_a_port_open_to_others(model: Path) -> None:
    async with started(model, data_parallel_size=2, block_size=16) as running, Scope("followers") as scope:
        sources = running.engine.kv_event_sources()
        assert sources == running.engine.kv_event_sources()
        sink = ListSink(block_size=16)
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
        _, what, _, parent, ids, lora, tier = sink.told[-1]
        assert (what, parent, len(ids), lora, tier) == ("stored", None, 16, None, "device")
        assert len(set(ids)) == 1


async def test_kv_events_may_be_switched_off(model: Path) -> None:
    async with started(model, kv_events=False) as running:
        assert not running.engine.kv_event_sources()
        assert fake_sglang.Engine.last.server_args.kv_events_config is None


async def test_a_process_that_fails_ends_the_engine_and_not_this_process(model: Path) -> None:
    async with started(model) as running:
        failed = asyncio.ensure_future(running.engine.failed())
        stream = running.generate(request(count=10_000))
        await anext(stream)
        assert not failed.done()
        os.kill(os.getpid(), signal.SIGQUIT)
        with pytest.raises(EngineError, match="a process of SGLang failed") as caught:
            await collect(stream)
        assert caught.value.kind == "EngineShutdown"
        assert "a process of SGLang failed" in await asyncio.wait_for(failed, 5)
        with pytest.raises(EngineError, match="a process of SGLang failed"):
            await running.answer(request())
