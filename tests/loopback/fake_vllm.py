"""A stand-in for vLLM with the names and signatures of its public V1 interface (0.33): what our adapter touches, and no more.

Tokens are those of `fake_foreign`. A step takes a millisecond. `install` puts it into `sys.modules`.
"""

import asyncio
import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import pytest

from loopback.fake_foreign import EOS, STEP, PrefixCache, install_modules, load_for, next_token

BLOCK = 16


# -- vllm.exceptions, vllm.v1.engine.exceptions


class VLLMError(Exception):
    pass


class VLLMClientError(VLLMError):
    pass


class VLLMServerError(VLLMError):
    pass


class VLLMValidationError(VLLMClientError):
    pass


class GracefulHTTPError(VLLMError):
    def __init__(self, message: str, http_status: HTTPStatus):
        super().__init__(message)
        self.http_status = http_status


class EngineGenerateError(VLLMServerError):
    pass


class EngineDeadError(VLLMServerError):
    def __init__(self, *args: Any, suppress_context: bool = False, **kwargs: Any):
        super().__init__("EngineCore encountered an issue. See stack trace (above) for the root cause.", *args)


# -- vllm.config, vllm.engine.arg_utils


@dataclasses.dataclass
class KVEventsConfig:
    enable_kv_cache_events: bool = False
    publisher: Literal["null", "zmq"] = None  # type: ignore[assignment]
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""


@dataclasses.dataclass
class AsyncEngineArgs:
    model: str = "facebook/opt-125m"
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    enforce_eager: bool = False
    kv_events_config: KVEventsConfig | None = None
    enable_log_requests: bool = False
    disable_log_stats: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.enforce_eager, bool):
            raise ValueError("1 validation error for ModelConfig\nenforce_eager\n  Input should be a valid boolean")


# -- vllm.sampling_params


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclasses.dataclass
class StructuredOutputsParams:
    json: str | dict | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        kinds = (self.json, self.regex, self.choice, self.grammar, self.json_object, self.structural_tag)
        if sum(kind is not None for kind in kinds) != 1:
            raise VLLMValidationError(
                "You must use one kind of structured outputs constraint but none or several are specified"
            )


class SamplingParams(msgspec.Struct, omit_defaults=True, dict=True):
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise VLLMValidationError(f"temperature must be non-negative, got {self.temperature}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise VLLMValidationError(f"max_tokens must be at least 1, got {self.max_tokens}.")


# -- vllm.outputs, vllm.logprobs


@dataclasses.dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None = None


# -- vllm.v1.metrics


class StatLoggerBase(ABC):
    @abstractmethod
    def __init__(self, vllm_config: Any, engine_index: int = 0): ...

    @abstractmethod
    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None: ...

    @abstractmethod
    def log_engine_initialized(self) -> None: ...


@dataclasses.dataclass
class PrefixCacheStats:
    reset: bool = False
    requests: int = 0
    queries: int = 0
    hits: int = 0


@dataclasses.dataclass
class SchedulerStats:
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_stats: PrefixCacheStats = dataclasses.field(default_factory=PrefixCacheStats)


# -- vllm.v1.engine.async_llm


class Collector:
    """Outputs of one request, merged while nobody reads (`RequestOutputCollector`)."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput | Exception] = []
        self.ready = asyncio.Event()

    def put(self, output: RequestOutput | Exception) -> None:
        self.outputs.append(output)
        self.ready.set()

    async def get(self) -> RequestOutput:
        while not self.outputs:
            await self.ready.wait()
            self.ready.clear()
        output = self.outputs.pop(0)
        if isinstance(output, Exception):
            raise output
        return output


class Request:
    def __init__(self, request_id: str, prompt: list[int], params: SamplingParams, rank: int) -> None:
        self.id, self.prompt, self.params, self.rank = request_id, prompt, params, rank
        self.generated: list[int] = []
        self.hit: int | None = None
        self.collector = Collector()


class AsyncLLM:
    last: "AsyncLLM"
    """the one made last"""

    def __init__(
        self, vllm_config: Any, executor_class: Any, log_stats: bool, stat_loggers: list[Any] | None = None, **_: Any
    ) -> None:
        asyncio.get_running_loop()  # so that the output handler starts at once
        AsyncLLM.last = self
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        arguments = self.arguments = vllm_config.arguments
        load_for(50)
        ranks = range(arguments.data_parallel_size)
        self.loggers = [[make(vllm_config, rank) for make in stat_loggers or []] for rank in ranks]
        self.requests: list[Request] = []
        self.waiting: list[Request] = []
        self.aborted: list[str] = []
        self.error: Exception | None = None
        self.is_shut_down = False
        self.looked_up = self.found = 0
        self.caches = [self._cache(rank) for rank in ranks]
        self.output_handler = asyncio.create_task(self._run())

    @classmethod
    def from_engine_args(
        cls,
        engine_args: AsyncEngineArgs,
        start_engine_loop: bool = True,
        usage_context: Any = None,
        stat_loggers: list[Any] | None = None,
    ) -> "AsyncLLM":
        if engine_args.model.endswith("-that-fails"):
            raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
        config = SimpleNamespace(
            arguments=engine_args,
            model_config=SimpleNamespace(
                max_model_len=engine_args.max_model_len or 16_384,
                get_diff_sampling_param=lambda: {"temperature": 0.6, "top_k": 20, "max_tokens": 7},
            ),
            cache_config=SimpleNamespace(block_size=BLOCK, num_gpu_blocks=1000 * engine_args.data_parallel_size),
            scheduler_config=SimpleNamespace(max_num_seqs=engine_args.max_num_seqs or 4, max_num_batched_tokens=2048),
            parallel_config=SimpleNamespace(data_parallel_size=engine_args.data_parallel_size),
        )
        return cls(
            vllm_config=config,
            executor_class=None,
            log_stats=not engine_args.disable_log_stats,
            stat_loggers=stat_loggers,
        )

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Any = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        if self.errored:
            raise EngineDeadError()
        request = self._admitted(prompt["prompt_token_ids"], sampling_params, request_id, data_parallel_rank or 0)
        try:
            finished = False
            while not finished:
                output = await request.collector.get()
                finished = output.finished
                yield output
        except (asyncio.CancelledError, GeneratorExit):
            await self.abort(request_id)
            raise
        except (EngineDeadError, VLLMClientError, GracefulHTTPError):
            raise
        except Exception as error:
            await self.abort(request_id)
            raise EngineGenerateError from error

    def _admitted(self, ids: list[int], params: SamplingParams, request_id: str, rank: int) -> Request:
        if any(request.id == request_id for request in (*self.requests, *self.waiting)):
            raise ValueError(f"Request id {request_id} already running.")
        if len(ids) >= self.model_config.max_model_len:
            raise VLLMValidationError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length")
        if not 0 <= rank < self.arguments.data_parallel_size:
            raise VLLMValidationError(f"data_parallel_rank {rank} is out of range")
        if len(self.waiting) + len(self.requests) >= 68:
            raise GracefulHTTPError("The engine is currently busy", HTTPStatus.SERVICE_UNAVAILABLE)
        request = Request(request_id, ids, params, rank)
        self.waiting.append(request)
        return request

    async def abort(self, request_id: str, internal: bool = False) -> None:
        self.aborted.append(request_id)
        for queue in (self.requests, self.waiting):
            for request in [each for each in queue if each.id == request_id]:
                queue.remove(request)
                request.collector.put(self._output(request, [], "abort", None))

    async def check_health(self) -> None:
        if self.errored:
            raise EngineDeadError()

    @property
    def errored(self) -> bool:
        return self.error is not None

    def shutdown(self, timeout: float | None = None) -> None:
        self.is_shut_down = True
        self.output_handler.cancel()
        for cache in self.caches:
            cache.close()

    # -- the engine core

    def die(self) -> None:
        """What happens when its process is killed. Any thread."""
        self.output_handler.get_loop().call_soon_threadsafe(self._die)

    def _die(self) -> None:
        self.error = EngineDeadError()
        self.output_handler.cancel()
        for request in (*self.requests, *self.waiting):
            request.collector.put(self.error)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(STEP)
            room = self.vllm_config.scheduler_config.max_num_seqs - len(self.requests)
            for request in self.waiting[:room]:
                self.waiting.remove(request)
                self.requests.append(request)
                self._prefill(request)
            for request in tuple(self.requests):
                self._decode(request)
            self._record()

    def _prefill(self, request: Request) -> None:
        looked_up, request.hit = self.caches[request.rank].look_up(request.prompt)
        self.looked_up += looked_up
        self.found += request.hit

    def _decode(self, request: Request) -> None:
        params = request.params
        if request.prompt[0] == 499:
            raise_to = ValueError("this prompt") if request.prompt[1] == 1 else RuntimeError("this prompt")
            self.requests.remove(request)
            request.collector.put(raise_to)
            return
        token = next_token(request.prompt, len(request.generated))
        request.generated.append(token)
        reason: str | None = None
        stop: int | None = None
        if token == EOS and not params.ignore_eos:
            reason = "stop"
        elif token in (params.stop_token_ids or ()):
            reason, stop = "stop", token
        elif len(request.generated) == params.max_tokens or self._full(request):
            reason = "length"
        if reason:
            self.requests.remove(request)
        request.collector.put(self._output(request, [token], reason, stop))

    def _full(self, request: Request) -> bool:
        return len(request.prompt) + len(request.generated) >= self.model_config.max_model_len

    def _output(self, request: Request, ids: list[int], reason: str | None, stop: int | None) -> RequestOutput:
        assert request.params.output_kind is RequestOutputKind.DELTA
        logprobs = None
        if request.params.logprobs is not None:
            # the chosen one is the second likeliest
            logprobs = [
                {token: Logprob(-1.0, 2, None), token + 1: Logprob(-0.5, 1, None), token + 2: Logprob(-3.0, 3, None)}
                for token in ids
            ]
        completion = CompletionOutput(0, "", ids, None, logprobs, reason, stop)
        return RequestOutput(request.id, request.prompt, [completion], reason is not None, request.hit)

    def _record(self) -> None:
        for rank, loggers in enumerate(self.loggers):
            mine = [request for request in self.requests if request.rank == rank]
            blocks = sum(-(-(len(request.prompt) + len(request.generated)) // BLOCK) for request in mine)
            stats = SchedulerStats(
                num_running_reqs=len(mine),
                kv_cache_usage=blocks / 1000,
                prefix_cache_stats=PrefixCacheStats(queries=self.looked_up, hits=self.found),
            )
            for logger in loggers:
                logger.record(scheduler_stats=stats, iteration_stats=None, mm_cache_stats=None, engine_idx=rank)
        self.looked_up = self.found = 0

    def _cache(self, rank: int) -> PrefixCache:
        config = self.arguments.kv_events_config
        if config is None or not config.enable_kv_cache_events:
            return PrefixCache(rank, block_size=BLOCK, endpoint=None)
        assert config.publisher == "zmq"
        return PrefixCache(rank, block_size=BLOCK, endpoint=config.endpoint, more={"lora_name": None})


def install(monkeypatch: pytest.MonkeyPatch, **without: None) -> None:
    """Put the stand-in where imports find it, but for the names in `without`."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"KVEventsConfig": KVEventsConfig},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
        "vllm.exceptions": {"VLLMClientError": VLLMClientError},
        "vllm.sampling_params": {
            "RequestOutputKind": RequestOutputKind,
            "SamplingParams": SamplingParams,
            "StructuredOutputsParams": StructuredOutputsParams,
        },
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": AsyncLLM},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError, "EngineGenerateError": EngineGenerateError},
        "vllm.v1.metrics": {},
        "vllm.v1.metrics.loggers": {"StatLoggerBase": StatLoggerBase},
    }
    install_modules(
        monkeypatch,
        {module: {name: value for name, value in names.items() if name not in without} for module, names in contents.items()},
    )
