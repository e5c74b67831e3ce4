"""vLLM: its V1 engine behind our worker."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any, ClassVar

from stator.config import Config, Setting
from stator.engines.arguments import read_arguments
from stator.engines.foreign_engine import ForeignEngine
from stator.engines.foreign_request import refuse_unsupported
from stator.engines.hit_rate import HitRate
from stator.engines.model_options import (
    ContextLength,
    DataParallelSize,
    ModelName,
    ModelSource,
    PublishKvEvents,
    TensorParallelSize,
    WeightType,
)
from stator.engines.vllm_translate import AnswerReader
from stator.llm.card import ModelCard
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.worker.engine import EngineConfig

__all__ = ["VllmEngine", "VllmOptions"]

_LOOK = 1.0
"""seconds between looks whether the engine lives"""


class VllmOptions(Config, frozen=True, kw_only=True):
    """Settings of the vLLM engine."""

    section: ClassVar[str] = "vllm"

    model: ModelSource = ""
    name: ModelName = ""
    dtype: WeightType = "auto"
    tensor_parallel_size: TensorParallelSize = 1
    data_parallel_size: DataParallelSize = 1
    gpu_memory_utilization: Annotated[
        float | None, Setting(doc="fraction of the GPU's memory to use; none: vLLM's default", gt=0, le=1)
    ] = None
    context_length: ContextLength = None
    max_num_seqs: Annotated[int | None, Setting(doc="requests that generate at once, per copy; none: vLLM's default", ge=1)] = (
        None
    )
    kv_events: PublishKvEvents = True
    arguments: Annotated[
        str,
        Setting(
            doc="more arguments of vLLM's AsyncEngineArgs, which win over the ones above: `NAME=VALUE, …`, or one JSON object"
        ),
    ] = ""

    def engine_arguments(self) -> dict[str, Any]:
        """By vLLM's names. Raises `ConfigError`."""
        chosen = {
            "model": self.model,
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "data_parallel_size": self.data_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": self.context_length,
            "max_num_seqs": self.max_num_seqs,
        }
        given = {name: value for name, value in chosen.items() if value is not None}
        return given | read_arguments(self.arguments, setting="vllm.arguments")


class VllmEngine(ForeignEngine):
    """vLLM's `AsyncLLM`, which runs its schedulers and workers in processes of its own.

    What a request leaves open, the model's generation config decides, then vLLM. `routing.dp_rank` chooses the copy of the model.
    Each step of a scheduler is a snapshot. The death of one of vLLM's processes ends the engine.
    """

    options_type = VllmOptions

    def __init__(self, options: VllmOptions) -> None:
        """Raises `ConfigError` without a model."""
        super().__init__("vllm", options)
        self.options = options
        self._defaults: dict[str, Any] = {}
        self._hit_rates: list[HitRate] = []

    async def load(self, instance_id: int) -> EngineConfig:
        library = await self._import_library("vLLM", oldest="0.11")
        arguments = self.options.engine_arguments()
        self._ranks = int(arguments["data_parallel_size"])
        self._hit_rates = [HitRate() for _ in range(self._ranks)]
        kv_endpoint = self._reserve_kv_endpoint(arguments)
        self.report(f"starting vLLM with {self.options.model}")
        self._engine = library.build(arguments, kv_endpoint=kv_endpoint, on_stats=self._record)
        card = await self._card()
        self._watch()
        return self._describe(card)

    def _describe(self, card: ModelCard) -> EngineConfig:
        config = self._engine.vllm_config
        self._defaults = config.model_config.get_diff_sampling_param()
        blocks = config.cache_config.num_gpu_blocks or 0  # of all ranks together
        self._total_blocks = blocks // self._ranks
        return EngineConfig(
            model=self.options.model,
            card=card,
            served_name=self.options.name or None,
            context_length=config.model_config.max_model_len,
            kv_cache_block_size=config.cache_config.block_size,
            total_kv_blocks=self._total_blocks or None,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            data_parallel_size=self._ranks,
        )

    async def answer(self, request: PreprocessedRequest, request_id: str) -> AsyncGenerator[EngineOutput]:
        refuse_unsupported(request)
        params = self._library.sampling_params(request, self._defaults)
        rank = request.routing.dp_rank if request.routing else None
        placed = {} if rank is None else {"data_parallel_rank": rank}
        reader = AnswerReader(request)
        async for step in self._engine.generate({"prompt_token_ids": request.token_ids}, params, request_id, **placed):
            yield reader.read(step)

    # -- load, death

    def _record(self, rank: int, stats: Any) -> None:
        """`SchedulerStats` of a step, over there."""
        if rank >= self._ranks:
            return
        found, usage = self._hit_rates[rank], stats.kv_cache_usage
        cache = getattr(stats, "prefix_cache_stats", None)
        if cache is not None:
            if cache.reset:
                found.reset()
            found.add(cache.queries, cache.hits)
        self._publish(rank, used_blocks=round(usage * self._total_blocks), usage=usage, hit_rate=found.value)

    def _watch(self) -> None:
        """Look, from now until `unload`, whether the engine lives; requests that run notice by themselves."""
        engine = self._engine

        async def look() -> None:
            while self._engine is engine:
                try:
                    await engine.check_health()
                except Exception as error:
                    self.died(f"{type(error).__name__}: {error}")
                    break
                await asyncio.sleep(_LOOK)

        self.spawn(look())
