"""The SGLang engine over a stand-in for SGLang with its public interface."""

import asyncio
import os
import signal
from typing import Any, ClassVar

import pytest

from loopback import fake_sglang
from loopback.foreign_engine_suite import SAMPLING, ForeignContract, ForeignEngineSuite, Snapshots, expected, request, tokens
from stator.engines.sglang import SglangEngine, SglangOptions
from stator.errors import EngineError, Overloaded
from stator.llm.output import FinishError
from stator.llm.request import GuidedDecoding, PreprocessedRequest, Routing, SamplingOptions, StopConditions
from stator.testing.engine_suite import INSTANCE, RunningEngine, check_answer, collect
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(60)


def params_of(running: RunningEngine, asked: PreprocessedRequest) -> dict[str, Any]:
    """What SGLang is given."""
    engine: Any = running.engine
    return engine._call(asked, "r")["sampling_params"]


class SglangContract(ForeignContract):
    library = "sglang"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_sglang.install(monkeypatch)

    def adapter(self, **options: Any) -> SglangEngine:
        return SglangEngine(SglangOptions(**options))


class TestSglangContractWithAllTokensInEachChunk(SglangContract):
    """As SGLang streams when it is told to."""

    options: ClassVar[dict[str, Any]] = {"arguments": "incremental_streaming_output=false"}


class TestSglang(SglangContract, ForeignEngineSuite):
    called = "SGLang"
    memory = "mem_fraction_static"
    blocks: ClassVar[dict[str, Any]] = {"block_size": 16}
    max_batched = 4096
    start_failure = "Initialization failed"

    @property
    def last(self) -> fake_sglang.Engine:
        return fake_sglang.Engine.last

    def arguments(self) -> Any:
        return self.last.server_args

    def is_shut_down(self) -> bool:
        return self.last.is_shut_down

    def ranks(self) -> list[int]:
        return [each.rank for each in self.last.tokenizer_manager.running]

    def known(self) -> dict[str, Any]:
        return self.last.tokenizer_manager.rid_to_state

    def aborted(self) -> list[str]:
        return self.last.tokenizer_manager.aborted

    @pytest.fixture(params=["true", "false"])
    def streaming(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        """Each chunk has the new tokens alone, or all so far."""
        return {"arguments": f"incremental_streaming_output={request.param}"}

    @pytest.fixture(
        params=[("speed=11, gears=5", "SGLang does not take these arguments: gears, speed"), ("speed", "NAME=VALUE")]
    )
    def bad_arguments(self, request: pytest.FixtureRequest) -> tuple[str, str]:
        return request.param

    @pytest.fixture(
        params=[
            ({"prompt": [5] * 300}, "leaves no room"),
            ({"sampling_options": SamplingOptions(temperature=-1.0)}, "temperature must be non-negative"),
            ({"sampling_options": SamplingOptions(n=2)}, "more than one choice"),
            ({"sampling_options": SamplingOptions(guided_decoding=GuidedDecoding(regex="a"))}, "set sglang.guided_decoding"),
            ({"routing": Routing(lora_name="lora1")}, "LoRA adapters"),
            ({"prompt": [499, 1]}, "^this prompt"),
            ({"prompt": [498, 1]}, "^this prompt"),
        ]
    )
    def impossible(self, request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
        return request.param

    # -- starting

    async def test_options_are_arguments_by_sglangs_names(self) -> None:
        async with self.started(context_length=512):
            arguments = self.arguments()
        assert (arguments.context_length, arguments.tp_size) == (512, 1)
        assert (arguments.skip_tokenizer_init, arguments.incremental_streaming_output) == (True, True)

    async def test_more_arguments_are_sglangs_own(self) -> None:
        async with self.started(guided_decoding=True, arguments="--enable-metrics=true, context_length=99"):
            arguments = self.last.server_args
            assert (arguments.enable_metrics, arguments.context_length, arguments.skip_tokenizer_init) == (True, 99, False)

    async def test_signals_are_given_back(self) -> None:
        engine = self.made()
        await engine.start(INSTANCE)
        assert signal.getsignal(signal.SIGQUIT) is not signal.SIG_DFL
        assert self.last.loop is not asyncio.get_running_loop(), "it would take this loop's signals"
        await engine.cleanup()
        assert signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL

    # -- requests

    async def test_a_version_with_the_older_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_sglang.install(monkeypatch, old=True)
        async with self.started(data_parallel_size=2) as running:
            arguments: Any = self.last.server_args
            assert arguments.stream_output
            items = await running.answer(request([5, 6], 8, routing=Routing(dp_rank=1)))
            assert tokens(items) == expected([5, 6], 8)

    async def test_sampling_is_passed_on(self) -> None:
        async with self.started(context_length=100) as running:
            assert params_of(running, request(count=None)) == {"temperature": 0.6, "top_k": 20, "max_new_tokens": 97}
            sampling = SamplingOptions(**SAMPLING, seed=7)
            stop = StopConditions(max_tokens=9, min_tokens=3, stop_token_ids=[8], stop_token_ids_hidden=[9], ignore_eos=False)
            assert params_of(running, request(sampling_options=sampling, stop_conditions=stop, eos_token_ids=[3])) == {
                **SAMPLING,
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
    async def test_guided_decoding_is_passed_on(self, guided: GuidedDecoding, field: dict[str, str]) -> None:
        asked = request(sampling_options=SamplingOptions(guided_decoding=guided))
        async with self.started(guided_decoding=True) as running:
            params = params_of(running, asked)
            assert {
                name: value for name, value in params.items() if name not in ("temperature", "top_k", "max_new_tokens")
            } == field
            check_answer(await running.answer(asked))

    async def test_guided_decoding_needs_a_kind(self) -> None:
        async with self.started(guided_decoding=True) as running:
            with pytest.raises(EngineError, match="needs one of") as caught:
                await running.answer(request(sampling_options=SamplingOptions(guided_decoding=GuidedDecoding(backend="x"))))
            assert caught.value.kind == "InvalidArgument"

    async def test_errors_say_who_must_act(self) -> None:
        async with self.started() as running:
            items = await running.answer(request([498, 2]))
            assert items[-1].finish_reason == FinishError("this prompt")
            for prompt in ([499, 3], [498, 3]):
                with pytest.raises(Overloaded):
                    await running.answer(request(prompt))

    # -- load, death

    async def test_the_schedulers_load_is_published(self, caplog: pytest.LogCaptureFixture) -> None:
        async with self.started(data_parallel_size=2, load_interval=0.01, **self.blocks) as running:
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
            manager = self.last.tokenizer_manager
            manager.broken_loads = True
            await eventually(lambda: "SGLang does not tell its load" in caplog.text)
            manager.broken_loads = False
            before = sink.last[1].kv_used_blocks
            await eventually(lambda: sink.last[1].kv_used_blocks > before)
            assert caplog.text.count("SGLang does not tell its load") == 1

    async def test_a_process_that_fails_ends_the_engine_and_not_this_process(self) -> None:
        async with self.started() as running:
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
