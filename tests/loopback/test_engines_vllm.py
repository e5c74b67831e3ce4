"""The vLLM engine over a stand-in for vLLM with its public interface."""

import asyncio
from typing import Any

import msgspec
import pytest

from loopback import fake_vllm
from loopback.foreign_engine_suite import SAMPLING, ForeignEngineSuite, Snapshots, request, tokens
from stator.engines.vllm import VllmEngine, VllmOptions
from stator.errors import EngineError, Overloaded
from stator.llm.request import (
    GuidedDecoding,
    OutputOptions,
    PreprocessedRequest,
    Routing,
    SamplingOptions,
    StopConditions,
)
from stator.tasks import Scope
from stator.testing.engine_suite import RunningEngine, check_answer, collect
from stator.testing.plane_suite import eventually
from stator.worker.snapshot import ComponentSnapshot

pytestmark = pytest.mark.timeout(60)


def params_of(running: RunningEngine, asked: PreprocessedRequest) -> Any:
    """What vLLM is given."""
    engine: Any = running.engine
    return engine._library.sampling_params(asked, engine._defaults)


class TestVllm(ForeignEngineSuite):
    library = "vllm"
    called = "vLLM"
    memory = "gpu_memory_utilization"
    max_batched = 2048
    start_failure = "Engine core initialization failed"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_vllm.install(monkeypatch)

    def adapter(self, **options: Any) -> VllmEngine:
        return VllmEngine(VllmOptions(**options))

    @property
    def last(self) -> fake_vllm.AsyncLLM:
        return fake_vllm.AsyncLLM.last

    def arguments(self) -> Any:
        return self.last.arguments

    def is_shut_down(self) -> bool:
        return self.last.is_shut_down

    def ranks(self) -> list[int]:
        return [each.rank for each in self.last.requests]

    def known(self) -> list[Any]:
        return [*self.last.waiting, *self.last.requests]

    def aborted(self) -> list[str]:
        return self.last.aborted

    @pytest.fixture(
        params=[
            ("enforce_eager=maybe", "vLLM does not take these arguments: .*enforce_eager Input should be a valid boolean"),
            ("speed=11", "vLLM does not take these arguments: .*'speed'"),
            ("enforce_eager", "NAME=VALUE"),
            ("{", "no JSON object"),
        ]
    )
    def bad_arguments(self, request: pytest.FixtureRequest) -> tuple[str, str]:
        return request.param

    @pytest.fixture(
        params=[
            ({"prompt": [5] * 300}, "longer than the maximum model length"),
            ({"sampling_options": SamplingOptions(temperature=-1.0)}, "temperature must be non-negative"),
            ({"sampling_options": SamplingOptions(n=2)}, "more than one choice"),
            ({"sampling_options": SamplingOptions(use_beam_search=True)}, "beam search"),
            (
                {"sampling_options": SamplingOptions(guided_decoding=GuidedDecoding(backend="x"))},
                "one kind of structured outputs",
            ),
            ({"routing": Routing(lora_name="lora1")}, "LoRA adapters"),
            ({"multi_modal_data": {"image_url": []}}, "multimodal input"),
            ({"output_options": OutputOptions(prompt_logprobs=1)}, "prompt log probabilities"),
            ({"prompt": [499, 1]}, "^this prompt"),
        ]
    )
    def impossible(self, request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
        return request.param

    # -- starting

    async def test_options_are_arguments_by_vllms_names(self) -> None:
        async with self.started(context_length=512):
            arguments = self.arguments()
        assert (arguments.max_model_len, arguments.dtype) == (512, "auto")

    async def test_more_arguments_are_vllms_own(self) -> None:
        async with self.started(arguments="enforce-eager=true, max_model_len=99, dtype=bfloat16"):
            arguments = self.last.arguments
            assert (arguments.enforce_eager, arguments.max_model_len, arguments.dtype) == (True, 99, "bfloat16")
        async with self.started(arguments='{"max_num_batched_tokens": 77}'):
            assert self.last.arguments.max_num_batched_tokens == 77

    async def test_an_old_version_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_vllm.install(monkeypatch, StructuredOutputsParams=None)
        await self.refusal(r"0\.11 and later are.*StructuredOutputsParams")

    async def test_a_version_without_errors_of_its_own_for_requests(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_vllm.install(monkeypatch, VLLMClientError=None)
        async with self.started() as running:
            with pytest.raises(EngineError, match="this prompt") as caught:
                await running.answer(request([499, 1]))
            assert caught.value.kind == "InvalidArgument"

    # -- requests

    async def test_the_tokenizers_own_end_of_sequence_has_no_name(self) -> None:
        async with self.started() as running:
            items = await running.answer(request([fake_vllm.EOS - 5 - 3]))  # the fourth token
        assert (len(tokens(items)), items[-1].finish_reason, items[-1].stop_reason) == (4, "eos", None)

    async def test_sampling_is_passed_on(self) -> None:
        async with self.started() as running:
            params = params_of(running, request(count=None))
            assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 20, None), (
                "what the model wishes, but its length"
            )
            assert (params.detokenize, params.output_kind.name, params.stop_token_ids) == (False, "DELTA", None)
            guided = GuidedDecoding(regex="a+", whitespace_pattern=" ")
            sampling = SamplingOptions(**SAMPLING, seed=7, guided_decoding=guided)
            stop = StopConditions(
                max_tokens=9, min_tokens=3, stop_token_ids=[8], stop_token_ids_hidden=[9], max_thinking_tokens=4
            )
            params = params_of(running, request(sampling_options=sampling, stop_conditions=stop, eos_token_ids=[3]))
            assert msgspec.structs.asdict(params) | {"structured_outputs": None} == msgspec.structs.asdict(
                fake_vllm.SamplingParams(
                    **SAMPLING,
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

    async def test_the_cause_of_an_error_is_kept(self) -> None:
        async with self.started() as running:
            with pytest.raises(EngineError) as caught:
                await running.answer(request([499, 2]))
            assert isinstance(caught.value.__cause__, fake_vllm.EngineGenerateError)

    async def test_a_full_queue_is_an_overload(self) -> None:
        async with self.started() as running, Scope("crowd") as crowd:
            for _ in range(68):
                crowd.spawn(collect(running.generate(request(count=10_000))))
            await eventually(lambda: len(self.last.waiting) == 64)
            with pytest.raises(Overloaded, match="currently busy"):
                await running.answer(request())

    # -- load, death

    async def test_steps_are_snapshots(self) -> None:
        prompt = [5] * 40
        async with self.started(data_parallel_size=2) as running:
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

    async def test_the_death_of_the_engine_is_noticed_while_it_is_idle(self) -> None:
        async with self.started() as running:
            failed = asyncio.ensure_future(running.engine.failed())
            check_answer(await running.answer(request()))
            assert not failed.done()
            self.last.die()
            assert "EngineDeadError" in await asyncio.wait_for(failed, 5)
            with pytest.raises(EngineError, match="EngineDeadError") as caught:
                await running.answer(request())
            assert caught.value.kind == "EngineShutdown"

    async def test_the_death_of_the_engine_ends_what_runs(self) -> None:
        async with self.started() as running:
            stream = running.generate(request(count=10_000))
            await anext(stream)
            self.last.die()
            with pytest.raises(EngineError, match="EngineDeadError") as caught:
                await collect(stream)
            assert caught.value.kind == "EngineShutdown"
            assert await asyncio.wait_for(running.engine.failed(), 0.5)
