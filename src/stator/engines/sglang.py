"""SGLang: its engine behind our worker."""

import asyncio
import json
import logging
import signal
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, ClassVar

from stator.config import Config, Setting
from stator.engines.arguments import read_arguments
from stator.engines.foreign_engine import ForeignEngine
from stator.engines.foreign_request import refuse_unsupported
from stator.engines.model_options import (
    ContextLength,
    DataParallelSize,
    ModelName,
    ModelSource,
    PublishKvEvents,
    TensorParallelSize,
    WeightType,
)
from stator.engines.sglang_translate import AnswerReader, sampling_fields
from stator.errors import EngineError
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.worker.engine import EngineConfig

__all__ = ["SglangEngine", "SglangOptions"]

logger = logging.getLogger(__name__)


class SglangOptions(Config, frozen=True, kw_only=True):
    """Settings of the SGLang engine."""

    section: ClassVar[str] = "sglang"

    model: ModelSource = ""
    name: ModelName = ""
    dtype: WeightType = "auto"
    tensor_parallel_size: TensorParallelSize = 1
    data_parallel_size: DataParallelSize = 1
    mem_fraction_static: Annotated[
        float | None, Setting(doc="fraction of the GPU's memory for weights and KV cache; none: SGLang's default", gt=0, le=1)
    ] = None
    context_length: ContextLength = None
    max_num_seqs: Annotated[
        int | None, Setting(doc="requests that generate at once, per copy; none: as many as memory allows", ge=1)
    ] = None
    block_size: Annotated[int | None, Setting(doc="tokens in a KV block; none: SGLang's default", unit="tokens", ge=1)] = None
    guided_decoding: Annotated[
        bool, Setting(doc="let requests ask for it: SGLang then loads a tokenizer, and turns all tokens to text, too")
    ] = False
    kv_events: PublishKvEvents = True
    load_interval: Annotated[float, Setting(doc="time between looks at the schedulers' load", unit="s", gt=0, le=60)] = 0.25
    arguments: Annotated[
        str,
        Setting(
            doc="more arguments of SGLang's ServerArgs, which win over the ones above: `NAME=VALUE, …`, or one JSON object"
        ),
    ] = ""

    def server_arguments(self) -> dict[str, Any]:
        """By SGLang's names. Raises `ConfigError`."""
        chosen = {
            "model_path": self.model,
            "dtype": self.dtype,
            "tp_size": self.tensor_parallel_size,
            "dp_size": self.data_parallel_size,
            "mem_fraction_static": self.mem_fraction_static,
            "context_length": self.context_length,
            "max_running_requests": self.max_num_seqs,
            "page_size": self.block_size,
            "skip_tokenizer_init": not self.guided_decoding,
        }
        given = {name: value for name, value in chosen.items() if value is not None}
        return given | read_arguments(self.arguments, setting="sglang.arguments")


class SglangEngine(ForeignEngine):
    """SGLang's `Engine`, which runs its schedulers in processes of its own and ends all child processes of this one when it ends.

    What a request leaves open, the model's generation config decides, then SGLang. `routing.dp_rank` chooses the copy of the
    model. Snapshots are taken from the schedulers' load, every `load_interval` seconds. SGLang's processes say with SIGQUIT that one of
    them failed: that ends the engine, not this process.
    """

    options_type = SglangOptions

    def __init__(self, options: SglangOptions) -> None:
        """Raises `ConfigError` without a model."""
        super().__init__("sglang", options)
        self.options = options
        self._facts: Any = None
        self._incremental = False
        self._names: frozenset[str] = frozenset()
        self._signalled: asyncio.AbstractEventLoop | None = None

    async def start(self, instance_id: int) -> EngineConfig:
        """As `HostedEngine.start`; from now on SIGQUIT belongs to us, where that is possible."""
        loop = asyncio.get_running_loop()
        try:
            loop.add_signal_handler(signal.SIGQUIT, self.died, "a process of SGLang failed; its log says why")
            self._signalled = loop
        except (RuntimeError, ValueError, NotImplementedError):
            logger.warning("not in the main thread: when a process of SGLang fails, this process ends without notice")
        return await super().start(instance_id)

    async def cleanup(self) -> None:
        try:
            await super().cleanup()
        finally:
            loop, self._signalled = self._signalled, None
            if loop is not None:
                loop.remove_signal_handler(signal.SIGQUIT)

    async def load(self, instance_id: int) -> EngineConfig:
        library = await self._import_library("SGLang", oldest="0.5")
        arguments = self._arguments(library.server_fields())
        self.report(f"starting SGLang with {self.options.model}")
        self._engine = library.build(arguments)
        self._names = library.generate_names(self._engine)
        self._facts = facts = await library.facts_of(self._engine)
        self._total_blocks = facts.token_capacity // facts.page_size
        card = await self._card()
        self._look_at_load()
        return EngineConfig(
            model=self.options.model,
            card=card,
            served_name=self.options.name or None,
            context_length=facts.context_length,
            kv_cache_block_size=facts.page_size,
            total_kv_blocks=self._total_blocks or None,
            max_num_seqs=facts.max_running_requests,
            max_num_batched_tokens=facts.max_prefill_tokens,
            data_parallel_size=self._ranks,
        )

    def _arguments(self, known: frozenset[str]) -> dict[str, Any]:
        arguments = self.options.server_arguments()
        self._ranks = int(arguments.get("dp_size", 1))
        for name in ("incremental_streaming_output", "stream_output"):  # the older name of the same thing
            if name in known:
                self._incremental = bool(arguments.setdefault(name, True))
                break
        if endpoint := self._reserve_kv_endpoint(arguments):
            arguments["kv_events_config"] = json.dumps({"publisher": "zmq", "endpoint": endpoint, "topic": ""})
        return arguments

    async def answer(self, request: PreprocessedRequest, request_id: str) -> AsyncGenerator[EngineOutput]:
        refuse_unsupported(request)
        if request.sampling_options.guided_decoding is not None and not self.options.guided_decoding:
            raise EngineError("guided decoding is off: set sglang.guided_decoding", kind="InvalidArgument")
        if len(request.token_ids) >= self._facts.context_length:
            length = self._facts.context_length
            raise EngineError(
                f"the prompt has {len(request.token_ids)} tokens; the context of {length} leaves no room for an answer",
                kind="InvalidArgument",
            )
        reader = AnswerReader(request, incremental=self._incremental)
        stream = await self._engine.async_generate(**self._call(request, request_id))
        ended = False
        try:
            async for chunk in stream:
                output = reader.read(chunk)
                ended = output.finish_reason is not None
                yield output
        finally:
            if not ended:
                self._engine.tokenizer_manager.abort_request(rid=request_id)

    def _call(self, request: PreprocessedRequest, request_id: str) -> dict[str, Any]:
        """Arguments of `async_generate`."""
        call: dict[str, Any] = {
            "input_ids": request.token_ids,
            "sampling_params": sampling_fields(request, self._facts.defaults, context_length=self._facts.context_length),
            "stream": True,
            "rid": request_id,
        }
        if (alternatives := request.output_options.logprobs) is not None:
            call |= {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": alternatives}
        if request.routing and request.routing.dp_rank is not None:
            name = "routed_dp_rank" if "routed_dp_rank" in self._names else "data_parallel_rank"
            call[name] = request.routing.dp_rank
        return call

    # -- load

    def snapshot_ranks(self) -> Sequence[int]:
        return range(self._ranks) if self._has_loads() else ()

    def _has_loads(self) -> bool:
        return self._engine is not None and hasattr(self._engine.tokenizer_manager, "get_loads")

    def _look_at_load(self) -> None:
        engine, silent = self._engine, False

        async def look() -> None:
            nonlocal silent
            while self._engine is engine and self._has_loads():
                try:
                    for load in await engine.tokenizer_manager.get_loads():
                        self._record(load)
                    silent = False
                except Exception:
                    if not silent:
                        logger.exception("SGLang does not tell its load; the last one stands until it does")
                    silent = True
                await asyncio.sleep(self.options.load_interval)

        self.spawn(look())

    def _record(self, load: Any) -> None:
        """`LoadSnapshot` of a rank, over there."""
        size, used = self._facts.page_size, load.num_used_tokens
        usage = min(used / (self._facts.token_capacity or 1), 1.0)
        self._publish(load.dp_rank, used_blocks=-(-used // size), usage=usage, hit_rate=load.cache_hit_rate)
