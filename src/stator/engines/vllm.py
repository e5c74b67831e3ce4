"""vLLM: its V1 engine behind our worker."""

import asyncio
import importlib
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, ClassVar

from stator.config import Config, Setting
from stator.engines.arguments import missing_extra, read_arguments
from stator.engines.foreign_request import refuse_unsupported
from stator.engines.hit_rate import HitRate
from stator.engines.hosted import HostedEngine, card_of
from stator.engines.loopback_ports import free_ports
from stator.engines.vllm_translate import AnswerReader
from stator.errors import ConfigError, StatorError
from stator.kv.sources import KvEventSource, ZmqSource
from stator.llm.card import ModelCard
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.worker.engine import EngineConfig
from stator.worker.snapshot import ComponentSnapshot, SnapshotSink

__all__ = ["VllmEngine", "VllmOptions"]

_LOOK = 1.0
"""seconds between looks whether the engine lives"""


class VllmOptions(Config, frozen=True, kw_only=True):
    """Settings of the vLLM engine."""

    section: ClassVar[str] = "vllm"

    model: Annotated[str, Setting(doc="model directory, or id on the Hugging Face hub")] = ""
    name: Annotated[str, Setting(doc="model name to serve; empty: the model's own")] = ""
    dtype: Annotated[str, Setting(doc="type of weights and activations, e.g. bfloat16; auto: the checkpoint's own")] = "auto"
    tensor_parallel_size: Annotated[int, Setting(doc="GPUs that share each layer", ge=1)] = 1
    data_parallel_size: Annotated[int, Setting(doc="copies of the model, each with a scheduler of its own", ge=1, le=1024)] = 1
    gpu_memory_utilization: Annotated[
        float | None, Setting(doc="fraction of the GPU's memory to use; none: vLLM's default", gt=0, le=1)
    ] = None
    context_length: Annotated[
        int | None, Setting(doc="longest prompt and answer together; none: the model's limit", unit="tokens", ge=2)
    ] = None
    max_num_seqs: Annotated[int | None, Setting(doc="requests that generate at once, per copy; none: vLLM's default", ge=1)] = (
        None
    )
    kv_events: Annotated[bool, Setting(doc="publish what the prefix cache holds, for routers")] = True
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


class VllmEngine(HostedEngine):
    """vLLM's `AsyncLLM`, which runs its schedulers and workers in processes of its own.

    What a request leaves open, the model's generation config decides, then vLLM. `routing.dp_rank` chooses the copy of the model.
    Each step of a scheduler is a snapshot. The death of one of vLLM's processes ends the engine.
    """

    options_type = VllmOptions

    def __init__(self, options: VllmOptions) -> None:
        """Raises `ConfigError` without a model."""
        super().__init__("vllm")
        if not options.model:
            raise ConfigError("the vllm engine needs a model: a directory or an id on the Hugging Face hub")
        self.options = options
        self._engine: Any = None
        self._library: Any = None
        self._defaults: dict[str, Any] = {}
        self._ranks = 1
        self._total_blocks = 0
        self._kv_port = 0
        self._hit_rates: list[HitRate] = []
        self._snapshots: SnapshotSink | None = None

    async def load(self, instance_id: int) -> EngineConfig:
        self.report("importing vllm")
        try:
            library: Any = await asyncio.to_thread(importlib.import_module, "stator.engines.vllm_library")
        except ModuleNotFoundError as error:
            raise missing_extra("vllm", error) from error
        except ImportError as error:
            raise ConfigError(f"this version of vLLM is not supported, 0.11 and later are: {error}") from error
        self._library = library
        arguments = self.options.engine_arguments()
        self._ranks = int(arguments["data_parallel_size"])
        self._hit_rates = [HitRate() for _ in range(self._ranks)]
        if self.options.kv_events and "kv_events_config" not in arguments:
            self._kv_port = free_ports(self._ranks)
        self.report(f"starting vLLM with {self.options.model}")
        endpoint = f"tcp://127.0.0.1:{self._kv_port}" if self._kv_port else None
        self._engine = library.build(arguments, kv_endpoint=endpoint, on_stats=self._record)
        card = await asyncio.to_thread(card_of, self.options.model, report=self.report)
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

    def error_of(self, error: Exception) -> StatorError:
        return self._library.error_of(error)

    async def unload(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    # -- load, events, death

    def snapshot_ranks(self) -> Sequence[int]:
        return range(self._ranks) if self._total_blocks else ()

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        """Empty caches to begin with, then each step."""
        self._snapshots = sink
        for rank in range(self._ranks):
            self._publish(rank, 0.0)

    def _record(self, rank: int, stats: Any) -> None:
        """`SchedulerStats` of a step, over there."""
        cache = getattr(stats, "prefix_cache_stats", None)
        if cache is not None and rank < self._ranks:
            if cache.reset:
                self._hit_rates[rank].reset()
            self._hit_rates[rank].add(cache.queries, cache.hits)
        self._publish(rank, stats.kv_cache_usage)

    def _publish(self, rank: int, usage: float) -> None:
        if self._snapshots is None or not self._total_blocks or rank >= self._ranks:
            return
        snapshot = ComponentSnapshot(
            kv_used_blocks=round(usage * self._total_blocks),
            kv_total_blocks=self._total_blocks,
            gpu_cache_usage=usage,
            kv_cache_hit_rate=self._hit_rates[rank].value,
        )
        self._snapshots.publish(rank, snapshot)

    def kv_event_sources(self) -> Sequence[KvEventSource]:
        """vLLM's publishers connect to us, one port per rank: they would bind all interfaces of the machine otherwise."""
        if not self._kv_port:
            return ()
        return [
            ZmqSource(endpoint=f"tcp://127.0.0.1:{self._kv_port + rank}", dp_rank=rank, bind=True)
            for rank in range(self._ranks)
        ]

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
