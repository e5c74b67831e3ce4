"""What the adapters of vLLM and SGLang must both do, over stand-ins for the libraries: subclass `ForeignEngineSuite`, say how the
adapter is made and where the stand-in shows what it was given.

The stand-ins answer a prompt that begins with 499 or 498 with an error; its second token says with which.
"""

import asyncio
import sys
from abc import abstractmethod
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from loopback.fake_foreign import next_token
from stator.errors import ConfigError, EngineError
from stator.kv.engine_socket import follow_engine_socket
from stator.kv.sources import ZmqSource
from stator.llm.output import EngineOutput
from stator.llm.request import OutputOptions, PreprocessedRequest, Routing, StopConditions
from stator.runtime.context import Context
from stator.tasks import Scope
from stator.testing.engine_suite import INSTANCE, EngineSuite, RunningEngine, check_answer, collect
from stator.testing.list_sink import ListSink
from stator.testing.plane_suite import eventually
from stator.testing.tiny_tokenizers import build_model_directory
from stator.worker.engine import LLMEngine
from stator.worker.snapshot import ComponentSnapshot

__all__ = ["SAMPLING", "ForeignContract", "ForeignEngineSuite", "Snapshots", "expected", "request", "tokens"]

BLOCK = 16
SAMPLING: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 0.5,
    "top_k": -1,
    "min_p": 0.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "repetition_penalty": 1.1,
}
"""what requests and the libraries call by the same names"""


def request(prompt: Sequence[int] = (5, 6, 7), count: int | None = 8, **fields: Any) -> PreprocessedRequest:
    fields.setdefault("stop_conditions", StopConditions(max_tokens=count))
    return PreprocessedRequest(token_ids=list(prompt), **fields)


def expected(prompt: Sequence[int], count: int) -> list[int]:
    return [next_token(prompt, number) for number in range(count)]


def tokens(items: list[EngineOutput]) -> list[int]:
    return [token for item in items for token in item.token_ids]


class Snapshots:
    """The last one of each of two ranks, and the most blocks it ever said were used."""

    dp_ranks = (0, 1)

    def __init__(self) -> None:
        self.last: dict[int, ComponentSnapshot] = {}
        self.most = {0: 0, 1: 0}

    def publish(self, dp_rank: int, snapshot: ComponentSnapshot) -> None:
        self.last[dp_rank] = snapshot
        self.most[dp_rank] = max(self.most[dp_rank], snapshot.kv_used_blocks)


class ForeignContract(EngineSuite):
    """The engine kit's contract."""

    library: ClassVar[str]
    """the module's name, and the extra's"""
    options: ClassVar[dict[str, Any]] = {}
    """given to every adapter"""

    @pytest.fixture(scope="class")
    @classmethod
    def directory(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return build_model_directory(tmp_path_factory.mktemp("model"))

    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
        self.model = str(directory)
        self.install(monkeypatch)

    @abstractmethod
    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put the stand-in where imports find it."""

    @abstractmethod
    def adapter(self, **options: Any) -> LLMEngine:
        """With these options alone."""
        ...

    def made(self, **options: Any) -> LLMEngine:
        return self.adapter(**{"model": self.model} | self.options | options)

    def make(self) -> LLMEngine:
        return self.made()

    @asynccontextmanager
    async def started(self, **options: Any) -> AsyncGenerator[RunningEngine]:
        outer = self

        class Suite(EngineSuite):
            def make(self) -> LLMEngine:
                return outer.made(**options)

        async with Suite().started() as running:
            yield running


class ForeignEngineSuite(ForeignContract):
    """The contract, and what else both adapters do."""

    called: ClassVar[str]
    """the library's name for people"""
    memory: ClassVar[str]
    """the option for a share of the GPU's memory"""
    blocks: ClassVar[dict[str, Any]] = {}
    """options that make a block 16 tokens"""
    max_batched: ClassVar[int]
    """tokens of a batch, as the stand-in has it"""
    start_failure: ClassVar[str]
    """what the stand-in raises for a model whose name ends in -that-fails"""

    @pytest.fixture(params=[{}], ids=["steps"])
    def streaming(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        """Options for one of the ways in which the library streams."""
        return request.param

    @pytest.fixture
    @abstractmethod
    def bad_arguments(self, request: pytest.FixtureRequest) -> tuple[str, str]:
        """Arguments that the library does not take, and the complaint."""

    @pytest.fixture
    @abstractmethod
    def impossible(self, request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
        """Fields of a request that cannot be answered with a context of 300 tokens, and the complaint."""

    @abstractmethod
    def arguments(self) -> Any:
        """What the last engine of the library was given."""

    @abstractmethod
    def is_shut_down(self) -> bool:
        """The last engine of the library."""
        ...

    @abstractmethod
    def ranks(self) -> list[int]:
        """Where requests run."""
        ...

    @abstractmethod
    def known(self) -> Collection[Any]:
        """Requests that the library has."""
        ...

    @abstractmethod
    def aborted(self) -> list[str]:
        """Requests that it was told to end."""
        ...

    async def refusal(self, complaint: str, **options: Any) -> ConfigError:
        """How an adapter with these options fails to start."""
        engine = self.made(**options)
        with pytest.raises(ConfigError, match=complaint) as caught:
            await engine.start(INSTANCE)
        await engine.cleanup()
        return caught.value

    # -- starting

    async def test_the_engine_describes_itself(self) -> None:
        options: dict[str, Any] = {"context_length": 512, "max_num_seqs": 3, "data_parallel_size": 2, self.memory: 0.5}
        async with self.started(name="served", **self.blocks, **options) as running:
            config = running.config
        assert (config.model, config.served_name) == (self.model, "served")
        assert (config.context_length, config.kv_cache_block_size, config.total_kv_blocks) == (512, BLOCK, 1000)
        assert (config.max_num_seqs, config.max_num_batched_tokens, config.data_parallel_size) == (3, self.max_batched, 2)
        assert config.card.tokenizer is not None
        assert getattr(self.arguments(), self.memory) == 0.5

    async def test_arguments_that_it_does_not_take_are_one_line(self, bad_arguments: tuple[str, str]) -> None:
        arguments, complaint = bad_arguments
        assert "\n" not in (await self.refusal(complaint, arguments=arguments)).message

    def test_a_model_is_needed(self) -> None:
        with pytest.raises(ConfigError, match=f"the {self.library} engine needs a model"):
            self.adapter()

    async def test_a_missing_extra_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == self.library]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, self.library, None)
        name = self.library
        await self.refusal(rf'^the {name} engine needs {name}(\.\w+)*: pip install "stator\[{name}\]"$')

    async def test_what_happens_while_loading_is_passed_on(self) -> None:
        engine = self.made(model=f"{self.model}-that-fails")
        with pytest.raises(RuntimeError, match=self.start_failure):
            await engine.start(INSTANCE)
        await engine.cleanup()

    async def test_loading_does_not_block_our_loop_and_is_reported(self) -> None:
        engine, reports, turns = self.made(), list[str](), 0
        engine.follow_progress(reports.append)
        starting = asyncio.ensure_future(engine.start(INSTANCE))
        while not starting.done():
            turns += 1
            await asyncio.sleep(0.001)
        await starting
        assert turns > 10
        await engine.cleanup()
        assert [report for report in reports if f"starting {self.called}" in report]
        assert self.is_shut_down()

    # -- requests

    async def test_tokens_usage_and_cached_tokens(self, streaming: dict[str, Any]) -> None:
        prompt = list(range(5, 45))
        async with self.started(**self.blocks, **streaming) as running:
            first, second = [await running.answer(request(prompt, 8)) for _ in range(2)]
        for items, cached in ((first, 0), (second, 32)):
            check_answer(items)
            assert tokens(items) == expected(prompt, 8)
            assert items[-1].finish_reason == "length"
            usage = items[-1].completion_usage
            assert usage is not None
            assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (40, 8, 48)
            assert usage.prompt_tokens_details == {"cached_tokens": cached}

    async def test_answers_end_where_they_should(self) -> None:
        prompt = [5, 6, 7]
        text = expected(prompt, 8)
        async with self.started() as running:
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

    async def test_no_limit_is_the_end_of_the_context(self) -> None:
        async with self.started(context_length=30) as running:
            for count in (None, 100):
                items = await running.answer(request([5] * 10, count))
                assert (len(tokens(items)), items[-1].finish_reason) == (20, "length")

    async def test_log_probabilities(self, streaming: dict[str, Any]) -> None:
        async with self.started(**streaming) as running:
            items = await running.answer(request([5], 3, output_options=OutputOptions(logprobs=2)))
            chosen = await running.answer(request([5], 1, output_options=OutputOptions(logprobs=0)))
        for item in items:
            assert len(item.token_ids) == len(item.log_probs or ()) == len(item.top_logprobs or ())
        values = [value for item in items for value in item.log_probs or ()]
        top = [position for item in items for position in item.top_logprobs or ()]
        assert values == [-1.0] * 3
        assert [[(one.rank, one.token_id, one.logprob) for one in position] for position in top] == [
            [(1, token + 1, -0.5), (2, token, -1.0)] for token in expected([5], 3)
        ]
        assert (chosen[0].log_probs, chosen[0].top_logprobs) == ([-1.0], [[]])

    async def test_the_copy_of_the_model_may_be_chosen(self) -> None:
        async with self.started(data_parallel_size=2) as running:
            stream = running.generate(request(count=1000, routing=Routing(dp_rank=1)))
            await anext(stream)
            assert self.ranks() == [1]
            with pytest.raises(EngineError, match="out of range") as caught:
                await running.answer(request(routing=Routing(dp_rank=2)))
            assert caught.value.kind == "InvalidArgument"

    async def test_what_cannot_be_done_is_an_invalid_argument(self, impossible: tuple[dict[str, Any], str]) -> None:
        fields, complaint = impossible
        asked: dict[str, Any] = {"prompt": [5]} | fields
        async with self.started(context_length=300) as running:
            with pytest.raises(EngineError, match=complaint) as caught:
                await running.answer(request(**asked))
            assert caught.value.kind == "InvalidArgument"
            check_answer(await running.answer(request()))

    async def test_other_errors_are_the_engines_own(self) -> None:
        async with self.started() as running:
            with pytest.raises(EngineError, match="RuntimeError: this prompt") as caught:
                await running.answer(request([499, 2]))
            assert caught.value.kind == "Unknown"

    @pytest.mark.parametrize("how", ["stopped", "killed", "left"])
    async def test_requests_that_nobody_wants_are_aborted_over_there(self, how: str) -> None:
        async with self.started() as running:
            context = Context(how)
            stream = running.generate(request(count=10_000), context)
            first = await anext(stream)
            assert len(self.known()) == 1
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
            await eventually(lambda: not self.known() and len(self.aborted()) == 1)
            check_answer(await running.answer(request()))
            assert len(self.aborted()) == 1, "what has ended is not aborted"

    # -- events

    async def test_kv_events_reach_us_without_a_port_open_to_others(self) -> None:
        async with self.started(data_parallel_size=2, **self.blocks) as running, Scope("followers") as scope:
            sources = running.engine.kv_event_sources()
            assert sources == running.engine.kv_event_sources()
            sink = ListSink(block_size=BLOCK)
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
            asked = [[one + 5] * BLOCK for one in range(1, number + 1)]
            for _, what, _, parent, ids, lora, tier in sink.told:
                assert (what, parent, lora, tier) == ("stored", None, None, "device")
                assert ids in asked

    async def test_kv_events_may_be_switched_off_or_be_the_operators_own(self) -> None:
        own: tuple[dict[str, Any], ...] = ({"kv_events": False}, {"arguments": '{"kv_events_config": null}'})
        for options in own:
            async with self.started(**options) as running:
                assert not running.engine.kv_event_sources()
                assert self.arguments().kv_events_config is None
